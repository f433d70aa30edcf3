"""A multirun in processes: what is started, what is said, and that nothing is left behind."""

import contextlib
import io
import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest
from command import CommandLine
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from harness.config.identity import run_key
from harness.disk import inputs, locks
from harness.study import pool as pools
from harness.study import screen
from harness.study.index import RunIndex
from harness.study.pool import Job, LaunchSettings, Pool, differing, log_name

ROOT = Path(__file__).parent.parent
CONFIG = {
    "seed": 0, "run_dir": None, "free": [], "variant": {"name": "x"},
    "train": {"steps": 8, "threads": 1, "device": "cpu"},
}  # fmt: skip
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [("n_jobs", 0), ("n_jobs", True), ("n_jobs", "two"), ("threads", -1), ("threads", 1.5),
     ("gpus", []), ("gpus", 0), ("gpus", [-1]), ("gpus", [True]), ("gpus", ["0,1"]),
     ("on_error", "halt"), ("on_error", None)],
)  # fmt: skip
def test_a_wrong_setting_is_refused_in_a_sentence(key, value):
    with pytest.raises(ValueError, match=rf"hydra\.launcher\.{key} is .*; it must be .*\.$"):
        LaunchSettings(**{key: value})


def test_threads_are_divided_among_the_jobs(monkeypatch):
    monkeypatch.setattr(pools, "cores", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def given(**settings):
        one = LaunchSettings(**settings)
        return one.at_once("auto"), one.threads_each("auto")

    assert given() == (8, 1)
    assert given(n_jobs=3) == (3, 2)
    assert given(n_jobs=16) == (16, 1)
    assert given(gpus=[0, "GPU-1f"]) == (2, 4)
    assert given(gpus=[0, 1], n_jobs=4) == (4, 2)
    assert given(n_jobs=2, threads=3) == (2, 3)
    assert given(n_jobs=2, threads=0) == (2, None)


# ---- names ---------------------------------------------------------------------------------------


def test_a_job_is_called_by_what_tells_it_from_the_others():
    assert differing([["m=a", "x=1", "s=0"], ["m=a", "x=1", "s=1"], ["m=a", "s=1"]]) == [
        "x=1 s=0",
        "x=1 s=1",
        "s=1",
    ]
    assert differing([["m=a", "x=1"]]) == ["m=a x=1"]
    assert differing([["m=a"], ["m=a"]]) == ["m=a", "m=a"]
    assert differing([[]]) == ["no overrides"]
    assert differing([["x=\x1b[31mred\nline"], ["x=1"]])[0] == "x=red line"


def test_a_log_has_a_name_that_every_system_takes():
    assert log_name(7, "variant=dora seed=1") == "007_variant=dora_seed=1.log"
    assert log_name(0, "a=../../etc/b:*?'\"") == "000_a=.._.._etc_b.log"
    long, longer = log_name(1, "x=" + "é" * 300), log_name(1, "x=" + "y" * 301)
    assert re.fullmatch(r"[\w.=+-]{1,100}", longer, re.ASCII) and long != longer
    assert log_name(1, "x=" + "y" * 300) != longer


def test_progress_is_read_from_the_end_and_half_a_line_is_no_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert pools.progress(path) is None
    path.write_text("")
    assert pools.progress(path) is None
    rows = [{"step": s, "train/loss_nats": 1 / s, "norm": "x" * 5000} for s in range(1, 200)]
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 200, "eval/accuracy": 1}\n{"st'
    )
    assert pools.progress(path) == (200, 1 / 199)
    path.write_text('{"step": 5, "rank/total": 3}\n')
    assert pools.progress(path) == (5, None)


# ---- the pool, with small scripts ----------------------------------------------------------------


class Terminal(io.StringIO):
    """The lines that a terminal would show: lines, with ESC[nF and ESC[J carried out."""

    def isatty(self) -> bool:
        return True

    def shown(self) -> list[list[str]]:
        """The lines after each write."""
        lines: list[str] = [""]
        frames = []
        for write in self.writes:
            for part in re.split(r"(\x1b\[\d*[FJ]|\n)", write):
                if up := re.fullmatch(r"\x1b\[(\d+)F", part):
                    at = len(lines) - 1 - int(up[1])
                    assert at >= 0
                elif part == "\x1b[J":
                    lines = [*lines[:at], ""]
                elif part == "\n":
                    lines.append("")
                else:
                    assert "\x1b" not in part
                    lines[-1] += part
            frames.append(lines[:-1])
            lines = [*lines]
        return frames

    def __init__(self):
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return len(text)


@pytest.fixture
def pool(tmp_path):
    """Run Python snippets, or whole Jobs, as jobs; returns (outcomes, what was printed, pool)."""

    def run(*scripts, stream=None, at_once=2, **settings):
        def prepare(index):
            script = scripts[index]
            if isinstance(script, Job):
                return script
            return Job(command=[sys.executable, "-c", script], log=tmp_path / f"{index}.log")

        stream = stream or io.StringIO()
        labels = [f"job={index}" for index in range(len(scripts))]
        made = Pool(labels, prepare, at_once=at_once, stream=stream, **settings)
        return made.run(), stream.getvalue(), made

    return run


def states(outcomes) -> str:
    return " ".join(outcome.state for outcome in outcomes)


