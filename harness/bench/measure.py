"""Measures rows interleaved in one process, so that their comparisons are paired.

Each round times every row once and begins one row later than the last; rows with the same peer are
neighbours. A ratio is the median over rounds of the ratios within a round, with a 95 % interval
from order statistics (none below 6 rounds).

Memory is counted, not sampled: the bytes of all tensors that a forward and backward pass makes, at
their peak, by `harness.memory.trace.LiveBytes`. The model's own tensors and what an optimiser keeps
are not in it, nor what a kernel allocates and frees unseen. On a GPU, and of compiled models, it
is what torch's allocator gave out.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

from harness.bench.rows import FIRST_STEP, INTERVAL, Row
from harness.loop.meter import peak_tensor_bytes
from harness.machine.timing import WARMUP_ROUNDS, interleaved, median_interval
from harness.memory.trace import LiveBytes

T = TypeVar("T")

MAX_ROUNDS = INTERVAL - WARMUP_ROUNDS - 3  # no allocator acts among the steps that are timed


class Seconds(NamedTuple):
    """The time of one step: of its forward and backward passes, and of the whole."""

    passes: float
    step: float


def timed(row: Row, number: int) -> Seconds:
    start = _now(row)
    row.passes(number)
    halfway = _now(row)
    row.update(number)
    return Seconds(halfway - start, _now(row) - start)


def _now(row: Row) -> float:
    """The time in seconds, after what the row has asked of a GPU is done."""
    if row.device.type == "cuda":
        torch.cuda.synchronize(row.device)
    return time.perf_counter()


def measure(rows: Sequence[Row], rounds: int) -> dict[str, list[Seconds]]:
    """Times one step of each row in each round."""

    def step(row: Row) -> Callable[[int], Seconds]:
        return lambda number: timed(row, FIRST_STEP + number)

    return interleaved({row.name: step(row) for row in rows}, rounds)


def allocation_seconds(row: Row, seconds: Sequence[Seconds]) -> float | None:
    """The time of a rank allocator's step beyond an ordinary one; None if there is none."""
    if not row.allocates:
        return None
    ordinary = statistics.median(one.step - one.passes for one in seconds)
    at = timed(row, FIRST_STEP - 1 + INTERVAL)
    return max(0.0, at.step - at.passes - ordinary)


def peak_bytes(row: Row) -> int:
    """Measures the peak of the tensors that a forward and backward pass makes."""
    number = FIRST_STEP + WARMUP_ROUNDS + MAX_ROUNDS
    if row.device.type == "cuda":
        before = torch.cuda.memory_allocated(row.device)
        torch.cuda.reset_peak_memory_stats(row.device)
        row.passes(number)
        peak = torch.cuda.max_memory_allocated(row.device) - before
    elif row.compiled:
        peak = peak_tensor_bytes(lambda: row.passes(number))
    else:
        with LiveBytes([*row.model.parameters(), *row.model.buffers()]) as live:
            row.passes(number)
        peak = live.peak
    row.update(number)
    return peak


def summarize(rows: Sequence[Row], times: dict[str, list[Seconds]]) -> list[dict]:
    """Gives plain values for each row, and runs the parts that are measured once."""

    def over(name: str, other: str, part: str = "step") -> dict[str, float | None]:
        pairs = zip(times[name], times[other], strict=True)
        return median_interval([getattr(mine, part) / theirs.step for mine, theirs in pairs])

    peaks = {row.name: peak_bytes(row) for row in rows}
    found = []
    for row in rows:
        floor = row.floor or rows[0].name
        allocation = allocation_seconds(row, times[row.name])
        step = statistics.median(one.step for one in times[row.name])
        found.append(
            {
                "name": row.name,
                "step_s": step,
                "floor": floor,
                "step_over_floor": over(row.name, floor),
                "passes_over_floor": over(row.name, floor, "passes"),
                "peer": row.peer,
                "step_over_peer": over(row.name, row.peer) if row.peer else None,
                "peak_bytes": peaks[row.name],
                "peak_over_floor": peaks[row.name] / peaks[floor],
                "peak_over_peer": peaks[row.name] / peaks[row.peer] if row.peer else None,
                "allocation_s": allocation,
                "allocation_frac": None if allocation is None else allocation / (INTERVAL * step),
                "seconds": [list(one) for one in times[row.name]],
            }
        )
    return found
