"""A study sent to W&B by one command: the real client and wandb-workspaces against a loopback
server, and what arrived read back."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.figure
import pytest
import wandb
from command import CommandLine
from made_multirun import made_runs, write_multirun
from made_study import made_study, write_run_folders
from wandb_backend import API_KEY, WandbBackend

from harness.compare import multirun, plots, wandb_report, wandb_study
from harness.compare.__main__ import main
from harness.compare.analyse import analysed
from harness.compare.load import load_study
from harness.compare.look import Drawing, png
from harness.compare.rows import row
from harness.compare.study import study_text
from harness.compare.wandb_server import Server
from harness.tracking import WandbTracker, end_service

pytest.importorskip("wandb_workspaces")
pytestmark = [
    pytest.mark.long,
    pytest.mark.usefixtures("own_wandb"),
    # A thread of W&B's client may ask its service once more when that was ended by force.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),  # of its artifacts
]
ROOT = Path(__file__).parents[1]
STUDY = made_study(
    arms=("lora", "adalora"), anchors=(), seeds=2, tuning_seeds=1, items=20, steps=60,
    failed=False,
)  # fmt: skip
NUMBER = len(STUDY.runs)


@pytest.fixture
def backend(monkeypatch):
    with WandbBackend.serve() as backend:
        for name, value in backend.environment.items():
            monkeypatch.setenv(name, value)
        yield backend
    assert not backend.unexpected


@pytest.fixture(autouse=True)
def few_figures(monkeypatch):
    """Drawing them all takes longer than sending them."""
    figure = matplotlib.figure.Figure((1, 1))
    pictures = {
        name: plots.Picture(png(Drawing(name, name, name, figure)), f"{name}, n = 2")
        for name in ("forest", "cost_time")
    }
    monkeypatch.setattr(plots, "pictures", lambda analysis: pictures)


@pytest.fixture
def folder(tmp_path) -> Path:
    """The study as it was run; each run has an id of W&B and samples."""
    folder = tmp_path / "made"
    write_run_folders(STUDY, folder)
    (folder / "study.yaml").write_text(study_text(STUDY))
    for number, marker in enumerate(sorted(folder.rglob("run.json"))):
        about = json.loads(marker.read_text()) | {"run_id": f"run-{number}"}
        marker.write_text(json.dumps(about))
        samples = [{"text": f"fine {number}", "label": 1}, {"text": "dull"}]
        marker.with_name("samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
    return folder


@pytest.fixture
def archive(tmp_path) -> Path:
    folder = tmp_path / "archive"
    folder.mkdir()
    (folder / "study.yaml").write_text(study_text(STUDY))
    (folder / "runs.jsonl").write_text("".join(row(run) + "\n" for run in STUDY.runs))
    return folder


def sent(backend: WandbBackend) -> dict[tuple, object]:
    """(arm, phase, seed, rate) -> the run there; the comparison's own left out."""
    return {
        (c["arm"], run.fields["jobType"], c["seed"], c["tuned_lr"]): run
        for run in backend.runs.values()
        if "arm" in (c := run.config)
    }


def rows(history: list[dict]) -> list[dict]:
    """The rows without wandb's own keys and the tables; each is at its own step."""
    assert all(row["_step"] == row["step"] for row in history)
    tables = ("samples", "layers")
    return [{k: v for k, v in row.items() if k[0] != "_" and k not in tables} for row in history]


def charted(run, *, archived: bool) -> list[dict]:
    """The rows that a run's charts are made of, from its record."""
    expected = {}
    for point in run.curve:
        kept = {key: value for key, value in point.items() if key != "eval/n"}
        expected[point["step"]] = kept | ({} if archived else {"time/step_s": 0.5})
    history = run.result.get("rank_history", [])
    for entry in history if archived and len(history) > 1 else ():
        mean = statistics.fmean(entry["ranks"])
        expected.setdefault(entry["step"], {"step": entry["step"]})["rank/mean"] = mean
    return [expected[step] for step in sorted(expected)]


def check(backend: WandbBackend, *, archived: bool) -> None:
    """Every run is there once and whole."""
    found = sent(backend)
    assert len(found) == NUMBER
    assert len(backend.runs) == NUMBER + 1
    for run in STUDY.runs:
        there = found[run.arm, run.phase, run.seed, run.result["lr"]]
        expected = charted(run, archived=archived)
        assert rows(there.history) == [pytest.approx(row) for row in expected]
        assert there.exit_code == (0 if run.complete else 1)
        assert there.fields["groupName"] == "made"
        assert there.fields["displayName"] == f"{run.arm}-s{run.seed}-{run.result['run_key'][:8]}"
        assert there.fields["tags"][0] == run.result["variant"]
        assert there.config["study"] == "made"
        assert there.config["variant"] == run.config["variant"]
        assert there.summary["status"] == run.result["status"]
        if run.complete:
            assert there.summary["test/accuracy"] == run.result["test"]["accuracy"]
            assert there.summary["time/train_s"] == run.result["time"]["train_s"]