def test_only_so_many_run_at_a_time(pool, tmp_path):
    script = (
        "import pathlib, time, uuid; here = pathlib.Path({!r}); mine = here / uuid.uuid4().hex;"
        "mine.touch(); time.sleep(0.3); print(len(list(here.iterdir()))); mine.unlink()"
    ).format(str(tmp_path / "alive"))
    (tmp_path / "alive").mkdir()
    outcomes, text, _ = pool(*[script] * 5, at_once=2)
    assert states(outcomes) == "done done done done done"
    counts = {(tmp_path / f"{i}.log").read_text().splitlines()[-1] for i in range(5)}
    assert counts == {"2", "1"} or counts == {"2"}
    assert text.splitlines()[-1].startswith("5 done in 0:00:0")
    assert "[3/5] running  job=2" in text and "[3/5] done     job=2  0:00:0" in text


def test_a_failed_job_shows_the_end_of_its_log_and_a_command_that_repeats_it(pool, tmp_path):
    script = "import sys; [print(f'line \"{n}\" $HOME \\x1b[2J') for n in range(40)]; sys.exit(7)"
    outcomes, text, _ = pool(script, "print('fine')")
    assert states(outcomes) == "failed done" and outcomes[0].reason == "exit code 7"
    shown = [line.strip() for line in text.splitlines() if line.startswith("    | ")]
    assert shown == [f'| line "{n}" $HOME' for n in range(25, 40)]
    assert f"log: {tmp_path / '0.log'}" in text
    again = subprocess.run(outcomes[0].rerun, shell=True, capture_output=True, text=True)
    assert again.returncode == 7 and 'line "39" $HOME' in again.stdout
    assert text.count(outcomes[0].rerun) == 2  # at once, and at the end
    assert (tmp_path / "0.log").read_text().splitlines()[0] == f"$ {outcomes[0].rerun}"
    assert "1 done, 1 failed in" in text


def test_stop_on_error_ends_the_others(pool):
    slow = "import time; time.sleep(60)"
    began = time.monotonic()
    outcomes, text, _ = pool("raise SystemExit(1)", slow, slow, slow, stop_on_error=True)
    assert states(outcomes) == "failed stopped stopped stopped"
    assert "1 failed, 3 stopped" in text and time.monotonic() - began < 30


def test_a_job_that_ignores_sigterm_is_killed(pool, monkeypatch):
    monkeypatch.setattr(pools, "GRACE_S", 0.5)
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    outcomes, *_ = pool("import time; time.sleep(0.5); 1/0", deaf, stop_on_error=True)
    assert states(outcomes) == "failed stopped"


def test_a_killed_job_is_said_to_be_killed(pool):
    outcomes, text, _ = pool("import os; os.kill(os.getpid(), 9)")
    assert outcomes[0].reason in text and "out of memory" in outcomes[0].reason


def test_gpus_and_variables_reach_the_jobs(pool, tmp_path):
    script = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS'])"
    jobs = [
        Job(
            command=[sys.executable, "-c", f"import time; time.sleep(0.2); {script}"],
            environment={"OMP_NUM_THREADS": "3"},
            log=tmp_path / f"{index}.log",
        )
        for index in range(4)
    ]
    outcomes, *_ = pool(*jobs, at_once=2, gpus=[5, 7])
    said = [(tmp_path / f"{i}.log").read_text().splitlines() for i in range(4)]
    assert states(outcomes) == "done done done done"
    assert sorted(lines[-1] for lines in said) == ["5 3", "5 3", "7 3", "7 3"]
    assert all(lines[0].startswith(f"$ CUDA_VISIBLE_DEVICES={lines[-1][0]} ") for lines in said)


def kept(
    folder: Path, config: dict, result: dict | None, files: Sequence[Path] | None = ()
) -> None:
    """A run's folder, as far as a launcher looks at it."""
    folder.mkdir(parents=True)
    about = {"run_key": run_key(config), "config": config, "inputs": inputs.record(files)}
    (folder / "run.json").write_text(json.dumps(about))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))


SCORES = {"accuracy": 0.75, "macro_f1": 0.75, "loss_nats": 0.5}
_SAID = {"variant": "lora", "seed": 0, "lr": 1e-3, "run_key": "k", "control_hash": "c",
         "fingerprints": {"data": "d"}}  # fmt: skip
COMPLETE = {
    **_SAID, "status": "complete", "test": SCORES, "validation": SCORES, "steps": 3,
    "parameters": {"trainable": 2, "trainable_final": 2},
    "time": {"train_s": 1.0, "step_median_s": 0.3, "tokens_per_s": 9.0},
    "memory": {"train_peak_bytes": 9, "base_bytes": 3},
}  # fmt: skip
DIVERGED = {**_SAID, "status": "failed", "failure": "NonFiniteLoss", "reason": "loss nan at step 3"}


