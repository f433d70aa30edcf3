"""The parts of a step: its operations by kind, timed by torch's profiler.

An operation's time is its own, without those that it calls. The profiler takes time too, which is
counted to none of them but lies in `other`: a profile says where the time goes, not how long a step
takes.
"""

import os
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from harness.bench.measure import FIRST_STEP
from harness.bench.rows import Row
from harness.compare.table import aligned
from harness.machine.timing import interleaved

WIDE, SKINNY, ATTENTION = "wide products", "low-rank products", "attention"
PASSES, OPTIMIZER, OTHER = "passes over tensors", "optimiser", "other"
KINDS = (WIDE, SKINNY, ATTENTION, PASSES, OPTIMIZER, OTHER)
NOTE = """low-rank: a matrix product with a side of at most the rank. Passes: all that goes over a
tensor once: sums, gains, masks, activations, norms, copies. Other: Python, autograd, profiler."""

_PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")}


def kind_of(operation: str, shapes: Sequence[Sequence[int]], rank: int) -> str:
    """One of KINDS for an operation with operands of these shapes."""
    if operation in _PRODUCTS:
        sides = [side for shape in shapes if len(shape) > 1 for side in shape[-2:]]
        return SKINNY if min(sides) <= rank else WIDE
    if "scaled_dot_product" in operation:
        return ATTENTION
    if "fused_adamw" in operation:
        return OPTIMIZER
    return PASSES if operation.startswith("aten::") else OTHER


def profiled(row: Row, number: int, rank: int) -> dict[str, float]:
    """Seconds of one step by kind; together, the step."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would announce itself
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        start = time.perf_counter()
        row.passes(number)
        row.update(number)
        whole = time.perf_counter() - start
    seconds = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages(group_by_input_shape=True):
        shapes = [shape for shape in event.input_shapes if isinstance(shape, list)]
        seconds[kind_of(event.key, shapes, rank)] += event.self_cpu_time_total / 1e6
    seconds[OTHER] = max(0.0, whole - sum(seconds[kind] for kind in KINDS if kind != OTHER))
    return seconds


def profile(rows: Sequence[Row], rounds: int, rank: int) -> dict[str, dict[str, float]]:
    """Gives, per row, the median seconds of each kind over interleaved rounds."""

    def step(row: Row) -> Callable[[int], dict[str, float]]:
        return lambda number: profiled(row, FIRST_STEP + number, rank)

    found = interleaved({row.name: step(row) for row in rows}, rounds)
    return {
        name: {kind: median(one[kind] for one in steps) for kind in KINDS}
        for name, steps in found.items()
    }


def table(rows: Sequence[dict]) -> str:
    """Milliseconds by kind, and each kind's excess over the floor in per cent of the floor."""
    of = {row["name"]: row["profile_s"] for row in rows}
    body = [["profile, ms (% of its floor)", *KINDS]]
    for row in rows:
        mine, floor = of[row["name"]], of[row["floor"]]
        whole = sum(floor.values())
        cells = [
            f"{1e3 * mine[kind]:.1f}"
            + ("" if mine is floor else f" ({100 * (mine[kind] - floor[kind]) / whole:+.1f})")
            for kind in KINDS
        ]
        body.append([row["name"], *cells])
    return "\n".join(aligned(body))
