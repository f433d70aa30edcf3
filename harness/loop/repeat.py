"""Is a run a function of its configuration here? Run it twice and compare all that it computes.

    python -m harness.loop.repeat variant=dora train.steps=20

prints what the bits depend on in addition to the configuration, then that all is equal; or the
first step and the first tensor that differ, and ends with exit code 1. Compared are the trained
parameters, the layers' statistics and the optimiser's moments after every step, what was logged,
and every prediction. The overrides are those of train.py; where nothing is given, 10 steps are
taken.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from harness import cli
from harness.loop.checkpoint import STATE, TENSORS

ROOT = Path(__file__).resolve().parents[2]
STEPS = 10
_TIMED = ("time/", "memory/")  # rows of metrics.jsonl that no two runs share


def first_difference(one: Path, other: Path) -> str | None:
    """The first difference between two folders of one run, kept with all checkpoints, or None."""
    for kept in sorted((one / "checkpoints").glob("step-*")):
        twin = other / "checkpoints" / kept.name
        step = int(kept.name.removeprefix("step-"))
        if not twin.is_dir():
            return f"step {step}: the second run has no checkpoint of it"
        if name := _differing(load_file(kept / TENSORS), load_file(twin / TENSORS)):
            return f"step {step}: {name}"
        states = [json.loads((folder / STATE).read_text()) for folder in (kept, twin)]
        for key in ("allocator", "rank_history", "skipped", "overflowed", "scaler"):
            if states[0].get(key) != states[1].get(key):
                return f"step {step}: {key.replace('_', ' ')} differs"
    adapters = [load_file(folder / "adapter/native.safetensors") for folder in (one, other)]
    if name := _differing(*adapters):
        return f"after the last step: {name}"
    for name in ("metrics.jsonl", "predictions.jsonl"):
        rows = [_rows(folder / name) for folder in (one, other)]
        for number, pair in enumerate(zip(*rows, strict=False), start=1):
            if pair[0] != pair[1]:
                keys = [key for key in pair[0] if pair[0].get(key) != pair[1].get(key)]
                return f"{name}, line {number}: {', '.join(keys) or 'its keys'} differs"
        if len(rows[0]) != len(rows[1]):
            return f"{name}: {len(rows[0])} rows and {len(rows[1])}"
    return None


def _differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> str:
    """The first tensor that differs and by how much, or nothing."""
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other:
            return f"{name} is in one run alone"
        a, b = one[name], other[name]
        if a.shape != b.shape:
            return f"{name} is {tuple(a.shape)} and {tuple(b.shape)}"
        if a.dtype != b.dtype or not torch.equal(a, b):
            largest = float((a.double() - b.double()).abs().max())
            return (
                f"{name} differs in {int((a != b).sum())} of {a.numel()} values, by {largest:.3g}"
            )
    return ""


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(_TIMED)} for row in rows]


def check(overrides: Sequence[str]) -> bool:
    """Run train.py twice with these overrides and print what was found; whether all is equal.

    Raises ValueError, with the end of what it printed, if a run fails.
    """
    given = {override.partition("=")[0].lstrip("+") for override in overrides}
    steps = [] if "train.steps" in given else [f"train.steps={STEPS}"]
    kept = ["train.checkpoint_every=1", "train.keep_checkpoints=null", "train.log_every=1"]
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root, name) for name in ("first", "second")]
        for folder in folders:
            call = [sys.executable, str(ROOT / "train.py"), "tracking=none", *steps, *overrides]
            done = subprocess.run(
                [*call, *kept, f"run_dir={folder}"], capture_output=True, text=True
            )
            if done.returncode:
                last = (done.stderr or done.stdout).strip().splitlines()[-1:]
                raise ValueError(f"the {folder.name} run failed: {' '.join(last)}")
        about = json.loads((folders[0] / "environment.json").read_text())
        result = json.loads((folders[0] / "result.json").read_text())
        packages = about["packages"]
        print(
            f"{result['variant']} on {result['base']}, seed {result['seed']}, "
            f"{result['steps']} steps, twice\n"
            f"torch {packages['torch']}, {about['device']}, {about['threads']} threads, "
            f"{about['accelerator'] or about['processor']}, kernels {about['cpu_capability']}, "
            f"matmul precision {about['matmul_precision']}"
        )
        where = first_difference(*folders)
    print(f"DIFFERENT: {where}." if where else "equal to the bit: every step and prediction.")
    return where is None


def main() -> None:
    """The command line `python -m harness.loop.repeat`."""
    parser = cli.parser("harness.loop.repeat", __doc__)
    parser.add_argument("overrides", nargs="*", help="of train.py")
    options = parser.parse_args()

    def act(options: argparse.Namespace) -> None:
        if not check(options.overrides):
            sys.exit(1)

    cli.run(act, options)


if __name__ == "__main__":
    main()