def test_of_several_runs_the_one_that_finished_last_is_found(tmp_path):
    for name, when in (("a", 20), ("b", 30), ("c", 10)):
        kept(tmp_path / name, CONFIG, {**COMPLETE, "name": name})
        os.utime(tmp_path / name / "result.json", (when, when))
    kept(tmp_path / "unfinished", CONFIG, None)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/run.json").write_text("no JSON")
    for name, text in (("null", "null"), ("three", '{"config": 3}'), ("none", '{"config": {}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    for name, text in (("empty", ""), ("list", "[]"), ("object", "{}")):
        kept(tmp_path / name, CONFIG, None)
        (tmp_path / name / "result.json").write_text(text)
    found = RunIndex(tmp_path).find(CONFIG)
    assert found and found.result and found.result["name"] == "b"


def test_a_run_of_other_threads_or_another_device_is_another_one(tmp_path):
    """A setting that a job leaves open until it starts fits any; so a launcher asks."""

    def asked(**changes):
        return {**CONFIG, "train": {**CONFIG["train"], **changes}}

    kept(tmp_path / "a", CONFIG, COMPLETE)
    runs = RunIndex(tmp_path)
    for fitting in ({}, {"threads": None}, {"device": "auto"}, {"threads": None, "device": "auto"}):
        assert runs.find(asked(**fitting)), fitting
    for other in ({"threads": 2}, {"device": "cuda"}, {"threads": None, "device": "cuda"}):
        assert runs.find(asked(**other)) is None, other
    assert runs.find({**CONFIG, "run_dir": "elsewhere"}) is None


@pytest.mark.parametrize("code", [0, 1])
@pytest.mark.parametrize("result", [COMPLETE, DIVERGED], ids=["complete", "diverged"])
def test_a_job_that_fails_after_its_result_has_failed(pool, tmp_path, result, code):
    """A divergence ends with exit code 1 as well, and has said so in its result."""
    place, key = str(tmp_path / "runs/a"), run_key(CONFIG)
    script = (
        f"import json, pathlib; place = pathlib.Path({place!r}); place.mkdir(parents=True);"
        f"about = {{'run_key': {key!r}, 'config': {CONFIG!r}}};"
        "(place / 'run.json').write_text(json.dumps(about));"
        f"(place / 'result.json').write_text(json.dumps({result!r})); raise SystemExit({code})"
    )
    runs = RunIndex(tmp_path / "runs")
    job = Job(
        command=[sys.executable, "-c", script], log=tmp_path / "a.log", config=CONFIG, runs=runs
    )
    (outcome,), *_ = pool(job, divergence_fails=False)
    diverged = "diverged" if result is DIVERGED else None
    assert outcome.state == (diverged or ("failed" if code else "done"))
    assert ("exit code" in outcome.reason) == (outcome.state == "failed")


def test_a_score_has_its_metrics_name(pool, tmp_path):
    scores = {"loss_nats": 0.5, "phoneme_error_rate": 0.25}
    metric = {"higher_is_better": False, "chance": 1.0, "per_item": False}
    result = {**COMPLETE, "primary_metric": "phoneme_error_rate", "test": scores,
              "validation": scores, "metrics": dict.fromkeys(scores, metric)}  # fmt: skip
    kept(tmp_path / "runs" / "a", CONFIG, result)
    runs = RunIndex(tmp_path / "runs")
    job = Job(command=["no such"], log=tmp_path / "a.log", config=CONFIG, runs=runs)
    _, text, _ = pool(job)
    assert "test phoneme error rate 0.2500" in text


@pytest.mark.parametrize("place", ["file", "/proc/nothing"])
def test_a_log_that_cannot_be_written_fails_one_job(pool, tmp_path, place):
    (tmp_path / "file").write_text("")
    log = tmp_path / place / "x.log"  # an absolute place stands alone
    quick = [sys.executable, "-c", "pass"]
    jobs = [Job(command=quick, log=log), Job(command=quick, log=tmp_path / "logs/b.log")]
    outcomes, text, _ = pool(*jobs)
    assert [outcome.state for outcome in outcomes] == ["failed", "done"], text
    assert str(log.parent) in outcomes[0].reason and "Traceback" not in text


def test_what_a_sweeper_is_told_of_a_diverged_run():
    from hydra_plugins.processes_launcher import _score

    failed = {"status": "failed", "failure": "NonFiniteLoss", "reason": "nan"}
    metric = {"higher_is_better": False, "chance": 1.0, "per_item": False}
    stated = {"metrics": {"error_rate": metric}, "primary_metric": "error_rate"}
    assert _score({**failed, "classes": 4}) == 0.25  # of an older run, which stated none
    assert _score({**failed, **stated}) == 1.0
    assert _score({**failed, "classes": None}) is None and _score(None) is None


def test_a_finished_run_is_not_started(pool, tmp_path):
    """Complete: skipped. Diverged: a failure, or an outcome if the caller says so. Unfinished, or
    forced: run."""
    jobs = []
    for seed, result in enumerate([COMPLETE, DIVERGED, None, COMPLETE]):
        config = {**CONFIG, "seed": seed}
        kept(tmp_path / "runs" / str(seed), config, result)
        jobs.append(
            Job(
                command=[sys.executable, "-c", "print('ran')"],
                log=tmp_path / f"{seed}.log",
                config=config,
                runs=RunIndex(tmp_path / "runs"),
                force=seed == 3,
            )
        )
    outcomes, text, _ = pool(*jobs)
    assert states(outcomes) == "skipped failed done done"
    assert [(tmp_path / f"{seed}.log").exists() for seed in range(4)] == [False, False, True, True]
    assert "skipped  job=0  test accuracy 0.7500" in text
    assert "failed   job=1  diverged earlier: loss nan at step 3" in text
    assert outcomes[1].rerun.endswith(" force=true")
    outcomes, text, _ = pool(*jobs, divergence_fails=False, stop_on_error=True)
    assert states(outcomes) == "skipped diverged done done"


def test_a_forced_job_that_fails_is_not_judged_by_the_result_it_was_to_replace(pool, tmp_path):
    kept(tmp_path / "runs/a", CONFIG, DIVERGED)
    os.utime(tmp_path / "runs/a/result.json", (1, 1))
    job = Job(
        command=[sys.executable, "-c", "raise SystemExit(2)"],
        log=tmp_path / "log",
        config=CONFIG,
        runs=RunIndex(tmp_path / "runs"),
        force=True,
    )
    outcomes, *_ = pool(job, divergence_fails=False)
    assert states(outcomes) == "failed" and outcomes[0].reason == "exit code 2"


def test_a_new_result_is_told_from_the_earlier_one_whatever_the_clock_says(pool, tmp_path):
    """Set back while the job runs: the file that takes the other's place is dated before it."""
    kept(tmp_path / "runs/a", CONFIG, {**COMPLETE, "test": {"accuracy": 0.25}})
    old, new = tmp_path / "runs/a/result.json", tmp_path / "runs/a/new"
    script = (
        f"import os; open({str(new)!r}, 'w').write({json.dumps(COMPLETE)!r}); "
        f"os.utime({str(new)!r}, (1, 1)); os.replace({str(new)!r}, {str(old)!r})"
    )
    job = Job(
        command=[sys.executable, "-c", script],
        log=tmp_path / "log",
        config=CONFIG,
        runs=RunIndex(tmp_path / "runs"),
        force=True,
    )
    outcomes, text, _ = pool(job)
    assert states(outcomes) == "done" and "test accuracy 0.7500" in text


def test_a_run_on_other_files_is_asked_and_not_passed_over(pool, tmp_path):
    """Only the run can say whether its result stands: it is started."""
    data = tmp_path / "data.csv"
    data.write_text("one\n")
    kept(tmp_path / "runs/a", CONFIG, COMPLETE, files=[data])
    says = "raise SystemExit('error: the data changed since it was begun')"

    def job(script: str) -> Job:
        return Job(
            command=[sys.executable, "-c", script],
            log=tmp_path / "log",
            config=CONFIG,
            runs=RunIndex(tmp_path / "runs"),
        )

    assert states(pool(job(says))[0]) == "skipped"
    times = data.stat()
    data.write_text("two\n")
    os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))  # its size is the same, too
    outcomes, text, _ = pool(job(says))
    assert states(outcomes) == "failed" and "    | error: the data changed since" in text
    outcomes, text, _ = pool(job("print('complete already')"))  # which found it to be the same
    assert states(outcomes) == "skipped" and "0.7500" in text


