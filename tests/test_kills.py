"""A run may end at any moment, within a step or at a write to the disk: what the same command then
ends with is what it would have been."""

import functools
import os
import random
import sys
import time
from pathlib import Path

import pytest
import torch
from adapters import config_of
from command import CommandLine, write_task
from test_train import ADALORA, VARIANTS, comparable, same_adapter
from transformers import BertForSequenceClassification

import variants
from harness.disk import locks
from harness.machine.processes import LINUX, Template, signal_group

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
KILLS = 20  # of each variant under `slow`


def options_of(variant: str) -> list[str]:
    """Returns overrides by which a variant changes in few steps and draws random numbers."""
    has_dropout = "dropout" in config_of(f"variant={variant}")["variant"]["adapter"]
    return [*(ADALORA if variant.endswith("adalora") else ()), *["dropout=0.1"] * has_dropout]


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
        """Returns True if the run ended before it was to be killed; its error fails the test."""
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
    overrides = [f"variant={variant}", *options_of(variant)]
    whole = root / "whole"
    runs(whole, *overrides)  # warms the caches
    began = time.monotonic()
    runs(whole, *overrides, "force=true")
    took_s = time.monotonic() - began
    done = finished = 0
    while done < kills:
        folder, began, before = root / f"parts{finished}", time.monotonic(), done
        while not runs(folder, *overrides, kill_after_s=draw.uniform(0.1, took_s)):
            done += 1
        if done == before:  # undisturbed, and maybe faster: later than that none is killed
            took_s = min(took_s, time.monotonic() - began)
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


# ---- the end of the process at every moment of a kind --------------------------------------------


class Ended(BaseException):
    """The process ends here."""


class Moments:
    """Counts the calls of some functions, and ends the run before one of them."""

    def __init__(self, patch: pytest.MonkeyPatch, *functions: tuple[object, str]):
        self.count, self.ends_at = 0, -1
        for owner, name in functions:
            patch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, real):
        @functools.wraps(real)  # its signature, too
        def call(*arguments, **options):
            if any(str(argument).endswith(locks.FILE) for argument in arguments):
                return real(*arguments, **options)  # a finalizer's, in which nothing can be raised
            self.count += 1
            if self.count == self.ends_at:
                raise Ended
            return real(*arguments, **options)

        return call


# What makes a file appear under its name or last.
WRITES = [(os, name) for name in ("replace", "fsync", "mkdir", "unlink", "rmdir")]
# Each pass of training and of evaluation; between the last and the optimiser's step; after it.
PASSES = [
    (BertForSequenceClassification, "forward"),
    (torch.nn.utils, "clip_grad_norm_"),
    (variants, "after_step"),
]


def end_at(moments: Moments, cli: CommandLine, variant: str, draw=None, most: int = 0) -> int:
    """End a run at each of these moments, or at `most` of them; each then goes on as if it had not
    been. Returns at how many."""
    overrides = [f"variant={variant}", "train.accumulation=2", *options_of(variant)]
    whole = cli.root / "whole"
    assert cli(*overrides, f"run_dir={whole}") == 0, cli.err  # warms the caches
    moments.count = 0
    assert cli(*overrides, f"run_dir={whole}", "force=true") == 0, cli.err
    all_of_them = [*range(1, moments.count)]
    chosen = draw.sample(all_of_them, most) if draw else all_of_them
    for number in sorted(chosen):
        folder = cli.root / f"ended{number}"
        moments.count, moments.ends_at = 0, number
        try:
            cli(*overrides, f"run_dir={folder}")
        except Ended:
            cli.capsys.readouterr()
        moments.ends_at = -1
        assert cli(*overrides, f"run_dir={folder}") == 0, (number, cli.err)
        assert comparable(folder) == comparable(whole), number
        same_adapter(folder, whole)
        assert not (folder / "checkpoints").exists(), number
    return len(chosen)


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("kind", [WRITES, PASSES], ids=["writes", "passes"])
def test_a_run_may_end_at_some_moments(cli, monkeypatch, kind):
    moments = Moments(monkeypatch, *kind)
    assert end_at(moments, cli, "adalora", random.Random(0), most=6) == 6


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", [WRITES, PASSES], ids=["writes", "passes"])
def test_a_run_may_end_at_any_moment(cli, monkeypatch, kind):
    count = end_at(Moments(monkeypatch, *kind), cli, "adalora")
    assert count > 30
    with cli.capsys.disabled():
        print(f"\nended at each of {count} moments, each time as if undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_of_every_variant_may_end_within_a_step(cli, monkeypatch, variant):
    assert end_at(Moments(monkeypatch, *PASSES), cli, variant, random.Random(variant), most=8) == 8
