"""Times of alternatives that take turns, so that a ratio is of one moment and one machine."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")

WARMUP_ROUNDS = 3  # not counted: first touches of memory, optimiser state


def interleaved(steps: Mapping[str, Callable[[int], T]], rounds: int) -> dict[str, list[T]]:
    """Collects what each step returns in each round, without the first few rounds."""
    names = list(steps)
    found: dict[str, list[T]] = {name: [] for name in names}
    for number in range(WARMUP_ROUNDS + rounds):
        for index in range(len(names)):
            name = names[(number + index) % len(names)]
            one = steps[name](number)
            if number >= WARMUP_ROUNDS:
                found[name].append(one)
    return found


def median_interval(values: Sequence[float]) -> dict[str, float | None]:
    """The median and the order statistics that enclose it with at least 95 %.

    With n values, the k-th from either end, k being the largest with P(Binomial(n, 1/2) < k) at
    most 2.5 %.
    """
    n, ordered = len(values), sorted(values)
    k, below = 0, 0.0
    while (below := below + math.comb(n, k) / 2**n) <= 0.025:
        k += 1
    low, high = (ordered[k - 1], ordered[n - k]) if k else (None, None)
    return {"median": statistics.median(ordered), "low": low, "high": high}