@pytest.mark.parametrize("place", ["archived/a", "it's here, ${HOME}"])
def test_a_finished_run_is_asked_where_it_is_kept(pool, tmp_path, place):
    """Without a record of its files only the run can say that its result stands: it is told where
    that is, and does not train again elsewhere."""
    kept(tmp_path / "runs" / place, CONFIG, COMPLETE, files=None)
    script = "import sys; print('told', *sys.argv[1:])"
    job = Job(
        command=[sys.executable, "-c", script],
        log=tmp_path / "log",
        config=CONFIG,
        runs=RunIndex(tmp_path / "runs"),
    )
    assert states(pool(job)[0]) == "skipped"
    *_, told = (tmp_path / "log").read_text().splitlines()
    given = OverridesParser.create().parse_override(told.removeprefix("told "))
    config = OmegaConf.create({"run_dir": None})
    OmegaConf.update(config, given.key_or_group, given.value())
    assert config.run_dir == str(tmp_path / "runs" / place)


@linux
def test_two_hundred_jobs_leave_no_descriptor_open(tmp_path):
    """In the launcher, and in what it starts."""
    opened = []

    def prepare(index: int) -> Job:
        opened.append(len(os.listdir("/proc/self/fd")))
        return Job(command=["/bin/sh", "-c", "ls /proc/self/fd | wc -l"], log=tmp_path / f"{index}")

    before = len(os.listdir("/proc/self/fd"))
    pool = Pool([str(i) for i in range(200)], prepare, at_once=8, stream=io.StringIO())
    assert {outcome.state for outcome in pool.run()} == {"done"}
    assert len(os.listdir("/proc/self/fd")) == before
    assert max(opened) - before <= 8 + 8, opened  # the logs of those that run, and two helpers
    seen = {(tmp_path / str(index)).read_text().splitlines()[-1] for index in range(200)}
    assert max(map(int, seen)) <= 6, seen


def test_two_jobs_of_one_run_do_not_meet(pool, tmp_path):
    """The second waits for the first, and is then skipped."""
    made = tmp_path / "runs/a"
    about = {"run_key": run_key(CONFIG), "config": CONFIG, "inputs": inputs.record([])}
    marker = json.dumps(about)
    script = (
        f"import pathlib, time; made = pathlib.Path({str(made)!r}); made.mkdir(parents=True);"
        f"(made / 'run.json').write_text({marker!r}); time.sleep(0.5);"
        f"(made / 'result.json').write_text({json.dumps(COMPLETE)!r})"
    )
    index = RunIndex(tmp_path / "runs")
    jobs = [
        Job(
            command=[sys.executable, "-c", script],
            log=tmp_path / f"{i}.log",
            config=CONFIG,
            runs=index,
        )
        for i in range(3)
    ]
    outcomes, *_ = pool(*jobs, at_once=3)
    assert states(outcomes) == "done skipped skipped"