def links(out: str) -> list[str]:
    return [line.partition(": ")[2] for line in out.splitlines() if line.startswith("W&B ")]


# ---- sending -------------------------------------------------------------------------------------


def test_a_study_is_sent_whole_and_once(folder, backend, capsys):
    main([str(folder), "--wandb"])
    out = capsys.readouterr().out
    assert f"W&B: {NUMBER} runs sent, 0 there already" in out
    report, workspace = links(out)
    assert report.startswith(f"{backend.url}/me/lora-variants/reports/made--")
    assert workspace.startswith(f"{backend.url}/me/lora-variants?nw=")
    check(backend, archived=False)
    names = {artifact.name for artifact in backend.artifacts.values()}
    assert len([name for name in names if "samples" in name]) == NUMBER
    (comparison,) = [r for r in backend.runs.values() if r.fields["jobType"] == "comparison"]
    (forest,) = [name for name in comparison.files if "figures/forest" in name]
    assert comparison.files[forest].startswith(b"\x89PNG")

    requests, kept = backend.requests, [len(run.history) for run in backend.runs.values()]
    main([str(folder), "--wandb"])  # nothing is lacking: the views are saved again, no run is
    out = capsys.readouterr().out
    assert f"W&B: 0 runs sent, {NUMBER} there already" in out
    assert links(out) == [report, workspace]
    assert [len(run.history) for run in backend.runs.values()] == kept
    assert backend.requests - requests < 40
    assert len(backend.views) == 2


def test_an_archive_is_made_again_and_its_runs_are_those_of_the_folder(
    folder, archive, backend, capsys
):
    before = {path: path.read_bytes() for path in archive.iterdir()}
    main([str(archive), "--wandb", "lab/theirs"])
    assert "W&B: " in capsys.readouterr().out
    check(backend, archived=True)
    assert {(r.fields["entity"], r.fields["project"]) for r in backend.runs.values()} == {
        ("lab", "theirs")
    }
    assert {path: path.read_bytes() for path in archive.iterdir()} == before
    main([str(folder), "--wandb", "lab/theirs"])
    assert f"W&B: 0 runs sent, {NUMBER} there already" in capsys.readouterr().out
    assert len(backend.runs) == NUMBER + 1


def test_offline_runs_are_synced_and_not_once_more_by_hand(folder, backend, capsys):
    paths = [marker.parent for marker in sorted(folder.rglob("run.json"))][:2]
    for path in paths:
        run_id = json.loads((path / "run.json").read_text())["run_id"]
        about = {"name": path.name, "group": "made", "job_type": "train", "tags": ["x"]}
        with WandbTracker().open(run_dir=path, run_id=run_id, config={"a": 1}, **about) as view:
            view.log({"step": 10, "train/loss_nats": 1.0})
    main([str(folder), "--wandb"])
    check(backend, archived=False)
    offline = [*folder.glob("*/wandb/offline-run-*")]
    assert len(offline) == 2
    subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *map(str, offline)],
        cwd=os.environ["HOME"], check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    check(backend, archived=False)


def test_runs_that_were_tracked_online_get_their_arm(folder, backend, capsys):
    """The loop knows the variant, and not which arm of which study it runs for."""
    path = sorted(folder.rglob("run.json"))[0].parent
    history = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    about = {"name": path.name, "group": "made", "job_type": "train", "tags": ["x"]}
    config = {"arm": "other", "seed": 5, "tuned_lr": 1}
    online = WandbTracker(mode="online")
    with online.open(run_dir=path, run_id="run-0", config=config, **about) as view:
        for logged in history:
            view.log(logged)
        view.samples([{"text": "fine"}])
        view.finish(json.loads((path / "result.json").read_text()))
    assert backend.runs["run-0"].config["arm"] == "other"
    for _ in range(2):
        main([str(folder), "--wandb"])
        check(backend, archived=False)
        assert backend.runs["run-0"].config["study"] == "made"


