"""Logged values arrive: the real `wandb` client and `wandb sync` against a loopback server."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from wandb_backend import API_KEY, WandbBackend

from harness.disk.digest import digest
from harness.tracking import NoTracker, WandbTracker, end_service

pytestmark = pytest.mark.usefixtures("own_wandb")
ROOT = Path(__file__).parents[1]
ROWS = [{"step": 10 * n, "train/loss_nats": 0.1 * n, "norm/B": n} for n in range(8)]
CONFIG = {"variant": {"name": "dora", "rank": 8, "targets": ["query", "value"]}, "seed": 0}


@pytest.fixture
def backend():
    with WandbBackend.serve() as backend:
        yield backend
    assert not backend.unexpected


def opened(tracker: NoTracker, run_dir: Path, **changed):
    """The tracker opened as the loop opens it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    described = {
        "run_id": "dora-s0-3fa9c1d2",
        "name": "dora-s0",
        "group": "ablation",
        "job_type": "train",
        "tags": ["dora", "minilm"],
        "config": CONFIG,
    }
    return tracker.open(run_dir=run_dir, **(described | changed))


def offline_folders(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*"))


def sync(backend: WandbBackend, *folders: Path) -> None:
    """Send the folders as a reader would; `wandb sync` leaves its own log where it is started."""
    subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *map(str, folders)],
        cwd=os.environ["HOME"],
        env=os.environ | backend.environment,
        check=True,
        capture_output=True,
        timeout=60,
    )