def test_a_batch_goes_on_counting(pool):
    _, text, _ = pool("", "", first=10)
    assert "[11/12] done" in text and "[12/12] done" in text


# ---- on a terminal -------------------------------------------------------------------------------


def test_the_table_is_drawn_in_place(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(screen, "DRAW_S", 0.0)
    monkeypatch.setattr(pools, "PROGRESS_S", 0.1)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "6")
    kept(tmp_path / "runs/a", CONFIG, None)
    script = (
        "import time\nfor step in range(1, 9):\n"
        f'    print(\'{{"step": %d, "train/loss_nats": 0.5}}\' % step, flush=True,'
        f" file=open({str(tmp_path / 'runs/a/metrics.jsonl')!r}, 'a')); time.sleep(0.1)"
    )
    job = Job(
        command=[sys.executable, "-c", script],
        log=tmp_path / "log",
        config=CONFIG,
        runs=RunIndex(tmp_path / "runs"),
    )
    terminal = Terminal()
    wait = "import time; time.sleep(0.4)"
    outcomes, *_ = pool(job, *[wait] * 8, stream=terminal, at_once=6)
    assert set(states(outcomes).split()) == {"done"}
    frames = terminal.shown()
    lines = {line for frame in frames for line in frame}
    progress = r"\[1/9\] running  job=0  step [1-8]/8  loss 0\.500  0:00:0\d(  0.*)?"
    assert any(re.fullmatch(progress, line) for line in lines)
    assert any(re.fullmatch(r"\[\d/9\] queued   job=\d", line) for line in lines)
    assert all(len(line) < 60 for line in lines)
    last = frames[-1]
    assert sum(" done     job=" in line for line in last) == 9
    assert last[-1].startswith("9 done in") and not any("queued" in line for line in last)
    tables = [w for w in terminal.writes if "queued" in w]
    assert tables and max(w.count("\n") for w in tables) <= 5


def test_a_pipe_gets_lines_alone(pool):
    _, text, _ = pool("", "raise SystemExit(1)")
    assert "\x1b" not in text and "queued" not in text


# ---- a whole command line, without training ------------------------------------------------------

PRELOAD = "hydra.launcher.preload=[hydra.core.override_parser.overrides_parser,harness.loop.folder]"
SCRIPT = """
import json, os, sys, time
from pathlib import Path
import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

@hydra.main(version_base="1.3", config_path={conf!r}, config_name="config")
def main(cfg):
    from harness.config.identity import run_key  # here, as in train.py: a launcher starts fast
    from harness.disk import locks
    from harness.disk.inputs import record
    from harness.loop.folder import RunFolder

    config = OmegaConf.to_container(cfg, resolve=True)
    experiment = HydraConfig.get().runtime.choices.get("experiment") or "default"
    config["train"] |= {{"threads": config["train"]["threads"] or 4, "device": "cpu"}}
    key = run_key(config)
    name = f"{{cfg.variant.name}}-s{{cfg.seed}}-{{key[:8]}}"
    path = Path(config["outputs_dir"], experiment, name)
    print("got", json.dumps([config["targets"], config["bias"], config["train"]["threads"],
                             str(HydraConfig.get().verbose)]))
    folder = RunFolder(path, key, {{}}, force=config["force"])
    if folder.result():
        print("complete already")
        return
    time.sleep(float(os.environ.get("LOAD_S", "0")))
    try:
        folder.create(config, record([]))
    except locks.Busy as error:
        print("error:", error)
        sys.exit(locks.EXIT_CODE)
    for step in range(len(folder.history(up_to=10**9)) + 1, config["train"]["steps"] + 1):
        folder.log({{"step": step, "train/loss_nats": 1 / step}})
        time.sleep(float(os.environ.get("STEP_S", "0")))
        if cfg.seed == 13 and not os.environ.get("LUCKY"):
            print("an unlucky number")
            sys.exit(3)
    scores = {{"macro_f1": 0.5, "loss_nats": 0.5}}
    about = {{"variant": cfg.variant.name, "seed": cfg.seed, "lr": cfg.variant.lr, "steps": 1,
             "run_key": key, "control_hash": "", "fingerprints": {{"data": ""}},
             "parameters": {{"trainable": 1, "trainable_final": 1}},
             "time": {{"train_s": 1.0, "step_median_s": 1.0, "tokens_per_s": 1.0}},
             "memory": {{"train_peak_bytes": 1, "base_bytes": 1}}}}
    folder.write_json("result.json", {{"status": "complete", **about,
                                       "test": {{"accuracy": 0.5, **scores}},
                                       "validation": {{"accuracy": 0.25, **scores}}}})
main()
"""


