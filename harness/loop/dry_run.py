"""Build everything, take a few steps, say what a run would take, keep nothing."""

from collections.abc import Callable, Iterator
from typing import Any

from harness.loop import show
from harness.loop.meter import WARMUP_STEPS, Meter
from harness.loop.step import StepResult
from harness.memory.estimate import Plan


def run(
    take_step: Callable[..., StepResult],
    gauge: Meter,
    batches: Iterator[Any],
    steps: int,
    example: str,
    plan: Plan,
) -> None:
    """Print one tokenised example and estimates of time and memory for a run of `steps`.

    Steps at rate 0, the warm-up and one more that is timed.
    """
    for step in range(1, WARMUP_STEPS + 2):
        gauge.step(step, take_step, batches=batches, rate_factor=0.0)
    minutes = gauge.step_s[-1] * steps / 60
    peak = show.size(gauge.memory()["train_peak_bytes"])
    if (expected := plan.total_bytes(gauge.peak_shape)) is not None:
        peak += f" (estimated {show.size(expected)})"
    print(f"{example}\n")
    took = f"{minutes:.1f} min" if minutes >= 1 else f"{60 * minutes:.0f} s"
    print(f"about {took} for {steps} steps without evaluation, peak {peak}")
    print("dry run: nothing was written")
