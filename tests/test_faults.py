"""What goes wrong around a run, with real processes where that is cheap. tests/README.md says where
the faults are tested that are not here."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from command import CommandLine

import harness.step
from harness.launch import Job, Pool
from harness.run import RunFolder

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


def test_a_killed_process_leaves_no_lock(tmp_path):
    folder = tmp_path / "run"
    script = (
        "import sys; from pathlib import Path; from harness.run import RunFolder\n"
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


@pytest.mark.parametrize("allocate", [torch.empty, np.zeros, bytearray])
def test_no_memory_is_a_sentence_with_advice(cli, monkeypatch, allocate):
    monkeypatch.setattr(harness.step, "training_step", lambda *_, **__: allocate(2**50))
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
