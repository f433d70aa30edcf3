"""A run may end at any moment and at any write to the disk: what the same command then ends with is
what it would have been."""

import os
import random
import sys
import time
from pathlib import Path

import pytest
from adapters import config_of
from command import CommandLine, write_task
from test_train import ADALORA, comparable, same_adapter

from harness.processes import LINUX, Template, signal_group

ROOT = Path(__file__).parent.parent
KILLS = 20  # of each variant under `slow`
VARIANTS = sorted(path.stem for path in (ROOT / "conf/variant").glob("*.yaml"))


# ---- SIGKILL, at random --------------------------------------------------------------------------


class Runs:
    """Runs of train.py, each a process of its own."""

    def __init__(self, template: Template, root: Path):
        self.template, self.log = template, root / "log"
        self.common = [
            sys.executable, str(ROOT / "train.py"), "model=tiny", "tracking=none", "train.steps=30",
            "train.batch_size=4", "train.accumulation=2", "train.eval_every=7", "train.log_every=1",
            "train.checkpoint_every=3", "train.threads=1", *write_task(root),
        ]  # fmt: skip

    def __call__(self, folder: Path, *overrides: str, kill_after_s: float | None = None) -> bool:
        """Whether the run ended before it was to be killed; an error in it fails the test."""
        self.log.write_text("")
        environment = {"HYDRA_FULL_ERROR": "1"}
        command = [*self.common, f"run_dir={folder}", *overrides]
        process = self.template.start(command, environment, self.log)
        if kill_after_s is not None:
            deadline = time.monotonic() + kill_after_s
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            if process.poll() is None:
                signal_group(process, "SIGKILL")
                process.wait()
                return False
        assert process.wait() == 0, self.log.read_text()
        return True


@pytest.fixture
def runs(tmp_path):
    if not LINUX:
        pytest.skip("forks its runs from a template")
    with Template(["torch", "transformers", "hydra", "train"]) as template:
        yield Runs(template, tmp_path)


def survive(runs: Runs, root: Path, variant: str, kills: int, draw: random.Random) -> int:
    """Kill runs of a variant `kills` times; the number of runs that it took to be killed so often,
    each compared with the one that nobody disturbed."""
    overrides = [f"variant={variant}", *(ADALORA if variant.endswith("adalora") else ())]
    if "dropout" in config_of(f"variant={variant}")["variant"]["adapter"]:
        overrides.append("dropout=0.1")
    whole = root / "whole"
    runs(whole, *overrides)  # warms the caches
    began = time.monotonic()
    runs(whole, *overrides, "force=true")
    took_s = time.monotonic() - began
    done = finished = 0
    while done < kills:
        folder = root / f"parts{finished}"
        while not runs(folder, *overrides, kill_after_s=draw.uniform(0.1, took_s)):
            done += 1
        assert comparable(folder) == comparable(whole)
        same_adapter(folder, whole)
        assert not list(folder.rglob(".*")) and not (folder / "checkpoints").exists()
        finished += 1
    return finished


def test_a_run_killed_at_random_moments_ends_the_same(runs, tmp_path):
    survive(runs, tmp_path, "adalora", kills=3, draw=random.Random(0))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_survives_its_kills(runs, tmp_path, variant, capsys):
    draw = random.Random(variant)
    finished = survive(runs, tmp_path, variant, kills=KILLS, draw=draw)
    with capsys.disabled():
        print(f"\n{variant}: {KILLS} or more kills, {finished} runs, each as if undisturbed")


# ---- the end of the process at each write --------------------------------------------------------


class Ended(BaseException):
    """The process ends here."""


class Disk:
    """Counts what makes a file appear under its name or last, and ends the run at one of them."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.count, self.ends_at = 0, -1
        for name in ("replace", "fsync", "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, real):
        def call(*arguments, **options):
            self.count += 1
            if self.count == self.ends_at:
                raise Ended
            return real(*arguments, **options)

        return call


def end_at_writes(root: Path, patch: pytest.MonkeyPatch, capsys, draw=None, most: int = 0) -> int:
    """End a run at each of its writes, or at `most` of them; each then goes on as if it had not
    been. Returns at how many."""
    cli, disk = CommandLine(root, patch, capsys), Disk(patch)
    overrides = ["variant=adalora", *ADALORA, "dropout=0.1"]
    whole = root / "whole"
    assert cli(*overrides, f"run_dir={whole}") == 0, cli.err  # warms the caches
    disk.count = 0
    assert cli(*overrides, f"run_dir={whole}", "force=true") == 0, cli.err
    writes = [*range(1, disk.count)]
    chosen = draw.sample(writes, most) if draw else writes
    for number in sorted(chosen):
        folder = root / f"ended{number}"
        disk.count, disk.ends_at = 0, number
        try:
            cli(*overrides, f"run_dir={folder}")
        except Ended:
            capsys.readouterr()
        disk.ends_at = -1
        assert cli(*overrides, f"run_dir={folder}") == 0, (number, cli.err)
        assert comparable(folder) == comparable(whole), number
        same_adapter(folder, whole)
        assert not (folder / "checkpoints").exists(), number
    return len(chosen)


def test_a_run_may_end_at_some_of_its_writes(tmp_path, monkeypatch, capsys):
    assert end_at_writes(tmp_path, monkeypatch, capsys, random.Random(0), most=6) == 6


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_may_end_at_any_of_its_writes(tmp_path, monkeypatch, capsys):
    count = end_at_writes(tmp_path, monkeypatch, capsys)
    assert count > 30
    with capsys.disabled():
        print(f"\nended at each of {count} writes, each time as if undisturbed")
