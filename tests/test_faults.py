"""Faults around a run, with real processes where that is cheap. tests/README.md says where
the other faults are tested."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command import CommandLine
from made_study import made_study, write_run_folders

import harness.loop.step
from harness.compare.__main__ import main as compare
from harness.disk.write import new_folder
from harness.loop.folder import RunFolder
from harness.study.pool import GRACE_S, Job, Pool

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


def test_a_killed_process_leaves_no_lock(tmp_path):
    folder = tmp_path / "run"
    script = (
        "import sys; from pathlib import Path; from harness.loop.folder import RunFolder\n"
        "folder = RunFolder(Path(sys.argv[1]), 'key', {}); folder.create({})\n"
        "print('writing', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        with pytest.raises(ValueError, match="another process is running in"):
            RunFolder(folder, "key", {}).create({})
        process.kill()
    RunFolder(folder, "key", {}).create({})


def test_a_killed_job_harms_no_other(tmp_path):
    """Killed from outside while it runs, as the kernel does it when memory is short."""
    waits = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read(); import time"
    scripts = [f"{waits}; time.sleep(60)", f"{waits}; time.sleep(1)", "print('later')"]

    def prepare(index: int) -> Job:
        log = tmp_path / f"{index}.log"
        return Job(command=[sys.executable, "-c", scripts[index]], log=log)

    def kill() -> None:
        lines = (
            (tmp_path / "0.log").read_text().splitlines() if (tmp_path / "0.log").exists() else []
        )
        if len(lines) > 1:
            os.kill(int(lines[1]), signal.SIGKILL)
        else:
            threading.Timer(0.1, kill).start()

    kill()
    outcomes = Pool(["a", "b", "c"], prepare, at_once=2).run()
    assert [outcome.state for outcome in outcomes] == ["failed", "done", "done"]
    assert outcomes[0].reason.startswith("killed by signal 9 (SIGKILL)") and outcomes[0].rerun


def test_a_job_that_is_stopped_goes_on_when_it_is_let(tmp_path):
    """SIGSTOP and SIGCONT, as a terminal or a batch system sends them."""
    counts = "import os, time; print(os.getpid(), flush=True); time.sleep(0.5); print('end')"
    log = tmp_path / "0.log"

    def prepare(index: int) -> Job:
        return Job(command=[sys.executable, "-c", counts], log=log)

    def stop() -> None:
        lines = log.read_text().splitlines() if log.exists() else []
        if len(lines) < 2:
            threading.Timer(0.02, stop).start()
            return
        os.kill(int(lines[1]), signal.SIGSTOP)
        threading.Timer(0.8, os.kill, (int(lines[1]), signal.SIGCONT)).start()

    stop()
    (outcome,) = Pool(["a"], prepare, at_once=1).run()
    assert outcome.state == "done" and log.read_text().splitlines()[-1] == "end"


@pytest.mark.parametrize("second", ["SIGTERM", "SIGINT"])
def test_a_launcher_told_twice_waits_for_no_job(tmp_path, second):
    """The first signal asks the jobs to end, which one does not hear; the second ends them."""
    script = (
        "import sys; from pathlib import Path; from harness.study.pool import Job, Pool\n"
        "deaf = 'import signal, time; signal.signal(15, signal.SIG_IGN); '\n"
        "deaf += 'print(1, flush=True); time.sleep(300)'\n"
        "job = lambda i: Job(command=[sys.executable, '-c', deaf], log=Path(sys.argv[1]))\n"
        "print(Pool(['a'], job, at_once=1).run()[0].state)"
    )
    log = tmp_path / "log"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(log)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    with process:
        while not (log.exists() and log.read_text().splitlines()[-1:] == ["1"]):
            time.sleep(0.02)
        started = time.monotonic()
        process.terminate()
        time.sleep(0.3)
        process.send_signal(getattr(signal, second))
        out, _ = process.communicate(timeout=60)
    assert out.splitlines()[-1] == "stopped"
    assert time.monotonic() - started < GRACE_S, "the job was waited for"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_folder_that_cannot_take_its_place_leaves_the_earlier_one(tmp_path, monkeypatch, error):
    """Once the earlier one has been moved away, the second of two renames fails."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "README.md").write_text("mine")
    replace = os.replace

    def second_fails(source, target):
        if target == tmp_path / "kept" and ".old" not in str(source):
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(type(error)), new_folder(tmp_path / "kept") as folder:
        (folder / "page.html").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "README.md").read_text() == "mine"


@pytest.fixture
def small_files():
    """A function after which no file may be longer than some bytes, as with a quota."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("most", [100, 3_000, 30_000])
@pytest.mark.parametrize("option", ["--out", "--archive"])
def test_a_quota_leaves_a_report_and_an_archive_as_they_were(
    tmp_path, small_files, option, most, capsys
):
    study = made_study(arms=("lora", "dora"), seeds=3, tuning_seeds=0, items=9, diverged=False)
    outputs = tmp_path / "outputs"
    write_run_folders(study, outputs / "made")
    place = tmp_path / "kept"
    before = {}
    for limited in (False, True):
        if limited:
            before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
            small_files(most)
        try:
            compare([str(outputs / "made"), option, str(place)])
        except SystemExit as error:
            assert limited and str(error).startswith("error: ") and str(error).count("\n") == 0
            assert str(tmp_path) in str(error)
    assert before and {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before
    assert not [p for p in tmp_path.rglob(".*") if p.is_file()]


def test_a_link_that_is_swapped_in_is_not_written_through(tmp_path):
    """Between the look at a run's folder and its first write, somebody puts a link there."""
    others, place = tmp_path / "others", tmp_path / "run"
    others.mkdir()
    (others / "result.json").write_text("theirs")
    for force in (False, True):
        folder = RunFolder(place, "key", {}, force=force)
        place.symlink_to(others)
        with pytest.raises((ValueError, OSError), match="run"):
            folder.create({})
        assert [p.name for p in others.iterdir()] == ["result.json"]
        assert (others / "result.json").read_text() == "theirs"
        place.unlink()


@pytest.mark.parametrize("allocate", [torch.empty, np.zeros, bytearray])
def test_no_memory_is_a_sentence_with_advice(cli, monkeypatch, allocate):
    monkeypatch.setattr(harness.loop.step, "training_step", lambda *_, **__: allocate(2**50))
    assert cli("variant=lora") == 1
    assert "error: cpu is out of memory. " in cli.err and "Traceback" not in cli.err
    assert not (cli.folders()[-1] / "result.json").exists()


@pytest.mark.parametrize("folder", ["/proc/nothing", "/dev/null/x"])
def test_a_folder_that_takes_nothing_is_a_sentence(cli, folder):
    if not Path(folder).parent.exists():
        pytest.skip("no such place on this system")
    assert cli("variant=lora", f"outputs_dir={folder}") == 1
    assert cli.err.startswith("error: ") and cli.err.count("\n") == 1 and folder in cli.err


def test_a_file_system_that_is_read_only_is_a_sentence(cli, monkeypatch):
    real = os.mkdir

    def read_only(path, *arguments, **options):
        if str(cli.root / "outputs") in str(path):
            raise OSError(30, "Read-only file system", str(path))
        real(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", read_only)
    assert cli("variant=lora") == 1
    assert cli.err.startswith("error: ") and "Read-only file system" in cli.err
    assert cli.err.count("\n") == 1
