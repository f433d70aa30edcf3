"""A learning-rate range test (Smith 2017, arXiv:1506.01186, section 3.3): raise the rate
geometrically over a short run, watch the loss, suggest where to look.

It suggests a grid and decides nothing: the rate at which a short run falls fastest is above the
best rate of a long one, and a variant's rate is chosen by tuning on validation.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness.cli import needs
from harness.config.settings import Settings
from harness.disk.write import make_folder, write_text
from harness.loop.step import NonFiniteLoss, StepResult
from harness.machine import distributed

STEPS = 80
FACTORS = (1e-3, 1e2)  # of the variant's rate, first step and last
SMOOTHING = 0.9  # of the exponential mean of the loss
DIVERGED = 1.5  # times the smallest smoothed loss: stop


def run(
    take_step: Callable[..., StepResult],
    batches: Iterator[Any],
    settings: Settings,
    name: str,
) -> None:
    """Train `STEPS` steps at rising rates; absolute rates, such as a head's, are held.

    Writes rate_test-<name>.json and .svg to the folder of outputs, and prints the suggested grid:
    half decades up to the rate of the steepest fall. Raises ValueError if training diverges at
    once.
    """
    lr, out = settings.config["variant"]["lr"], Path(settings.outputs_dir)
    name = f"rate_test-{name}"
    needs("matplotlib")
    rows: list[dict[str, float]] = []
    mean, smallest = 0.0, math.inf
    for number in range(1, STEPS + 1):
        factor = FACTORS[0] * (FACTORS[1] / FACTORS[0]) ** ((number - 1) / (STEPS - 1))
        try:
            done = take_step(number, batches=batches, rate_factor=factor, absolute_factor=1.0)
        except NonFiniteLoss:
            break
        mean = SMOOTHING * mean + (1 - SMOOTHING) * done.loss_nats
        smoothed = mean / (1 - SMOOTHING**number)
        rows.append({"rate": lr * factor, "loss_nats": done.loss_nats, "smoothed_nats": smoothed})
        smallest = min(smallest, smoothed)
        if number > STEPS // 8 and smoothed > DIVERGED * smallest:
            break
    if len(rows) < 3:
        raise ValueError(f"training diverges at a rate of {lr * factor:.1e}; lower variant.lr.")
    steepest = suggest(rows)
    grid = [steepest * 10 ** (half / 2) for half in range(-4, 1)]
    if not distributed.is_first():
        return
    make_folder(out, "outputs_dir")
    text = json.dumps({"rows": rows, "grid": grid, "config": settings.config}, indent=2)
    write_text(out / f"{name}.json", text + "\n")
    _plot(rows, steepest, out / f"{name}.svg")
    print(f"the loss falls fastest at a rate of {steepest:.1e}; last rate {rows[-1]['rate']:.1e}")
    print("a grid to tune on validation: " + ", ".join(f"{rate:.1e}" for rate in grid))
    print(f"in {out}: {name}.svg, {name}.json")


def suggest(rows: list[dict[str, float]]) -> float:
    """The rate at which the smoothed loss falls fastest per decade, before its minimum."""
    window = max(2, len(rows) // 10)
    losses = [row["smoothed_nats"] for row in rows]
    end = max(window + 1, losses.index(min(losses)) + 1)
    falls = {i: losses[i - window] - losses[i] for i in range(window, min(end, len(losses)))}
    best = max(falls, key=falls.__getitem__) if falls else len(rows) - 1
    return rows[best - window // 2]["rate"]


def _plot(rows: list[dict[str, float]], steepest: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    rates = [row["rate"] for row in rows]
    axes.semilogx(rates, [row["loss_nats"] for row in rows], ".", color="0.7", label="one batch")
    axes.semilogx(rates, [row["smoothed_nats"] for row in rows], label="smoothed")
    axes.axvline(steepest, color="C3", linestyle="--", label=f"fastest fall, {steepest:.1e}")
    axes.set(xlabel="learning rate", ylabel="training loss (nats)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