def test_two_studies_that_share_runs_leave_each_other_alone(tmp_path, backend, capsys):
    """Of the four runs of the first multirun, one was tracked online and two are the second's."""
    folder, runs = tmp_path / "default", made_runs({"rank": [1, 4]}, lambda rank: 0.7, seeds=2)
    write_multirun(folder, runs, ["rank"], name="one", started="1")
    (first,) = multirun.read_all(folder)
    shared = first.members[1:3]
    multirun.write(folder, dataclasses.replace(first, name="two", started="2", members=shared))
    for marker in folder.rglob("run.json"):
        about = json.loads(marker.read_text()) | {"run_id": marker.parent.name}
        marker.write_text(json.dumps(about))
    tracked = sorted(marker.parent.name for marker in folder.rglob("run.json"))[0]
    about = {"name": "a", "group": "default", "job_type": "train", "tags": [], "config": {}}
    online = WandbTracker(mode="online")
    with online.open(run_dir=folder / tracked, run_id=tracked, **about):
        pass

    def send(name: str) -> dict:
        main([str(folder), "--multirun", name, "--wandb"])
        found = {}
        for run_id, run in backend.runs.items():
            group, kind = run.fields["groupName"], run.fields["jobType"]
            found.setdefault((group, kind), {})[run_id] = dict(run.fields)
        return found

    before = send("one")
    said = capsys.readouterr().out
    assert "4 runs sent" in said and tracked in before["default-one", "compare"]
    views, pictures = dict(backend.views), before["default-one", "comparison"]
    after = send("two")
    said, other = capsys.readouterr().out, links(said)
    assert "2 runs sent" in said and not set(links(said)) & set(other)
    assert {group: len(found) for group, found in after.items()} == {
        ("default-one", "compare"): 4, ("default-one", "comparison"): 1,
        ("default-two", "compare"): 2, ("default-two", "comparison"): 1,
    }  # fmt: skip
    assert after["default-one", "compare"] == before["default-one", "compare"]
    assert after["default-one", "comparison"] == pictures
    assert views.items() < backend.views.items() and len(backend.views) == 4
    for name in ("one", "two"):
        send(name)
        assert "W&B: 0 runs sent" in capsys.readouterr().out