def closed_port() -> str:
    """The address of a server that is not there."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def rows(history: list[dict]) -> list[dict]:
    """The rows as logged, without what wandb adds; its own step must be ours."""
    assert all(row["_step"] == row["step"] for row in history)
    return [
        {key: value for key, value in row.items() if key[0] != "_" and key != "samples"}
        for row in history
    ]


def test_offline_run_is_silent_local_and_syncs_whole(tmp_path, backend, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_BASE_URL", backend.url)
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    monkeypatch.setenv("HTTPS_PROXY", backend.url)  # anything for the world outside would come here
    tracker, environment = WandbTracker(entity="lab", notes="first try"), dict(os.environ)
    with opened(tracker, tmp_path / "run", tags=["dora", "x" * 65]) as view:
        for row in ROWS:
            view.log(row)
        view.samples([{"text": "fine", "label": 1}, {"text": "dull", "p": 0.25}])
        view.finish({"test": {"accuracy": 0.8125}, "adapter_bytes": 8})
    assert backend.requests == 0
    assert capfd.readouterr() == ("", "")
    assert {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"} == environment
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["wandb"]
    assert not list(Path(os.environ["HOME"]).rglob("artifacts"))

    monkeypatch.delenv("HTTPS_PROXY")
    moved = (tmp_path / "run").rename(tmp_path / "moved")  # as to a machine that has a network
    (folder,) = offline_folders(moved)
    assert view.where == f"wandb sync {tmp_path}/run/wandb/{folder.name}"
    sync(backend, folder)

    run = backend.runs["dora-s0-3fa9c1d2"]
    assert run.fields["displayName"] == "dora-s0"
    assert run.fields["groupName"] == "ablation"
    assert run.fields["jobType"] == "train"
    assert run.fields["project"] == "lora-variants"
    assert run.fields["entity"] == "lab"
    assert run.fields["notes"] == "first try"
    assert sorted(run.fields["tags"]) == ["dora", "x" * 64]
    recorded = run.config
    axes = recorded.pop("_wandb")["m"]
    assert recorded == CONFIG
    # In wandb's encoding "1" is a name, "2" a glob, "5" the (1-based) place of its axis.
    (glob,) = [metric for metric in axes if metric.get("2") == "*"]
    assert axes[glob["5"] - 1]["1"] == "step"
    assert rows(run.history) == ROWS
    assert run.summary["test/accuracy"] == 0.8125
    assert run.summary["adapter_bytes"] == 8
    assert run.summary["train/loss_nats"] == pytest.approx(0.7)
    assert run.exit_code == 0

    shown = run.summary["samples"]
    assert (shown["_type"], shown["ncols"], shown["nrows"]) == ("table-file", 3, 2)
    assert "artifact_path" not in shown  # a file outside the folder would be missed after the move
    table = json.loads(run.files[shown["path"]])
    assert table["columns"] == ["text", "label", "p"]
    assert table["data"] == [["fine", 1, None], ["dull", None, 0.25]]


def test_interrupted_offline_run_is_rebuilt(tmp_path, backend):
    with pytest.raises(KeyboardInterrupt), opened(WandbTracker(), tmp_path) as view:
        for row in ROWS[:5]:
            view.log(row)
        raise KeyboardInterrupt
    # The checkpoint was at row 3: the record was cut to it, and rows 3 and 4 are trained again.
    with opened(WandbTracker(), tmp_path, history=ROWS[:3]) as view:
        for row in ROWS[3:]:
            view.log(row)
        view.samples([{"text": "fine", "label": 1}])
    assert len(offline_folders(tmp_path)) == 1
    sync(backend, *offline_folders(tmp_path))
    (run,) = backend.runs.values()
    assert rows(run.history) == ROWS
    assert run.exit_code == 0
    (artifact,) = backend.artifacts.values()
    assert (artifact.type, artifact.committed) == ("run_table", True)
    assert json.loads(artifact.files["samples.table.json"])["data"] == [["fine", 1]]


def test_interrupted_before_the_first_checkpoint(tmp_path):
    for _ in range(2):
        with opened(WandbTracker(), tmp_path) as view:
            view.log(ROWS[0])
    assert len(offline_folders(tmp_path)) == 1


def test_failed_runs_are_closed_as_failed_and_the_next_is_fresh(tmp_path, backend):
    endings = {"error": RuntimeError(), "interrupt": KeyboardInterrupt(), "exit": SystemExit(0)}
    for n, (run_id, ending) in enumerate(endings.items()):
        with (
            pytest.raises(type(ending)),
            opened(WandbTracker(), tmp_path / run_id, run_id=run_id) as view,
        ):
            view.log(ROWS[n])
            raise ending
    with opened(WandbTracker(), tmp_path / "fine", run_id="fine") as view:
        view.log(ROWS[3])
    assert wandb.run is None
    sync(backend, *tmp_path.glob("*/wandb/offline-run-*"))
    assert {key: run.exit_code for key, run in backend.runs.items()} == {
        "error": 1,
        "interrupt": 1,
        "exit": 1,
        "fine": 0,
    }
    for n, run_id in enumerate((*endings, "fine")):
        assert rows(backend.runs[run_id].history) == [ROWS[n]]


def test_online_run_and_its_continuation(tmp_path, backend, monkeypatch, capfd):
    for name, value in backend.environment.items():
        monkeypatch.setenv(name, value)
    online = WandbTracker(mode="online")
    with pytest.raises(RuntimeError), opened(online, tmp_path) as view:
        assert view.where == f"{backend.url}/me/lora-variants/runs/dora-s0-3fa9c1d2"
        for row in ROWS[:5]:
            view.log(row)
        raise RuntimeError
    (run,) = backend.runs.values()
    assert (rows(run.history), run.exit_code) == (ROWS[:5], 1)

    # Continued while the server is away, up to row 6 ...
    end_service()
    monkeypatch.setenv("WANDB_BASE_URL", closed_port())
    away = WandbTracker(mode="online", timeout_s=1.0)
    with opened(away, tmp_path, history=ROWS[:3]) as view:
        for row in ROWS[3:7]:
            view.log(row)
    assert len(offline_folders(tmp_path)) == 1
    unreachable, part_was_sent = capfd.readouterr().err.splitlines()
    assert "cannot be reached" in unreachable
    assert "already has rows" in part_was_sent

    # ... and then online to the end: the server is sent rows 5, 6 and 7 alone.
    end_service()
    monkeypatch.setenv("WANDB_BASE_URL", backend.url)
    with opened(online, tmp_path, history=ROWS[:7]) as view:
        view.log(ROWS[7])
        view.samples([{"text": "fine", "label": 1}])
        view.finish({"test": {"accuracy": 0.8125}})
    assert not offline_folders(tmp_path)
    (run,) = backend.runs.values()
    assert (rows(run.history), run.exit_code) == (ROWS, 0)
    assert run.summary["test/accuracy"] == 0.8125
    assert [artifact.committed for artifact in backend.artifacts.values()] == [True]
    assert capfd.readouterr() == ("", "")


def test_a_run_that_the_server_already_has(tmp_path, backend, monkeypatch, capfd):
    for name, value in backend.environment.items():
        monkeypatch.setenv(name, value)
    for warnings in (0, 1):
        with opened(WandbTracker(mode="online"), tmp_path) as view:
            for row in ROWS:
                view.log(row)
        assert capfd.readouterr().err.count("from step 71 on") == warnings
    (run,) = backend.runs.values()
    assert rows(run.history) == ROWS

    with opened(WandbTracker(), tmp_path, history=ROWS[:3]):
        pass
    assert "delete it there before `wandb sync`" in capfd.readouterr().err


@pytest.mark.parametrize("key", [True, False], ids=["unreachable", "no-key"])
def test_online_without_a_server_goes_on_offline(tmp_path, backend, monkeypatch, capfd, key):
    monkeypatch.setenv("WANDB_BASE_URL", closed_port())
    if key:
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    start = time.monotonic()
    with opened(WandbTracker(mode="online", timeout_s=2.0), tmp_path) as view:
        for row in ROWS:
            view.log(row)
    assert time.monotonic() - start < 20
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert ("connection refused" if key else "no API key") in err
    assert str(tmp_path) in err
    assert not list(tmp_path.glob("wandb/run-*"))
    sync(backend, *offline_folders(tmp_path))
    (run,) = backend.runs.values()
    assert rows(run.history) == ROWS


def test_server_lost_during_the_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("wandb.apis.public.api.Api._HTTP_TIMEOUT", 1)  # s; 19 as it comes
    with WandbBackend.serve() as backend:
        for name, value in backend.environment.items():
            monkeypatch.setenv(name, value)
        opening = opened(WandbTracker(mode="online", timeout_s=2.0), tmp_path)
        view = opening.__enter__()
    start = time.monotonic()
    for row in ROWS:
        view.log(row)
    view.samples([{"text": "fine", "label": 1}])
    view.finish({"test": {"accuracy": 0.8125}})
    opening.__exit__(None, None, None)
    assert time.monotonic() - start < 20
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    (folder,) = tmp_path.glob("wandb/run-*")
    assert f"wandb sync {folder}" in err


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_nothing_of_the_machine_is_kept(tmp_path, backend, monkeypatch, mode):
    secrets = ["canary-variable", "canary-cluster", "canary-argument", "canary-console", API_KEY]
    monkeypatch.setenv("HF_TOKEN", secrets[0])
    monkeypatch.setenv("SLURM_JOB_NAME", secrets[1])
    monkeypatch.setattr(sys, "argv", ["train.py", secrets[2]])
    for name, value in backend.environment.items():
        monkeypatch.setenv(name, value)
    with opened(WandbTracker(mode=mode), tmp_path, config={"said": "in the config"}) as view:
        print(secrets[3], flush=True)
        view.log(ROWS[0])
    monkeypatch.setattr(sys, "argv", ["pytest"])
    if mode == "offline":
        sync(backend, *offline_folders(tmp_path))
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    (run,) = backend.runs.values()
    sent = repr((run.fields, run.lines, run.files)).encode()
    assert b"in the config" in stored  # the search does find what is there
    assert b"in the config" in sent
    for secret in secrets:
        assert secret.encode() not in stored
        assert secret.encode() not in sent
    assert not run.fields.get("host")
    if mode == "online":  # `wandb sync` sends its own name
        assert run.fields["program"] == "train.py"  # and not where it lies
    assert set(run.files) <= {"config.yaml", "wandb-summary.json"}


def test_charts_are_few_and_the_layers_are_one_table(tmp_path, backend, monkeypatch):
    """Of 37 layers with three norms each there are three charts; nothing is lost."""
    for name, value in backend.environment.items():
        monkeypatch.setenv(name, value)
    layers = [f"bert.encoder.layer.{n}.query" for n in range(37)]
    norms = {
        f"norm/{of}/{layer}": of_n + n / 8
        for of_n, of in enumerate(("A", "B", "relative"))
        for n, layer in enumerate(layers)
    }
    logged = {"step": 10, "train/loss_nats": 0.5, "time/step_s": None, "eval/accuracy": 0.75,
              "eval/n": 1062, **norms}  # fmt: skip
    ranks = dict.fromkeys(layers, 8) | {layers[0]: 3}
    result = {
        "status": "complete",
        "variant": "dora",
        "test": {"accuracy": 0.8125, "n": 1108},
        "time": {"train_s": 2.5, "step_median_s": None},
        "active_rank": ranks,
        "fingerprints": {"data": "da"},
        "rank_history": [{"step": 0, "ranks": []}],
    }
    with opened(WandbTracker(mode="online"), tmp_path) as view:
        view.log(logged)
        view.samples([{"text": "fine"}])
        view.finish(result)
    (run,) = backend.runs.values()
    (row,) = run.history
    assert row["_step"] == 10  # the tables are beside the row
    charts = {key: value for key, value in row.items() if isinstance(value, int | float)}
    assert {key: value for key, value in charts.items() if key[0] != "_"} == {
        "step": 10, "train/loss_nats": 0.5, "eval/accuracy": 0.75,
        "norm/A": 18 / 8, "norm/B": 1 + 18 / 8, "norm/relative": 2 + 18 / 8,
    }  # fmt: skip
    tables = {a.name: json.loads(next(v for k, v in a.files.items() if "table" in k))
              for a in backend.artifacts.values()}  # fmt: skip
    (table,) = [table for name, table in tables.items() if "layers" in name]
    assert table["columns"] == ["layer", "rank", "norm/A", "norm/B", "norm/relative"]
    assert table["data"] == [
        [layer, 8 if n else 3, n / 8, 1 + n / 8, 2 + n / 8] for n, layer in enumerate(layers)
    ]
    numbers = {"status": "complete", "test/accuracy": 0.8125, "test/n": 1108, "time/train_s": 2.5,
               "rank/final": (36 * 8 + 3) / 37, "result_sha256": digest(result)}  # fmt: skip
    assert {key: run.summary[key] for key in numbers} == numbers
    assert not {"variant", "active_rank", "fingerprints"} & set(run.summary)


def test_no_tracking_writes_nothing(tmp_path, monkeypatch):
    def whole_run(tracker: NoTracker) -> None:
        with opened(tracker, tmp_path) as view:
            view.log(ROWS[0])
            view.samples([{"text": "fine"}])
            view.finish({"test": {"accuracy": 0.8125}})
            assert view.where is None

    whole_run(NoTracker())
    monkeypatch.setenv("WANDB_MODE", "disabled")
    whole_run(WandbTracker())
    assert not list(tmp_path.iterdir())


def test_environment_can_only_restrain(tmp_path, backend, monkeypatch):
    for name, value in backend.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with opened(WandbTracker(mode="online"), tmp_path / "a"):
        pass
    end_service()
    monkeypatch.setenv("WANDB_MODE", "online")
    with opened(WandbTracker(mode="offline"), tmp_path / "b"):
        pass
    assert backend.requests == 0
    assert len(list(tmp_path.glob("*/wandb/offline-run-*"))) == 2


def test_import_is_lazy():
    code = "import sys, harness.tracking; sys.exit('wandb' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("offline", WandbTracker(mode="offline")),
        ("wandb", WandbTracker(mode="online")),
        ("none", NoTracker()),
    ],
)
def test_configuration(option, expected):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose(overrides=[f"+tracking={option}"])
    assert instantiate(composed.tracking) == expected


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"mode": "onlin"}, "Did you mean online"),
        ({"mode": "disabled"}, "tracking=none"),
        ({"project": "lab/lora"}, "tracking.project is 'lab/lora'"),
        ({"timeout_s": 0.0}, "must be positive"),
    ],
)
def test_bad_settings(changed, sentence):
    with pytest.raises(ValueError, match=sentence):
        WandbTracker(**changed)


def test_a_service_that_does_not_end_is_killed(tmp_path, capfd):
    with opened(WandbTracker(), tmp_path):
        pass
    service = wandb.setup()._connection._proc._process
    os.kill(service.pid, signal.SIGSTOP)  # as good as dead
    end_service(timeout_s=0.5)
    assert service.returncode == -signal.SIGKILL
    assert "own process did not end" in capfd.readouterr().err
    end_service()  # none to end: nothing said
    assert not capfd.readouterr().err