class Multirun:
    """`python train.py -m ...` in a process, of a script that trains nothing."""

    def __init__(self, root: Path):
        self.root = root
        self.script = root / "train.py"
        self.script.write_text(SCRIPT.format(conf=str(ROOT / "conf")))
        self.mark = uuid.uuid4().hex

    def start(self, *overrides: str, **variables: str) -> subprocess.Popen:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "MULTIRUN": self.mark, **variables}
        return subprocess.Popen(
            [sys.executable, str(self.script), "-m", *overrides, "hydra/launcher=processes",
             "hydra.launcher.n_jobs=2", PRELOAD, "train.steps=4"],
            cwd=self.root, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def __call__(self, *overrides: str, **variables: str) -> int:
        with self.start(*overrides, **variables) as process:
            self.out, self.err = process.communicate(timeout=120)
        assert self.alive() == {}
        return process.returncode

    def alive(self) -> dict[int, str]:
        """The processes that descend from this multirun, wherever they hang now: pid, command."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"MULTIRUN={self.mark}".encode() in (process / "environ").read_bytes():
                    command = (process / "cmdline").read_bytes().decode().replace("\0", " ")
                    found[int(process.name)] = command
        return found

    def rows(self) -> dict[str, list]:
        """Returns the row of every run, but where and when it ran."""
        return {
            folder.name: [
                json.loads((folder / "result.json").read_text()),
                (folder / "metrics.jsonl").read_text(),
            ]
            for folder in sorted(path.parent for path in self.root.rglob("run.json"))
        }

    def log(self, index: int, experiment: str = "default") -> str:
        (path,) = (self.root / "outputs" / experiment / "logs").glob(f"{index:03d}_*.log")
        return path.read_text()


@pytest.fixture
def multirun(tmp_path) -> Multirun:
    return Multirun(tmp_path)


@linux
def test_a_second_multirun_starts_nothing_whatever_the_order(multirun):
    assert multirun("variant=lora,dora", "seed=0,1") == 0, multirun.err
    assert "4 jobs, 2 at a time" in multirun.out and "4 done" in multirun.out
    rows = multirun.rows()
    assert sorted(name[:7] for name in rows) == ["dora-s0", "dora-s1", "lora-s0", "lora-s1"]
    assert "test accuracy 0.5000" in multirun.out
    assert multirun("seed=1,2", "variant=dora,lora") == 0, multirun.err
    assert "2 done, 2 skipped" in multirun.out and "Error" not in multirun.err
    assert rows.items() < multirun.rows().items()


@linux
@pytest.mark.long
def test_two_multiruns_at_once_share_the_work_and_both_end_well(multirun):
    """Started together, so that both start the same jobs; the second finds its runs underway."""
    slow = {"STEP_S": "0.3", "LOAD_S": "0.5"}
    both = [multirun.start("seed=0,1,2", **slow) for _ in range(2)]
    said = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], "".join(out for out, _ in said)
    assert [err for _, err in said] == ["", ""]
    waited = sum(out.count("waiting") for out, _ in said)
    counts = [re.search(r"^(?:\d done|\d skipped).* in \d.*$", out, re.M)[0] for out, _ in said]
    done = [int(re.search(r"(\d) done", line)[1]) if "done" in line else 0 for line in counts]
    assert sum(done) == 3 and waited >= 1, counts  # each run once, by one of them
    assert sorted(name[:7] for name in multirun.rows()) == ["lora-s0", "lora-s1", "lora-s2"]
    for _, metrics in multirun.rows().values():
        assert [json.loads(line)["step"] for line in metrics.splitlines()] == [1, 2, 3, 4]
    for log in (multirun.root / "outputs/default/logs").iterdir():
        text = log.read_text()  # of one job
        assert text.count("$ ") == 1 and text.count("got ") == 1, text
    assert multirun.alive() == {}


@linux
def test_a_multirun_waits_for_a_run_that_somebody_else_has_underway(multirun):
    assert multirun("seed=0") == 0, multirun.err
    (folder,) = (path.parent for path in multirun.root.rglob("run.json"))
    result = (folder / "result.json").read_text()
    (folder / "result.json").unlink()
    release = locks.take(folder)  # as a single train.py does
    with multirun.start("seed=0") as process:
        while "waiting" not in (line := process.stdout.readline()):
            assert line, "it ended"
        assert str(folder.relative_to(multirun.root)) in line
        (folder / "result.json").write_text(result)
        release()
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "") and "1 skipped in" in out


@linux
def test_a_failed_job_ends_the_command_with_1_and_the_printed_command_repeats_it(multirun):
    assert multirun("seed=13,0,1", "targets=[query,'value out']", "bias='a \"b\" $c, d'") == 1
    assert "2 done, 1 failed" in multirun.out
    assert multirun.err == ""  # no traceback: all is said
    again = re.search(r"^    again: (.*)$", multirun.out, re.M)[1]
    assert "    | an unlucky number" in multirun.out and multirun.out.count(again) == 2
    assert "    log: outputs/default/logs/000_seed=13.log" in multirun.out
    threads = max(1, pools.cores() // 2)
    got = "got " + json.dumps([["query", "value out"], 'a "b" $c, d', threads, "False"])
    assert all(got in multirun.log(index) for index in range(3))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    for lucky, code in (("", 3), ("1", 0)):
        done = subprocess.run(
            again, shell=True, cwd=multirun.root, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": path, "LUCKY": lucky},
        )  # fmt: skip
        assert done.returncode == code and got in done.stdout, done.stderr
    assert multirun("seed=13,0,1", "targets=[query,'value out']", "bias='a \"b\" $c, d'") == 0
    assert "3 skipped" in multirun.out


@linux
def test_what_a_variant_has_not_is_not_applicable_in_a_sweep(multirun):
    assert multirun("variant=lora,bitfit", "rank=2,4") == 0, multirun.err
    assert "2 done, 2 n/a" in multirun.out
    assert "n/a      variant=bitfit rank=2  the variant ignores rank" in multirun.out
    assert len(multirun.rows()) == 2


@linux
def test_stop_on_error(multirun):
    assert multirun("seed=13,0,1,2", "hydra.launcher.on_error=stop", STEP_S="1") == 1
    assert "1 failed, 3 stopped" in multirun.out


@linux
def test_the_users_threads_are_left_alone(multirun):
    assert multirun("train.threads=3,null") == 0, multirun.err
    assert multirun("seed=1", "hydra.launcher.threads=0") == 0, multirun.err
    configs = [json.loads(path.read_text())["config"] for path in multirun.root.rglob("run.json")]
    seen = sorted((config["seed"], config["train"]["threads"]) for config in configs)
    assert seen == [(0, 3), (0, 4), (1, 4)]  # 4: the script's own choice


@linux
def test_an_experiment_that_asks_for_a_multirun_does_not_recurse(multirun):
    """Nor does one that sets the keys of a launcher and a sweeper, here in a folder of its own."""
    mine = multirun.root / "my configs"
    (mine / "experiment").mkdir(parents=True)
    (mine / "experiment/sweep.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /hydra/launcher: processes\n"
        "hydra:\n  mode: MULTIRUN\n  launcher:\n    n_jobs: 2\n    threads: 1\n"
        "  sweeper:\n    params:\n      seed: 0,1\n"
    )
    flags = ["--config-dir", str(mine), "experiment=sweep", "hydra.verbose=[none]"]
    assert multirun(*flags, "hydra.sweep.dir=elsewhere") == 0, multirun.err
    assert "2 jobs, 2 at a time, 1 thread each" in multirun.out and "2 done" in multirun.out
    for index in (0, 1):
        log = multirun.log(index, "sweep")
        assert "\"['none']\"]" in log  # other settings of Hydra's reach the job
        assert "elsewhere" not in log and "n_jobs" not in log and " -m " not in log
    assert len(multirun.rows()) == 2


def test_a_wrong_setting_ends_the_command_with_a_sentence(multirun):
    with multirun.start("seed=0,1", "hydra.launcher.gpus=0") as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and out == ""
    assert err == (
        "error: hydra.launcher.gpus is 0; it must be a list of CUDA device ids such as [0,1], "
        "or null.\n"
    )


@linux
def test_a_multirun_that_is_told_to_end_ends_its_jobs_and_sums_up(multirun):
    with multirun.start("seed=0,1,2", STEP_S="5") as process:
        wait_for(lambda: len(list(multirun.root.rglob("metrics.jsonl"))) == 2)
        process.terminate()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in err
    assert "3 stopped" in out and "[1/3] stopped  seed=0" in out
    assert multirun.alive() == {}


@linux
def test_ctrl_c_on_a_terminal(multirun):
    """The key reaches the parent alone, which cleans up the table and its jobs."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background ignores it
        os.environ.update(
            TERM="xterm", MULTIRUN=multirun.mark, STEP_S="5", PYTHONPATH=str(ROOT), COLUMNS="60"
        )
        os.chdir(multirun.root)
        os.execv(
            sys.executable,
            [
                sys.executable,
                "train.py",
                "-m",
                "hydra/launcher=processes",
                "seed=0,1",
                PRELOAD,
            ],
        )
    wait_for(lambda: len(list(multirun.root.rglob("metrics.jsonl"))) == 2)
    time.sleep(pools.PROGRESS_S + 1)
    os.write(terminal, b"\x03")
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other side is closed
        while more := os.read(terminal, 65536):
            shown += more
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    os.close(terminal)
    assert re.search(rb"running  seed=1  step 1/200  loss 1.000  0:00:0\d", shown)
    assert shown.decode().splitlines()[-1].startswith("2 stopped in 0:00:")
    assert multirun.alive() == {}


@linux
@pytest.mark.parametrize("preload", [[], ["this"]])
@pytest.mark.parametrize("watched", [True, False])
def test_a_killed_parent_leaves_no_child_and_no_grandchild(tmp_path, watched, preload):
    """If its watcher is killed before it, the kernel still kills the jobs themselves."""
    mark = uuid.uuid4().hex
    job = tmp_path / "job.py"
    job.write_text("import subprocess; subprocess.run(['sleep', '600'])")
    parent = (
        "import sys, pathlib\nfrom harness.study.pool import Job, Pool\n"
        f"make = lambda i: Job(command=[sys.executable, {str(job)!r}],"
        f" log=pathlib.Path({str(tmp_path)!r}, str(i)))\n"
        f"Pool(['a', 'b'], make, at_once=2, preload={preload}).run()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MULTIRUN": mark}
    process = subprocess.Popen(
        [sys.executable, "-c", parent], env=environment, stdout=subprocess.DEVNULL
    )
    left = Multirun(tmp_path)
    left.mark = mark
    wait_for(lambda: sum(line.startswith("sleep") for line in left.alive().values()) == 2)
    # the parent, its watcher, perhaps a template, two jobs, and a child of each
    assert len(left.alive()) == 6 + len(preload)
    if not watched:
        (watcher,) = (pid for pid, command in left.alive().items() if "killpg" in command)
        os.kill(watcher, signal.SIGKILL)
    process.kill()
    process.wait()
    kept = "" if watched else "python"
    wait_for(lambda: not any(kept in command for command in left.alive().values()))
    assert len(left.alive()) == (0 if watched else 2)
    for pid in left.alive():
        os.kill(pid, signal.SIGKILL)


# ---- real training -------------------------------------------------------------------------------


def real(cli: CommandLine, outputs: str, *overrides: str) -> list[str]:
    """The command of a multirun over small files; every second step writes a checkpoint."""
    own = {"outputs_dir", "train.threads", *(o.partition("=")[0] for o in overrides)}
    defaults = [d for d in cli.defaults if d.partition("=")[0] not in own]
    return [
        sys.executable, "train.py", "-m", "hydra/launcher=processes", "hydra.launcher.n_jobs=2",
        "hydra.launcher.threads=1", *defaults, f"outputs_dir={cli.root / outputs}", *overrides,
    ]  # fmt: skip


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


def measured(outputs: Path) -> dict:
    """All that an undisturbed and a disturbed multirun must agree on."""
    found = {}
    for marker in sorted(outputs.rglob("run.json")):
        result = json.loads(marker.with_name("result.json").read_text())
        lines = marker.with_name("metrics.jsonl").read_text().splitlines()
        found[marker.parent.name] = {
            "result": {k: v for k, v in result.items() if k not in ("time", "memory")},
            "metrics": [
                {k: v for k, v in json.loads(line).items() if not k.startswith("time/")}
                for line in lines
            ],
            "predictions": marker.with_name("predictions.jsonl").read_text(),
        }
    return found


def wait_for(condition, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


@linux
@pytest.mark.long
def test_a_killed_multirun_repeated_gives_the_rows_of_an_undisturbed_one(cli):
    """Killed while it trains; the undisturbed one is a plain run in this process."""
    overrides = ["variant=adalora", "dropout=0.1", "train.steps=40", "train.eval_every=20"]
    command = real(cli, "disturbed", *overrides)
    with open(cli.root / "first.log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    wait_for(  # the row of step 6 comes after the checkpoint of step 4
        lambda: any(
            (pools.progress(metrics) or (0,))[0] >= 6
            for metrics in (cli.root / "disturbed").rglob("metrics.jsonl")
        ),
        timeout_s=120,
    )
    process.kill()
    process.wait()
    assert not any((cli.root / "disturbed").rglob("result.json"))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (log,) = (cli.root / "disturbed/default/logs").iterdir()
    assert "continuing" in log.read_text()
    assert cli(*overrides, f"outputs_dir={cli.root / 'whole'}", "hydra/launcher=basic") == 0, (
        cli.err
    )
    assert measured(cli.root / "whole") == measured(cli.root / "disturbed") != {}


@linux
@pytest.mark.slow
def test_a_multirun_killed_at_random_moments_gives_the_same_rows(cli):
    draw = random.Random(os.environ.get("KILL_SEED", "0"))
    sweep = ["variant=lora,adalora", "seed=0,1", "dropout=0.1", "train.steps=40"]
    began = time.monotonic()
    subprocess.run(real(cli, "whole", *sweep), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    took_s, kills, code = time.monotonic() - began, 0, None
    while code is None:
        process = subprocess.Popen(real(cli, "parts", *sweep), cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            code = process.wait(timeout=draw.uniform(3, took_s) if kills < 6 else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert kills and code == 0
    assert measured(cli.root / "whole") == measured(cli.root / "parts")
    assert len(measured(cli.root / "parts")) == 4


@linux
@pytest.mark.slow
def test_real_jobs_with_tracking(cli):
    """Killed, they leave no process of W&B's; one diverges, and its command repeats just that."""
    watch = Multirun(cli.root)
    environment = {**os.environ, "MULTIRUN": watch.mark}
    sweep = ["tracking=offline", "variant.lr=0.001,1e30"]
    command = real(cli, "outputs", *sweep, "train.steps=4000")
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    wait_for(lambda: any("wandb-core" in line for line in watch.alive().values()), timeout_s=120)
    process.kill()
    process.wait()
    wait_for(lambda: watch.alive() == {})
    command = real(cli, "outputs", *sweep)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == ""
    assert "1 done, 1 failed" in done.stdout and "diverged: " in done.stdout
    again = re.search(r"^    again: (.*) force=true$", done.stdout, re.M)[1]
    repeated = subprocess.run(again, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert repeated.returncode == 1 and "failed already" in repeated.stdout


@pytest.mark.slow
def test_jobs_run_under_joblib_too(cli):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="hydra-joblib-launcher")
    command = real(cli, "outputs", "seed=0,1", "hydra/launcher=joblib", "train.threads=1")
    command = [
        o for o in command if o not in ("hydra/launcher=processes", "hydra.launcher.threads=1")
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = measured(cli.root / "outputs")
    command = real(cli, "outputs", "seed=0,1")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "2 skipped" in done.stdout, done.stdout
    assert measured(cli.root / "outputs") == rows and len(rows) == 2
