"""Figures of what happens inside runs: learning curves, norms of the factors, ranks."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.colors import Normalize

from harness.compare.findings import Analysis
from harness.compare.heatmap import layer_map
from harness.compare.look import Drawing, axes, file_name, label_ends, metric_of, seeds_of, styles
from harness.compare.stats import t_interval
from harness.compare.study import Run
from harness.compare.swept import is_number


def learning(analysis: Analysis) -> Iterator[Drawing]:
    _, label, unit = metric_of(analysis)
    key, label = f"eval/{analysis.study.metric}", f"validation {label}"
    yield from _over_steps(analysis, "learning_validation", key, label, unit=unit)
    label = "training loss (nats)"
    yield from _over_steps(analysis, "learning_train", "train/loss_nats", label, smooth=5)


def norms(analysis: Analysis) -> Iterator[Drawing]:
    for name, formula in (("A", "‖A‖"), ("B", "‖B‖"), ("relative", "s‖BA‖ / ‖W‖")):
        label = f"layer mean of {formula}"
        yield from _over_steps(analysis, f"norm_{name}", f"norm/{name}", label)


def _over_steps(
    analysis: Analysis, name: str, key: str, label: str, *, unit: float = 1.0, smooth: int = 1
) -> Iterator[Drawing]:
    """A row of the curves, at the steps that all runs of an arm have."""
    lines = {}
    for arm in analysis.arms:
        curves = [
            {row["step"]: unit * row[key] for row in run.curve if is_number(row.get(key))}
            for run in _complete(analysis, arm.name)
        ]
        curves = [curve for curve in curves if curve]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        if len(steps) > 1:
            values = np.array([[curve[step] for step in steps] for curve in curves])
            kept = min(smooth, len(steps) - 1)
            means = np.lib.stride_tricks.sliding_window_view(values, kept, axis=1).mean(axis=-1)
            lines[arm.name] = steps[kept - 1 :], means
    if lines:
        note = f" Each run smoothed: mean over {smooth} logged steps." if smooth > 1 else ""
        yield _curves(analysis, name, label, lines, note=note)


def _curves(
    analysis: Analysis,
    name: str,
    label: str,
    lines: Mapping[str, tuple[Sequence[int], np.ndarray]],
    *,
    note: str = "",
    drawstyle: str = "default",
) -> Drawing:
    """Means over runs (rows of values) at steps (columns), with bands, named at their ends."""
    style, ends = styles(analysis), []
    figure, ax = axes(height=3.0)
    for arm, (steps, values) in lines.items():
        color, mean = style[arm].color, values.mean(axis=0)
        ax.plot(steps, mean, color=color, drawstyle=drawstyle)
        if len(values) > 1:
            intervals = [t_interval(column) for column in values.T]
            low, high = [i.low for i in intervals], [i.high for i in intervals]
            step = "post" if drawstyle == "steps-post" else None
            ax.fill_between(steps, low, high, color=color, alpha=0.13, linewidth=0, step=step)  # type: ignore[arg-type]
        ends.append((arm, steps[-1], float(mean[-1])))
    low, high = (f(f(v.mean(axis=0)) for _, v in lines.values()) for f in (min, max))
    room = 0.1 * (high - low) or 0.05 * abs(high) or 1.0  # wide bands may go on outside
    ax.set(xlabel="step", ylabel=label, ylim=(low - room, high + room))
    ax.set_xlim(right=max(x for _, x, _ in ends))
    label_ends(ax, ends, style)
    title = f"{label[0].upper()}{label[1:]} over steps"
    n = seeds_of({arm: len(values) for arm, (_, values) in lines.items()})
    band = any(len(values) > 1 for _, values in lines.values())
    what = "mean and 95 % t interval at each step" if band else "one run each"
    caption = f"{title}: {what}.{note} Without runs that diverged "
    return Drawing(name, title, f"{caption}or failed; {n}.", figure)


# ---- ranks ---------------------------------------------------------------------------------------


def ranks_over_layers(analysis: Analysis) -> Iterator[Drawing]:
    """Changing ranks: their mean over steps, and a map of blocks and modules for each arm."""
    found = {}
    for arm in analysis.arms:
        runs = [run for run in _complete(analysis, arm.name) if run.result.get("active_rank")]
        if any(len(run.result["rank_history"]) > 1 for run in runs):
            found[arm.name] = runs
    if not found:
        return
    lines = {arm: _trajectory(runs) for arm, runs in found.items()}
    label = "layer mean of active rank"
    yield _curves(analysis, "rank_trajectory", label, lines, drawstyle="steps-post")
    highest = max(max(r.result["active_rank"].values()) for runs in found.values() for r in runs)
    for index, (name, runs) in enumerate(found.items()):
        yield _rank_map(name, runs, highest, index)


def _trajectory(runs: Sequence[Run]) -> tuple[list[int], np.ndarray]:
    histories = [
        {row["step"]: float(np.mean(row["ranks"])) for row in run.result["rank_history"]}
        for run in runs
    ]
    last = max(run.result["steps"] for run in runs)
    steps = sorted({last, *(step for history in histories for step in history)})
    held = [[h[max(s for s in h if s <= step)] for step in steps] for h in histories]
    return steps, np.array(held)


def _rank_map(arm: str, runs: Sequence[Run], highest: int, index: int) -> Drawing:
    ranks = {
        path: float(np.mean([run.result["active_rank"][path] for run in runs]))
        for path in runs[0].result["active_rank"]
    }
    figure, _ = layer_map(
        ranks,
        title=arm,
        scale=Normalize(0, highest),
        label="rank",
        text=lambda rank: f"{rank:.1f}".removesuffix(".0"),
    )
    return Drawing(
        f"ranks_{index + 1}_{file_name(arm)}",
        f"Final active rank of {arm} by block and module",
        f"{arm}: active rank of each layer at the end, mean over {seeds_of({arm: len(runs)})}.",
        figure,
    )


# ---- common --------------------------------------------------------------------------------------


def _complete(analysis: Analysis, arm: str) -> list[Run]:
    """The runs that an arm's test score is made of, but for diverged ones."""
    return [r for r in analysis.study.runs if r.arm == arm and r.phase == "compare" and r.complete]