def test_killed_midway_it_goes_on(folder, backend):
    process = subprocess.Popen(
        [sys.executable, "-m", "harness.compare", str(folder), "--wandb"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(backend.runs) < 4:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # the client's own process too
    process.wait()
    time.sleep(0.5)  # what is on its way arrives
    assert len(backend.runs) < NUMBER
    unfinished = [run for run in backend.runs.values() if run.exit_code is None]
    main([str(folder), "--wandb"])
    check(backend, archived=False)
    assert unfinished
    assert all(run.exit_code is not None for run in unfinished)


def test_runs_that_are_no_longer_of_the_study_are_named(folder, backend, capsys):
    main([str(folder), "--wandb"])
    fewer = dataclasses.replace(STUDY, seeds=STUDY.seeds[:1], expected=[
        run for run in STUDY.expected if run["seed"] != STUDY.seeds[1]
    ])  # fmt: skip
    (folder / "study.yaml").write_text(study_text(fewer))
    main([str(folder), "--wandb"])
    assert "W&B: 2 runs of the group made are not of this study any more" in capsys.readouterr().out


def test_the_commands_of_the_page_run(folder, archive, backend, capsys):
    page = (ROOT / "docs/wandb.md").read_text(encoding="utf-8")
    tested = r"<!-- tested by tests/test_wandb_study.py -->\n```\n(.*?)```"
    commands = re.findall(tested, page, re.DOTALL)[0].splitlines()
    places = {"outputs/default": folder, "results/2026-11-22_aa": archive}
    assert (ROOT / "results/2026-11-22_aa/runs.jsonl").is_file()
    for command in commands:
        words = shlex.split(command, comments=True)
        assert words[:3] == ["python", "-m", "harness.compare"]
        main([str(places.pop(words[3], folder)), *words[4:]])
        assert len(links(capsys.readouterr().out)) == 2, command
    assert not places
    targets = {(view["entityName"], view["projectName"]) for view in backend.views.values()}
    assert targets == {("me", "lora-variants"), ("my-team", "lora")}


# ---- the views, read back ------------------------------------------------------------------------


def test_the_report_reads_back_block_by_block(folder, backend, capsys):
    import wandb_workspaces.reports.v2 as wr

    main([str(folder), "--wandb"])
    report, _ = links(capsys.readouterr().out)
    there = wr.Report.from_url(report)
    analysis = analysed(load_study(folder))
    figures = list(plots.pictures(analysis))
    ours = wandb_report.report(analysis, figures, entity="me", project="lora-variants")
    assert (there.title, there.description) == (ours.title, ours.description)
    assert (there.entity, there.project) == ("me", "lora-variants")
    assert len(there.blocks) == len(ours.blocks)

    def plain(block) -> dict:
        """A block as it is sent, without the names that the client draws."""
        text = json.dumps(block._to_model().model_dump(by_alias=True, mode="json"))
        content = json.loads(text)
        for grid in [content["metadata"]] if content["type"] == "panel-grid" else []:
            for run_set in grid["runSets"]:
                text = text.replace(run_set["id"], "run set")
            for panel in grid["panelBankSectionConfig"]["panels"]:
                text = text.replace(panel["__id__"], "panel")
        return json.loads(text)

    for theirs, block in zip(there.blocks, ours.blocks, strict=True):
        assert type(theirs) is type(block)
        assert plain(theirs) == plain(block)


def test_the_workspace_reads_back(folder, backend, capsys):
    import wandb_workspaces.expr as expr
    import wandb_workspaces.workspaces as ws

    main([str(folder), "--wandb"])
    _, workspace = links(capsys.readouterr().out)
    there = ws.Workspace.from_url(workspace)
    assert there.name == "made"
    assert there.runset_settings.groupby == [expr.Config("arm")]
    assert set(there.runset_settings.group_colors) == set(STUDY.arms)
    assert [section.name for section in there.sections] == [
        "Scores", "Learning", "Costs", "Ranks and norms",
    ]  # fmt: skip
    assert there.auto_generate_panels is False


def test_a_draft_stays_private_until_it_is_saved_without(folder, backend, capsys):
    def kinds() -> list[str]:
        return sorted(view["type"] for view in backend.views.values())

    for _ in range(2):
        main([str(folder), "--wandb-draft"])
        assert kinds() == ["project-view", "runs/draft"]
    main([str(folder), "--wandb"])
    assert kinds() == ["project-view", "runs"]


# ---- without a server ----------------------------------------------------------------------------


def closed_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def refused(*arguments: str) -> str:
    """The sentence that a command ends with."""
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    assert isinstance(ended.value.code, str)
    assert "\n" not in ended.value.code
    return ended.value.code


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "no API key"),
        ({"WANDB_MODE": "offline"}, "(WANDB_MODE is offline); to send it from here: unset WANDB"),
        ({"WANDB_MODE": "disabled"}, "(WANDB_MODE is disabled); to send it from here: unset WANDB"),
        ({"WANDB_BASE_URL": "", "WANDB_API_KEY": API_KEY}, "did not answer within 1 s"),
    ],
)
def test_without_a_server_a_sentence_and_a_bundle_that_is_sent_elsewhere(
    folder, tmp_path, monkeypatch, environment, said
):
    monkeypatch.setattr(wandb_study, "TIMEOUT_S", 1.0)
    for name, value in environment.items():
        monkeypatch.setenv(name, value or closed_port())
    sentence = refused(str(folder), "--wandb", "lab/ours")
    assert said in sentence
    accounts = [word in sentence for word in ("`wandb login`", "WANDB_BASE_URL")]
    assert accounts == ["WANDB_MODE" not in environment] * 2
    bundle = folder / "wandb_bundle/made"
    assert sentence.endswith(f"python -m harness.compare {bundle} --wandb lab/ours")
    if environment:
        return
    moved = Path(shutil.move(bundle, tmp_path / "elsewhere"))
    shutil.rmtree(folder)
    assert str(moved) in refused(str(moved), "--wandb")  # a bundle is not bundled again
    end_service()
    with WandbBackend.serve() as backend:
        for name, value in backend.environment.items():
            monkeypatch.setenv(name, value)
        main([str(moved), "--wandb"])
        check(backend, archived=False)
        assert len([a for a in backend.artifacts.values() if "samples" in a.name]) == NUMBER
        assert not backend.unexpected


def test_a_printed_command_is_one_for_a_shell(tmp_path, folder):
    folder = folder.rename(tmp_path / "my runs")
    sentence = refused(str(folder), "--wandb")
    command = ["python", "-m", "harness.compare", f"{folder}/wandb_bundle/made", "--wandb"]
    assert shlex.split(sentence.rpartition(" by: ")[2]) == command


def test_an_archive_is_its_own_bundle(archive):
    before = sorted(archive.iterdir())
    assert f"python -m harness.compare {archive} --wandb" in refused(str(archive), "--wandb")
    assert sorted(archive.iterdir()) == before


