"""The look of figures: a colour and a marker for each arm, labels kept apart, deterministic SVG.

A figure is 324 units wide, for a telephone; a page puts several in a row where there is room.
Marks of neither an arm nor a rank have the colour of the surrounding text, so that a figure is
readable on light and dark pages.
"""

import html
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from harness.compare.findings import Analysis, Interval
from harness.tasks.metrics import title, unit, with_unit
from harness.words import count

TOUCH = 5  # points between labels that are read as two
INK = "#010203"  # becomes currentColor
# Seven colours, at least 3:1 against white and against #14181d (within rounding) and 19 apart in
# CIELAB for normal sight, protanopia, deuteranopia and tritanopia (Machado et al. 2009).
COLORS = ("#2f63e6", "#de7856", "#19731b", "#b28f00", "#d01763", "#399dd9", "#8f5091")
MARKERS = "s^DvPX<>ph*"  # eleven: 77 arms differ
_INKED = ("axes.labelcolor", "axes.edgecolor", "grid.color", "text.color", "xtick.color",
          "ytick.color")  # fmt: skip
LOOK: list[Any] = ["default", Path(__file__).with_name("look.mplstyle"), dict.fromkeys(_INKED, INK)]


class Style(NamedTuple):
    """An arm's colour and matplotlib marker."""

    color: str
    marker: str


class Drawing(NamedTuple):
    """A figure with the name of its file, what it is, and what its reader must know."""

    name: str
    title: str
    caption: str
    figure: Figure


