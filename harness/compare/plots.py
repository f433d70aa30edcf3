"""The figures of a report. Each says in its caption over how many seeds it speaks; a figure without
data is left out."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import matplotlib.style
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter

from harness.compare.curves import learning, norms, ranks_over_layers
from harness.compare.findings import Analysis, Arm, Comparison, Interval
from harness.compare.look import (
    INK,
    LOOK,
    Drawing,
    axes,
    ends_of,
    fewer_ticks,
    file_name,
    label_points,
    metric_of,
    png,
    seeds_of,
    shortened,
    styles,
    svg,
)
from harness.compare.swept_plots import over_values
from harness.compare.table import difference_interval, rate, score
from harness.tasks.metrics import unit as unit_of
from harness.words import count

WINDOW = 0.10  # of the best score, down from it: lower points are drawn at the edge
COSTS = {
    "parameters": ("trainable", "trainable parameters", 1.0),
    "time": ("train_s", "training time (s)", 1.0),
    "memory": ("peak_bytes", "peak memory of training (MiB)", 2.0**20),
}


class Picture(NamedTuple):
    """A figure as PNG, and its caption."""

    png: bytes
    caption: str


def figures(analysis: Analysis) -> dict[str, str]:
    """Name -> SVG text, the same bytes for the same analysis, in the order of a page."""
    return _drawn(analysis, svg)


def pictures(analysis: Analysis) -> dict[str, Picture]:
    """The same figures under the same names, for W&B, which shows no SVG."""
    return _drawn(analysis, lambda drawing: Picture(png(drawing), drawing.caption))


Form = TypeVar("Form")


def _drawn(analysis: Analysis, render: Callable[[Drawing], Form]) -> dict[str, Form]:
    with matplotlib.style.context(LOOK):
        return {
            drawing.name: render(drawing)
            for draw in (_forest, over_values, _rates, _costs, _forgetting, learning,
                         ranks_over_layers, norms)
            for drawing in draw(analysis)
        }  # fmt: skip


# ---- paired differences --------------------------------------------------------------------------


def _forest(analysis: Analysis) -> Iterator[Drawing]:
    shown, study, style = analysis.comparisons, analysis.study, styles(analysis)
    if not shown:
        return
    name, _, unit = metric_of(analysis)
    figure, ax = axes(height=1.0 + 0.62 * len(shown))
    side = ax.get_yaxis_transform()
    ends = {c.arm: [*ends_of(c.difference), *ends_of(c.simultaneous), *ends_of(c.bootstrap)]
            for c in shown}  # fmt: skip
    reaches = [
        unit * max(map(abs, ends[c.arm]))
        for c in shown
        if c.primary or not any(other.primary for other in shown)
    ]
    limit = 1.05 * min(max(reaches), 4 * float(np.median(reaches))) or 0.01 * unit
    for row, one in enumerate(shown):
        y, look, d = -row, style[one.arm], one.difference
        text = f"{difference_interval(d, study.metric)}, n = {d.n}"
        ax.text(0.005, y + 0.34, shortened(one.arm), transform=side, weight="bold", va="center")
        ax.text(0.995, y + 0.34, text, transform=side, va="center", ha="right", size=9)
        seeds = [unit * value for value in one.differences.values() if d.n > 1]
        ax.plot(seeds, [y] * len(seeds), "|", color=INK, alpha=0.45, markersize=7)
        for interval, at, width, alpha in (
            (one.simultaneous, y, 1.2, 1.0),
            (d, y, 4.0, 1.0),
            (one.bootstrap, y - 0.25, 2.5, 0.5),
        ):
            if interval is not None and interval.bounds is not None:
                bounds = [unit * bound for bound in interval.bounds]
                ax.plot(bounds, [at, at], color=look.color, linewidth=width, alpha=alpha,
                        solid_capstyle="butt")  # fmt: skip
        ax.plot(unit * d.estimate, y, look.marker, color=look.color, markersize=7)
        for sign, arrow in ((-1, "<"), (1, ">")):
            if unit * max(sign * end for end in ends[one.arm]) > limit:
                ax.plot(sign * limit, y, arrow, color=look.color, markersize=6, clip_on=False)
        if row:
            ax.axhline(y + 0.57, color=INK, linewidth=0.4, alpha=0.25)
    ax.axvline(0, color=INK, linewidth=1)
    sides = f"{'right' if study.higher_is_better else 'left'} is better"
    points = unit_of(study.metric).of_difference
    ax.set(
        xlim=(-limit, limit),
        ylim=(-len(shown) + 0.5, 0.57),
        yticks=[],
        xlabel=f"test {name} minus that of {shortened(study.reference)}\n"
        f"({f'{points}; {sides}' if points else sides})",
    )
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    marks = [mark for mark in _marks(shown) if mark.there]
    if marks:
        handles = [Line2D([], [], color=INK, label=mark.name, **mark.look) for mark in marks]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
    in_words = sorted(marks, key=lambda mark: mark.look.get("marker") is not None)  # ticks last
    parts = ", ".join(mark.words for mark in in_words) or "one pair each"
    counts = {one.arm: one.difference.n for one in shown}
    yield Drawing(
        "forest",
        f"Paired differences in test {name} from {study.reference}",
        f"Test {name} of each arm minus that of {study.reference}, paired by seed: {parts}. "
        f"An arrow: more lies outside. {seeds_of(counts, 'pair of seeds', 'pairs of seeds')}.",
        figure,
    )


class _Mark(NamedTuple):
    """A kind of mark in the forest: its name and its look in the key, its words in the caption."""

    name: str
    words: str
    there: bool
    look: dict[str, Any]


def _marks(shown: Sequence[Comparison]) -> list[_Mark]:
    return [
        _Mark("95 % t interval", "mean with 95 % t interval (thick)",
              any(c.difference.bounds for c in shown), {"linewidth": 4}),
        _Mark("one pair of seeds", "each pair's difference (ticks)",
              any(c.difference.n > 1 for c in shown),
              {"linestyle": "", "marker": "|", "markersize": 7, "alpha": 0.6}),
        _Mark("all primary ones at once", "the interval for all primary comparisons at once (thin)",
              any(c.simultaneous for c in shown), {"linewidth": 1.2}),
        _Mark("bootstrap, seeds and items", "the bootstrap over seeds and items (lighter, below)",
              any(c.bootstrap for c in shown), {"linewidth": 2.5, "alpha": 0.5}),
    ]  # fmt: skip


# ---- tuning --------------------------------------------------------------------------------------


def _rates(analysis: Analysis) -> Iterator[Drawing]:
    """One sensitivity curve an arm, all with as many decades and the same relative height."""
    grids = {arm.name: grid for arm in analysis.arms if len(set(grid := _grid(arm))) > 1}
    decades = max((math.log10(max(grid) / min(grid)) for grid in grids.values()), default=0.0)
    for index, arm in enumerate(arm for arm in analysis.arms if arm.name in grids):
        yield _rate_curve(analysis, arm, grids[arm.name], decades, index)


def _grid(arm: Arm) -> list[float]:
    """The values of the first tuned key; none if they cannot stand on a logarithmic axis."""
    points = arm.tuning.points if arm.tuning else ()
    values = [next(iter(point.tuned.values())) for point in points]
    return values if all(type(v) in (int, float) and v > 0 for v in values) else []


def _rate_curve(
    analysis: Analysis, arm: Arm, grid: list[float], decades: float, index: int
) -> Drawing:
    assert arm.tuning is not None
    tuning, look, (name, label, unit) = arm.tuning, styles(analysis)[arm.name], metric_of(analysis)
    sign = analysis.study.sign
    best = unit * max((point.mean for point in tuning.points), key=lambda mean: sign * mean)
    low, high = sorted((best - sign * WINDOW * abs(best), best + sign * WINDOW / 4 * abs(best)))
    worst = low if sign > 0 else high
    key = next(iter(tuning.points[0].tuned))
    of_rate = key.rpartition(".")[2] == "lr"
    figure, ax = axes(height=2.6)
    lines: dict[str, list[int]] = {}  # a second tuned key: one line for each of its values
    for at, point in enumerate(tuning.points):
        lines.setdefault(str([v for k, v in point.tuned.items() if k != key]), []).append(at)
    for line, dashes in zip(lines.values(), ("-", "--", ":", "-.") * len(lines), strict=False):
        means = [unit * tuning.points[at].mean for at in line]
        ax.semilogx([grid[at] for at in line], means, dashes, color=look.color, marker=look.marker)
    for x, point in zip(grid, tuning.points, strict=True):
        for y in (unit * value for value in point.scores):
            inside = low <= y <= high
            ax.plot(x, y if inside else worst, "o" if inside else "v" if sign > 0 else "^",
                    color=INK, alpha=0.45, markersize=3.5 if inside else 5, clip_on=False,
                    markeredgewidth=0)  # fmt: skip
        if point.diverged:
            ax.plot(x, worst + sign * 0.06 * (high - low), "x", color=INK, markersize=6)
    chosen = tuning.chosen.get(key)
    if isinstance(chosen, int | float):
        ax.axvline(chosen, color=INK, linewidth=1, linestyle="--")
    title = f"{shortened(arm.name)}: {rate(chosen) if isinstance(chosen, float) else chosen}"
    title += "" if tuning.bracketed else ", not bracketed"
    if tuning.band is not None and of_rate:
        ax.axvspan(*tuning.band, color=look.color, alpha=0.15, linewidth=0)
        bottom, top = tuning.band
        width = math.log10(top / bottom)
        title += f"\ngood from {rate(bottom)} to {rate(top)}: {width:.1f} decades"
    middle, reach = math.log10(max(grid) * min(grid)) / 2, decades / 2 + 0.15
    values = sorted(set(grid))
    ticks = values[:: math.ceil(len(values) / 4)]
    ax.set_xticks(ticks, [rate(value) for value in ticks])
    ax.minorticks_off()
    ax.set(
        xlim=(10 ** (middle - reach), 10 ** (middle + reach)),
        ylim=(low, high),
        xlabel="learning rate" if of_rate else key,
        ylabel=f"validation {label}",
        title=title,
    )
    counts = sorted({len(point.scores) for point in tuning.points})
    n = f"{counts[0]}" + (f" to {counts[-1]}" if counts[1:] else "")
    return Drawing(
        f"rate_{index + 1}_{file_name(arm.name)}",
        f"Validation {name} of {arm.name} over its tuned values",
        f"{arm.name}: n = {n} seeds a point, {sum(len(p.scores) for p in tuning.points)} runs.",
        figure,
    )


# ---- costs ---------------------------------------------------------------------------------------


def _costs(analysis: Analysis) -> Iterator[Drawing]:
    for cost, (field, label, unit) in COSTS.items():
        costs = {arm.name: getattr(arm.costs, field) for arm in analysis.arms}
        xs = {name: Interval(x / unit, None, None, 1) for name, x in costs.items() if x}
        yield from _against(analysis, f"cost_{cost}", label, xs, f"{label} (median)")


def _forgetting(analysis: Analysis) -> Iterator[Drawing]:
    for key, name, label in (
        ("kl_nats", "forgetting_kl", "KL from the base on a held-out text (nats)"),
        ("loss_nats", "forgetting_loss", "increase of the loss on a held-out text (nats)"),
    ):
        xs = {arm.name: arm.forgetting[key] for arm in analysis.arms if arm.forgetting}
        says = f"{label}, mean with 95 % t interval"
        yield from _against(analysis, name, label, xs, says, logarithmic=False)


def _against(
    analysis: Analysis,
    name: str,
    label: str,
    xs: Mapping[str, Interval],
    says: str,
    *,
    logarithmic: bool = True,
) -> Iterator[Drawing]:
    """The score of each arm against a cost, of which less is better, with the Pareto front.

    Args:
        xs: of the arms for which it is known.
        logarithmic: if they are far apart.
    """
    style, metric = styles(analysis), analysis.study.metric
    score_name, titled, factor = metric_of(analysis)
    sign = analysis.study.sign
    arms = [arm for arm in analysis.arms if arm.name in xs and arm.score.n]
    if len(arms) < 2:
        return
    at = {arm.name: xs[arm.name].estimate for arm in arms}
    ys = {arm.name: factor * arm.score.estimate for arm in arms}
    best = max(ys.values(), key=lambda y: sign * y)
    # An arm far worse than most would leave no room for the rest: it stands at the edge.
    reach = max(4 * float(np.median([abs(best - y) for y in ys.values()])), 0.01 * abs(best))
    edge, far = best - sign * reach, [n for n, y in ys.items() if abs(best - y) > reach]
    figure, ax = axes(height=3.0)
    points = []
    for arm in arms:
        x, y, look, text = at[arm.name], ys[arm.name], style[arm.name], shortened(arm.name)
        if arm.name in far:
            text, y = f"{text}, {score(arm.score.estimate, metric)}", edge
        elif arm.score.bounds is not None:
            bounds = [factor * bound for bound in arm.score.bounds]
            ax.plot([x, x], bounds, color=look.color, linewidth=1.2)
        if (sides := xs[arm.name].bounds) is not None:
            ax.plot(sides, [y, y], color=look.color, linewidth=1.2)
        ax.plot(x, y, look.marker, color=look.color, markersize=6, clip_on=False)
        points.append((text, x, y))
    if logarithmic and max(at.values()) > 20 * min(at.values()):
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(lambda value, _: count(value))
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel=label, ylabel=f"test {titled}")
    ax.margins(x=0.18, y=0.12)
    worst, top = sorted((edge if far else best - sign * 1.3 * reach, best + sign * reach))
    ax.set_ylim(max(ax.get_ylim()[0], worst), min(ax.get_ylim()[1], top))
    front: list[str] = []
    for arm_name in sorted(at, key=lambda n: (at[n], -sign * ys[n])):
        if not front or sign * (ys[arm_name] - ys[front[-1]]) > 0:
            front.append(arm_name)
    for left, right in pairwise(front):
        ax.plot([at[left], at[right]], [ys[left]] * 2, ":", color=INK, alpha=0.5)
        ax.plot([at[right]] * 2, [ys[left], ys[right]], ":", color=INK, alpha=0.5)
    label_points(figure, ax, points)
    fewer_ticks(ax)
    yield Drawing(
        name,
        f"Test {score_name} against {label}",
        f"Mean test {score_name} with 95 % t interval (from 2 seeds on) against {says}. "
        "Dotted: the Pareto front of the means; where intervals overlap the order is not "
        "known. "
        + ("An arm outside stands at the edge with its score. " if far else "")
        + f"{seeds_of({arm.name: arm.score.n for arm in arms})}.",
        figure,
    )
