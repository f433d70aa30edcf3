"""A thousand runs in one folder: what looks through them stays quick, and its memory small.

`pytest -m slow` makes them and prints the figures of tests/README.md; nothing is asserted of times.
"""

import functools
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import CommandLine

from harness.config.identity import run_key, run_name
from harness.machine.processes import LINUX

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parent.parent
RUNS = 1000
ARMS = ("lora", "dora")


def fabricate(cli: CommandLine, count: int) -> Path:
    """The folder of `count` finished runs: one real one of each arm, copied under other seeds."""
    assert cli("-m", f"variant={','.join(ARMS)}", "train.threads=1") == 0, cli.err
    for made in cli.folders():
        files = {path.name: path.read_text() for path in made.iterdir() if path.is_file()}
        about, result = json.loads(files["run.json"]), json.loads(files["result.json"])
        for seed in range(1, count // len(ARMS)):
            config = {**about["config"], "seed": seed}
            folder = made.with_name(run_name(config))
            shutil.copytree(made / "adapter", folder / "adapter")
            for name, text in files.items():
                (folder / name).write_text(text)
            key = run_key(config)
            (folder / "run.json").write_text(
                json.dumps({**about, "run_key": key, "config": config})
            )
            (folder / "result.json").write_text(
                json.dumps({**result, "seed": seed, "run_key": key})
            )
    return made.parent


def measured(file: Path, *command: str) -> tuple[float, float, str]:
    """(seconds, MiB of the largest resident set, what was printed) of a command, without its
    children."""
    began, most = time.monotonic(), 0
    with open(file, "w+") as out:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=out, stderr=out)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            if found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text()):  # it is its peak
                most = int(found[1])
            time.sleep(0.01)
        out.seek(0)
        printed = out.read()
    assert process.returncode == 0, printed
    return time.monotonic() - began, most / 2**10, printed


def test_a_thousand_runs(tmp_path, monkeypatch, capsys):
    if not LINUX:
        pytest.skip("reads /proc")
    cli = CommandLine(tmp_path, monkeypatch, capsys)
    folder = fabricate(cli, RUNS)
    sweep = ["train.py", "-m", "hydra/launcher=processes", *cli.defaults, "hydra.launcher.n_jobs=1",
             f"variant={','.join(ARMS)}"]  # fmt: skip
    command = functools.partial(measured, tmp_path / "printed")
    few = command(*sweep, f"seed=range({RUNS // 10 // len(ARMS)})")
    all_of_them = command(*sweep, f"seed=range({RUNS // len(ARMS)})")
    report = command("-m", "harness.compare", str(folder), "--out", str(tmp_path / "report"))
    kept = str(tmp_path / "runs.jsonl")
    archive = command("-m", "harness.compare", str(folder), "--archive", kept)
    assert f"{RUNS // 10} skipped" in few[2] and f"{RUNS} skipped" in all_of_them[2]
    assert not (folder / "logs").exists() and (tmp_path / "report/page.html").is_file()
    assert all_of_them[1] < 1.5 * few[1]  # the parent keeps what names a run, not the run
    with capsys.disabled():
        print()
        for what, (seconds, mebibytes, _) in {
            f"launcher, {RUNS // 10} finished runs": few,
            f"launcher, {RUNS} finished runs": all_of_them,
            f"report of {RUNS} runs": report,
            f"archive of {RUNS} runs": archive,
        }.items():
            print(f"{what}: {seconds:.0f} s, {mebibytes:.0f} MiB")