def styles(analysis: Analysis) -> dict[str, Style]:
    """Each arm's style, by its place in the study; the reference has the colour of the text."""
    others = [arm.name for arm in analysis.arms if arm.name != analysis.study.reference]
    looks = [Style(COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i in range(len(others))]
    return {analysis.study.reference: Style(INK, "o"), **dict(zip(others, looks, strict=True))}


def swatch(style: Style) -> str:
    """An arm's marker as a small inline SVG, for tables."""
    marker = MarkerStyle(style.marker)
    outline = np.array(marker.get_path().transformed(marker.get_transform()).to_polygons()[0])
    points = " ".join(f"{10 * x:.2f},{-10 * y:.2f}" for x, y in outline)
    color = "currentColor" if style.color == INK else style.color
    return (
        '<svg class="swatch" viewBox="-7 -7 14 14" aria-hidden="true">'
        f'<polygon points="{points}" fill="{color}"/></svg>'
    )


def shortened(name: str) -> str:
    """An arm's name as far as a figure has room: 20 characters, both ends."""
    return name if len(name) <= 20 else f"{name[:11]}…{name[-8:]}"


def file_name(arm: str) -> str:
    """The part of an arm's name that every file system takes."""
    return re.sub(r"[^A-Za-z0-9]+", "_", arm).strip("_")


def metric_of(analysis: Analysis) -> tuple[str, str, float]:
    """The study's metric, the same with its unit, and that unit's factor."""
    metric = analysis.study.metric
    name, of = title(metric), unit(metric)
    return name, with_unit(name, of.name), of.factor


def seeds_of(counts: Mapping[str, int], one: str = "seed", many: str = "seeds") -> str:
    """n = 8 seeds (dora 7): the most common number, and the arms that have another."""
    ((common, _),) = Counter(counts.values()).most_common(1)
    rest = ", ".join(f"{name} {n}" for name, n in counts.items() if n != common)
    return f"n = {common} {one if common == 1 else many}" + (f" ({rest})" if rest else "")


def axes(height: float) -> tuple[Figure, Axes]:
    """An empty figure, `height` inches high."""
    figure = Figure(figsize=(4.5, height))
    return figure, figure.subplots()


def ends_of(interval: Interval | None) -> list[float]:
    """The numbers of an interval that are known, none of no interval."""
    if interval is None:
        return []
    known = (interval.low, interval.estimate, interval.high)
    return [end for end in known if end is not None]


def _crowded(axes: Axes) -> list[Text]:
    """The labels below drawn axes that would touch the one before them that is kept."""
    crowded, last = list[Text](), -math.inf
    for label in axes.get_xticklabels():
        box = label.get_window_extent()
        if label.get_text() and box.x0 < last + TOUCH:
            crowded.append(label)
        elif label.get_text():
            last = box.x1
    return crowded


def thin_labels(figure: Figure, axes: Axes) -> None:
    """Empty the labels of set ticks that would touch their neighbours; the marks stay."""
    figure.draw_without_rendering()
    crowded = _crowded(axes)
    texts = ["" if label in crowded else label.get_text() for label in axes.get_xticklabels()]
    axes.set_xticks(axes.get_xticks(), texts)


def fewer_ticks(axes: Axes) -> None:
    """Thins out and shortens (100k, 1.2M) numbers below drawn axes that would touch each other."""
    if _crowded(axes):
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(lambda value, _: count(value))


def label_points(figure: Figure, axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Names each point (name, x, y), where it covers the fewest lines, points and names."""
    figure.draw_without_rendering()
    inside = axes.get_window_extent()
    taken = [
        line.get_window_extent().padded(1) for line in axes.lines if line.get_linestyle() != "None"
    ]
    taken += [Bbox([at - 5, at + 5]) for at in axes.transData.transform([p[1:] for p in points])]
    places = [(7, 0, "left", "center"), (-7, 0, "right", "center"), (6, 7, "left", "bottom"),
              (-6, 7, "right", "bottom"), (6, -7, "left", "top"), (-6, -7, "right", "top"),
              (7, 14, "left", "bottom"), (-7, 14, "right", "bottom"), (7, -14, "left", "top"),
              (0, 22, "center", "bottom"), (0, 34, "center", "bottom")]  # fmt: skip
    names = list[Bbox]()  # what covers one of them is read as neither
    for name, x, y in points:
        tried = []
        for dx, dy, ha, va in places:
            text = axes.annotate(
                name, (x, y), (dx, dy), textcoords="offset points", ha=ha, va=va, size=9
            )
            box = text.get_window_extent()
            outside = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0
            covered = box.count_overlaps(taken) + 9 * box.count_overlaps(names)
            tried.append((covered + 9 * outside, text, box))
        best = min(range(len(places)), key=lambda place: tried[place][0])
        names.append(tried[best][2])
        for place, (_, text, _) in enumerate(tried):
            if place != best:
                text.remove()


def label_ends(
    axes: Axes, ends: Iterable[tuple[str, float, float]], style: Mapping[str, Style]
) -> None:
    """Marker and name right of the axes for each line's end (arm, x, y), level with it as far as
    there is room. The axes' limits and scales are final."""
    to_axes = axes.transScale + axes.transLimits
    at = {arm: to_axes.transform((x, y)) for arm, x, y in ends}
    arms = sorted(at, key=lambda arm: at[arm][1])
    gap = 0.075  # of the axes' height: a line of text
    heights = [float(at[arm][1]) for arm in arms]
    for i in range(1, len(arms)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    limit = max(1.0, gap * (len(arms) - 1))
    for i in reversed(range(len(arms))):
        heights[i] = min(heights[i], limit)
        limit = heights[i] - gap
    outside: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
    for arm, height in zip(arms, heights, strict=True):
        (x, y), look = at[arm], style[arm]
        axes.plot([x, 1.05], [y, height], color=look.color, linewidth=0.6, **outside)
        axes.plot(1.05, height, look.marker, color=look.color, **outside)
        axes.text(1.085, height, shortened(arm), transform=axes.transAxes, va="center", size=9)


def png(drawing: Drawing) -> bytes:
    """The figure as a picture on white, for pages that show no SVG."""
    file = io.BytesIO()
    drawing.figure.savefig(file, format="png", dpi=200, facecolor="white")
    return file.getvalue()


def svg(drawing: Drawing) -> str:
    """The figure's SVG text with title, caption and both colour schemes; the same bytes for the
    same drawing. Its ids are its own (they depend on its name), so that a page may hold several."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": drawing.name}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        drawing.figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    box = re.search(r'viewBox="[^"]+"', text)
    assert box is not None
    body = text[text.index(">", box.start()) + 1 :]
    body = re.sub(r'<g id="[^"]*"/>\n *', "", body)  # a line without points
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    body = re.sub(r"<style type.*?</style>", "", body).replace(" \n", "\n")
    body = body.replace(INK, "currentColor").replace("'DejaVu Sans'", "system-ui, sans-serif")
    return (
        f'<svg class="figure" role="img" {box[0]} aria-labelledby="{drawing.name}-title" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">\n'
        f'<title id="{drawing.name}-title">{html.escape(drawing.title)}</title>\n'
        f"<desc>{html.escape(drawing.caption)}</desc>\n"
        "<style>.figure { color: #1c2127 } .figure * { stroke-linejoin: round } "
        "@media (prefers-color-scheme: dark) { .figure { color: #e4e8ec } }</style>"
        f"{body}"
    )
