"""Figures of what a multirun swept: the score over a number, and a grid of two keys."""

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.ticker import NullLocator

from harness.compare import swept
from harness.compare.arms import name_of, short
from harness.compare.findings import Analysis, Response
from harness.compare.heatmap import heat_map
from harness.compare.look import (
    COLORS,
    INK,
    MARKERS,
    Drawing,
    Style,
    axes,
    ends_of,
    file_name,
    label_ends,
    metric_of,
    seeds_of,
    thin_labels,
)
from harness.compare.table import plain_score

LINES = len(COLORS)  # more are no figure
CELLS = 8  # in a row, with their numbers


def over_values(analysis: Analysis) -> Iterator[Drawing]:
    """A curve for each swept number, with a line for each combination of the other swept keys."""
    for key in analysis.study.varied_keys:
        lines = [response for response in analysis.responses if response.key == key]
        if 0 < len(lines) <= LINES:
            yield _curve(analysis, key, lines)
    yield from _grid(analysis)


def _curve(analysis: Analysis, key: str, lines: Sequence[Response]) -> Drawing:
    name, label, unit = metric_of(analysis)
    arms = {arm.name: arm for arm in analysis.arms}
    figure, ax = axes(height=3.0)
    values = sorted({value for line in lines for value in line.values})
    logarithmic = swept.is_geometric(values)
    style = {name_of(line.others): Style(COLORS[i], MARKERS[i]) for i, line in enumerate(lines)}
    scores = [unit * s for line in lines for arm in line.arms for s in arms[arm].scores.values()]
    bounds = [unit * b for line in lines for arm in line.arms for b in ends_of(arms[arm].score)]
    low, high = _limits(scores, bounds)
    span = values[-1] / values[0] if logarithmic else values[-1] - values[0]
    ends = []
    for index, line in enumerate(lines):
        look = style[name_of(line.others)]
        aside = 0.025 * (index - (len(lines) - 1) / 2)  # of the span, so that bars do not cover
        xs = [x * span**aside if logarithmic else x + span * aside for x in line.values]
        found = [arms[arm] for arm in line.arms]
        means = [unit * arm.score.estimate for arm in found]
        ax.plot(xs, means, color=look.color, marker=look.marker, markersize=6)
        for x, arm in zip(xs, found, strict=True):
            seeds = [unit * score for score in arm.scores.values()]
            if len(seeds) > 1:
                ax.plot([x] * len(seeds), seeds, "o", color=INK, alpha=0.3, markersize=3,
                        markeredgewidth=0)  # fmt: skip
            if arm.score.bounds is not None:
                ends_at = [unit * bound for bound in arm.score.bounds]
                ax.plot([x, x], ends_at, color=look.color, linewidth=1.6, alpha=0.8)
                for end, limit, arrow in zip(ends_at, (low, high), "v^", strict=True):
                    if (end > limit) == (arrow == "^") and end != limit:
                        ax.plot(x, limit, arrow, color=look.color, markersize=6, clip_on=False)
        ax.plot(xs[line.best], means[line.best], "o", color=look.color, markersize=12,
                fillstyle="none", markeredgewidth=1.2)  # fmt: skip
        if line.smallest is not None:
            at = line.smallest
            ax.plot(xs[at], means[at], "s", color=look.color, markersize=15, fillstyle="none",
                    markeredgewidth=1.2)  # fmt: skip
        ends.append((name_of(line.others), xs[-1], min(max(means[-1], low), high)))
    if logarithmic:
        ax.set_xscale("log")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(values, [short(value) for value in values])
    ax.set(xlabel=key, ylabel=f"test {label}", ylim=(low, high))
    thin_labels(figure, ax)
    if len(lines) > 1:
        label_ends(ax, ends, style)
    title = f"Test {name} over {key}"
    counts = {arm: arms[arm].score.n for line in lines for arm in line.arms}
    several = " with 95 % t intervals, dots are single seeds" * (max(counts.values()) > 1)
    square = (
        "Square: the smallest value whose score cannot be told from the best one's, by paired "
        "differences that hold for all values at once; the bars are not paired. "
    ) * any(line.smallest is not None for line in lines)
    outside = "An arrow: more lies outside. " * (min(bounds) < low or high < max(bounds))
    caption = f"{title}: means{several}. {outside}Ring: the best mean. {square}{seeds_of(counts)}."
    return Drawing(f"varied_{file_name(key)}", title, caption, figure)


def _limits(scores: Sequence[float], bounds: Sequence[float]) -> tuple[float, float]:
    """The axis of the scores: whole intervals, as far as they reach no further beyond the scores
    than these are apart. Intervals of two seeds would leave no room for the curve."""
    spread = max(scores) - min(scores) or 0.05 * abs(scores[0]) or 1.0
    low = max(min(scores) - spread, min([*bounds, *scores]))
    high = min(max(scores) + spread, max([*bounds, *scores]))
    room = 0.06 * (high - low) or spread
    return low - room, high + room


def _grid(analysis: Analysis) -> Iterator[Drawing]:
    found = swept.grid(analysis.study)
    if found is None:
        return
    down, across, at = found
    name, label, unit = metric_of(analysis)
    first, second = analysis.study.varied_keys
    scores = {arm.name: arm.score for arm in analysis.arms if arm.score.n}
    cells = np.full((len(down), len(across)), np.nan)
    for (row, column), _ in np.ndenumerate(cells):
        if (arm := at.get((short(down[row]), short(across[column])))) in scores:
            cells[row, column] = unit * scores[str(arm)].estimate
    known = cells[~np.isnan(cells)]
    if not known.size:
        return
    scale = Normalize(float(known.min()), float(known.max()) or 1.0)
    figure, ax = axes(height=1.1 + 0.3 * len(down))
    heat_map(
        ax,
        cells,
        scale=scale,
        label=f"test {label}",
        text=(lambda value: plain_score(value / unit, analysis.study.metric))
        if len(across) <= CELLS
        else None,
    )
    ax.set_xticks(np.arange(len(across)) + 0.5, [short(value) for value in across])
    ax.set_yticks(np.arange(len(down)) + 0.5, [short(value) for value in down])
    ax.invert_yaxis()
    ax.set(xlabel=second, ylabel=first)
    title = f"Test {name} by {first} and {second}"
    counts = {arm: score.n for arm, score in scores.items()}
    yield Drawing("varied_grid", title, f"{title}: means. {seeds_of(counts)}.", figure)