def test_a_server_that_is_lost_midway_is_a_sentence(folder, backend, monkeypatch):
    monkeypatch.setattr(wandb_study, "TIMEOUT_S", 2.0)
    send, sent_before = Server.send, []

    def lost(self, run, *rest):
        if len(sent_before) == 3:
            end_service()
            monkeypatch.setenv("WANDB_BASE_URL", closed_port())
        sent_before.append(run)
        return send(self, run, *rest)

    monkeypatch.setattr(Server, "send", lost)
    start = time.monotonic()
    sentence = refused(str(folder), "--wandb")
    assert time.monotonic() - start < 60
    assert "W&B stopped answering" in sentence
    assert f"of {NUMBER} runs; the same command goes on from there" in sentence


def test_a_server_that_never_says_that_it_has_all_is_a_sentence(folder, backend, monkeypatch):
    finish = wandb.Run.finish

    def never(run, exit_code):
        finish(run, exit_code=exit_code)  # or its threads would outlast the test
        raise TimeoutError("Timed out finishing run.")

    monkeypatch.setattr(wandb.Run, "finish", never)
    sentence = refused(str(folder), "--wandb")
    assert "W&B stopped answering (Timed out finishing run) after 0 of" in sentence


@pytest.mark.parametrize("target", ["a/b/c", "/b", "a/", "lab/what?"])
def test_a_target_that_is_none_is_a_sentence(folder, target):
    assert refused(str(folder), "--wandb", target).startswith("error: ")


# ---- by itself, at the end -----------------------------------------------------------------------


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


def test_a_multirun_names_the_command_and_with_wandb_ends_with_the_link(cli, backend):
    two = ("-m", "hydra/launcher=processes", "variant=lora,dora", "train.steps=4")
    assert cli(*two, "tracking=offline") == 0, cli.err
    folder = cli.root / "outputs/default"
    (record,) = multirun.read_all(folder)
    command = f"python -m harness.compare {folder} --multirun {record.name} --wandb"
    assert cli.out.splitlines().count(f"W&B: {command}") == cli.out.count("varied: ") == 1
    assert not backend.requests

    assert cli(*two, "tracking=wandb") == 0, cli.err  # finished they are; not yet there
    report, workspace = links(cli.out)
    assert report.startswith(backend.url)
    assert workspace.startswith(backend.url)
    arms = {run.config["arm"]: run for run in backend.runs.values() if "arm" in run.config}
    assert set(arms) == {"lora", "dora"}
    assert {run.fields["jobType"] for run in arms.values()} == {"compare"}
    assert {run.fields["groupName"] for run in arms.values()} == {f"default-{record.name}"}
    for run in arms.values():
        assert len({key for row in run.history for key in row if key.startswith("norm/")}) <= 4
        assert run.summary["layers"]["_type"] == "table-file"
        assert "test/accuracy" in run.summary


def test_a_multirun_is_sent_once_and_a_diverged_run_is_one_of_it(cli, backend):
    """Its jobs run in this process, and are online."""
    sweep = ("-m", "variant.lr=1e-3,1e30", "tracking=wandb", "train.steps=4", "train.eval_every=4")
    assert cli(*sweep) == 1, cli.out
    assert cli.out.count("W&B report: ") == cli.out.count("varied: ") == 1
    arms = [run for run in backend.runs.values() if run.fields["jobType"] == "compare"]
    assert sorted(run.summary["status"] for run in arms) == ["complete", "failed"]
    assert len(backend.runs) == 3


def test_a_study_with_wandb_ends_with_the_link(cli, backend):
    """Its runs were online while they ran: they are the ones that get their arm."""
    given = ("-m", "hydra/sweeper=fair", "variant=lora,dora", "seed=0,1", "hydra.sweeper.tune={}")
    assert cli(*given, "tracking=wandb", "train.steps=4") == 0, cli.err
    assert len(links(cli.out)) == 2
    runs = [run for run in backend.runs.values() if "arm" in run.config]
    assert len(runs) == 4
    assert {run.fields["jobType"] for run in runs} == {"compare"}


def test_a_study_whose_report_cannot_be_saved_is_a_warning(folder, monkeypatch, capsys):
    monkeypatch.setattr(wandb_study, "TIMEOUT_S", 1.0)
    analysis = analysed(load_study(folder))
    wandb_study.at_end(folder, {"mode": "online"}, lambda: analysis)
    assert capsys.readouterr().err.count("Warning: nothing was sent to W&B") == 1
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb_study.at_end(folder, {"mode": "online"}, lambda: analysis)
    assert capsys.readouterr().out == f"W&B: python -m harness.compare {folder} --wandb\n"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb_study.at_end(folder, {"mode": "online"}, lambda: analysis)
    wandb_study.at_end(folder, {}, lambda: analysis)
    assert capsys.readouterr() == ("", "")
