"""The figures of an inspection. A figure without data is left out."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from harness.compare.heatmap import heat_map, layer_map
from harness.compare.look import (
    COLORS,
    INK,
    LOOK,
    MARKERS,
    Drawing,
    Style,
    axes,
    file_name,
    shortened,
    svg,
)
from harness.inspect.measure import Inspected, Layer, Pair, Side
from harness.inspect.report import Report, by_kind, correlation, number, short_kinds, spectrum_of
from harness.words import kind_of


def figures(report: Report) -> dict[str, str]:
    """Name -> SVG text, the same bytes for the same report, in the order of the page."""
    with matplotlib.style.context(LOOK):
        return {
            drawing.name: svg(drawing)
            for draw in (_spectra, _sizes, _amplification, _scatters, _intruders, _pairs, _ranks)
            for drawing in draw(report)
        }


def _numbered(report: Report) -> Iterator[tuple[str, Inspected]]:
    """The end of a figure's name, and its run."""
    for index, run in enumerate(report.runs):
        yield f"{index + 1}_{file_name(run.name)}", run


def _keyed(run: Inspected, paths: Sequence[str]) -> tuple[Figure, Axes, dict[str, Style]]:
    """An empty figure of some layers, with a key to their kinds; each layer's colour and marker."""
    kinds = list(by_kind(run))
    looks = {
        name: (short, Style(COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]))
        for i, (name, short) in enumerate(zip(kinds, short_kinds(kinds), strict=True))
    }
    style = {path: looks[kind_of(path)][1] for path in paths}
    shown = [look for name, look in looks.items() if name in set(map(kind_of, paths))]
    figure, ax = axes(height=2.6 + 0.19 * math.ceil(len(shown) / 2))
    handles = [
        Line2D([], [], linestyle="", marker=look.marker, color=look.color, label=name, markersize=5)
        for name, look in shown
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    ax.set_title(shortened(run.name))
    return figure, ax, style


def _plain_numbers(axis: Axis) -> None:
    """0.002 and not 2 x 10^-3, which needs a renderer of formulas, on a logarithmic axis. Where
    it is short, 1, 2 and 5 of a decade would leave a tick or none."""
    low, high = sorted(axis.get_view_interval())
    short = high < 8 * low
    axis.set_major_locator(MaxNLocator(4) if short else LogLocator(subs=(1, 2, 5), numticks=7))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


# ---- spectra -------------------------------------------------------------------------------------


def _spectra(report: Report) -> Iterator[Drawing]:
    for end, run in _numbered(report):
        spectra = {path: [s for s in spectrum_of(layer).singular_values if s > 0]
                   for path, layer in run.layers.items()}  # fmt: skip
        lines = {path: values for path, values in spectra.items() if values}
        if not lines:
            continue
        figure, ax, style = _keyed(run, list(lines))
        for path, values in lines.items():
            marker = style[path].marker if len(values) <= 32 else ""
            ax.plot(range(1, len(values) + 1), values, color=style[path].color, marker=marker,
                    markersize=3, linewidth=0.9, alpha=0.8)  # fmt: skip
        ax.set_yscale("log")
        _plain_numbers(ax.yaxis)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.set(xlabel="j", ylabel=f"singular value σⱼ of {_update(run)}")
        yield Drawing(
            f"spectrum_{end}",
            f"Singular values of {_update(run)} in {run.name}",
            f"{run.name}: singular values of {_update(run)}, a line for each layer; values that "
            "rounding explains are left out.",
            figure,
        )


def _update(run: Inspected) -> str:
    whole = all(not layer.singular_values for layer in run.layers.values())
    return "W' - W" if whole else "sBA"


# ---- maps of blocks and modules ------------------------------------------------------------------


def _maps(
    report: Report,
    name: str,
    get: Callable[[Layer], float | None],
    *,
    title: str,
    label: str,
    scale: Normalize,
    wanted: Callable[[Inspected], bool] | None = None,
) -> Iterator[Drawing]:
    """A map of a value of each layer for each run that has it, all with one scale.

    Args:
        title: may name what is decomposed as {update}.
        label: of the scale.
        wanted: of a run, whether it gets one; all do if absent.
    """
    several = "; one scale for all runs." if len(report.runs) > 1 else "."
    for end, run in _numbered(report):
        values = {path: get(layer) for path, layer in run.layers.items()}
        if (wanted and not wanted(run)) or all(value is None for value in values.values()):
            continue
        figure, bar = layer_map(
            values, title=run.name, scale=scale, label=label, text=lambda value: f"{value:.2g}"
        )
        if isinstance(scale, LogNorm):
            _plain_numbers(bar.ax.yaxis)
        what = title.format(update=_update(run))
        caption = f"{run.name}: {what[0].lower()}{what[1:]} of each layer{several}"
        yield Drawing(f"{name}_{end}", f"{what} in {run.name}", caption, figure)


def _sizes(report: Report) -> Iterator[Drawing]:
    sizes = [layer.relative_size for run in report.runs for layer in run.layers.values()]
    if known := [size for size in sizes if size]:
        low, high = min(known), max(known)
        yield from _maps(
            report,
            "size",
            lambda layer: layer.relative_size or None,
            title="Relative size ‖dW‖ / ‖W‖ (Frobenius)",
            label="‖dW‖ / ‖W‖",
            scale=LogNorm(low, high) if high > 1.01 * low else LogNorm(low / 1.5, high * 1.5),
        )


def _ranks(report: Report) -> Iterator[Drawing]:
    def differ(run: Inspected) -> bool:
        return len({layer.rank for layer in run.layers.values() if layer.singular_values}) > 1

    layers = [layer for run in report.runs for layer in run.layers.values()]
    yield from _maps(
        report,
        "rank_active",
        lambda layer: layer.rank,
        title="Active rank",
        label="active rank",
        scale=Normalize(0, max((one.rank for one in layers if one.singular_values), default=1)),
        wanted=differ,  # else the table says it
    )
    effective = [e for layer in layers if (e := spectrum_of(layer).effective_rank) is not None]
    yield from _maps(
        report,
        "rank_effective",
        lambda layer: spectrum_of(layer).effective_rank,
        title="Effective rank, exp(entropy of singular values), of {update}",
        label="effective rank",
        scale=Normalize(0, max(effective, default=1.0)),
    )


# ---- amplification -------------------------------------------------------------------------------


def _amplification(report: Report) -> Iterator[Drawing]:
    marks: list[tuple[Callable[[Layer], float | None], dict[str, Any]]] = [
        (lambda layer: layer.own_amplification,
         {"label": "W's own top", "marker": "x", "color": INK, "markersize": 4, "alpha": 0.7}),
        (lambda layer: layer.random_amplification,
         {"label": "random U, V", "marker": "|", "color": INK, "markersize": 8, "alpha": 0.7}),
        (lambda layer: layer.amplification,
         {"label": "U, V of sBA", "marker": "o", "color": COLORS[0], "markersize": 4.5,
          "alpha": 0.8}),
    ][0 if report.dense else 1 :]  # fmt: skip
    for end, run in _numbered(report):
        if all(layer.amplification is None for layer in run.layers.values()):
            continue
        kinds = by_kind(run)
        figure, ax = axes(height=1.35 + 0.27 * len(kinds))
        for row, layers in enumerate(kinds.values()):
            for get, look in marks:
                x = [value for layer in layers if (value := get(layer)) is not None]
                ax.plot(x, [row] * len(x), linestyle="", **look)
        ax.set_xscale("log")
        _plain_numbers(ax.xaxis)
        ax.set_yticks(range(len(kinds)), short_kinds(list(kinds)))
        ax.set_ylim(len(kinds) - 0.4, -0.6)
        ax.grid(axis="y", visible=False)
        ax.set(xlabel="‖sBA‖ / ‖UᵀWV‖", title=shortened(run.name))
        handles = [Line2D([], [], linestyle="", **look) for _, look in marks]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
        own = "; crosses: for W's own first directions" if report.dense else ""
        yield Drawing(
            f"amplification_{end}",
            f"Amplification in {run.name}",
            f"{run.name}: ‖sBA‖ over ‖UᵀWV‖, one mark a layer, with U and V of sBA; bars: expected "
            f"for random U and V{own}. Right of the bars, the update favours directions that W "
            "has less of than chance gives.",
            figure,
        )


# ---- magnitude and direction ---------------------------------------------------------------------


def _scatters(report: Report) -> Iterator[Drawing]:
    for end, run in _numbered(report):
        points = {
            path: (layer.delta_direction, layer.delta_magnitude)
            for path, layer in run.layers.items()
            if layer.delta_direction is not None and layer.delta_norm > 0
        }
        if not points:
            continue
        figure, ax, style = _keyed(run, list(points))
        for path, (x, y) in points.items():
            look = style[path]
            ax.plot(x, y, look.marker, color=look.color, markersize=5, alpha=0.85)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(4))
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.margins(0.08)
        ax.set(xlabel="change of direction ΔD", ylabel="change of magnitude ΔM")
        found = correlation(run)
        yield Drawing(
            f"direction_{end}",
            f"Change of magnitude against change of direction in {run.name}",
            f"{run.name}: one mark a layer. ΔM: mean over rows of |‖w'‖ - ‖w‖|; ΔD: mean over rows "
            "of 1 - cos(w', w). "
            + ("" if found is None else f"Correlation {found:+.2f} over {len(run.layers)} layers."),
            figure,
        )


# ---- intruder dimensions -------------------------------------------------------------------------


def _intruders(report: Report) -> Iterator[Drawing]:
    if not report.dense:
        return
    for end, run in _numbered(report):
        figure, ax, style = _keyed(run, list(run.layers))
        kinds = list(by_kind(run))
        shift = dict(zip(kinds, np.linspace(-0.3, 0.3, len(kinds) + 2)[1:-1], strict=True))
        for path, layer in run.layers.items():
            assert layer.dense is not None
            look, cosines = style[path], layer.dense.cosines
            x = np.arange(1, len(cosines) + 1) + shift[kind_of(path)]
            ax.plot(x, cosines, look.marker, color=look.color, markersize=3.5, alpha=0.8)
        ax.axhline(report.epsilon, color=INK, linewidth=1, linestyle="--")
        ax.set_ylim(0, 1.03)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(
            xlabel="left singular vector of W', by singular value", ylabel="cosine to nearest of W"
        )
        count = sum(layer.intruders(report.epsilon) or 0 for layer in run.layers.values())
        yield Drawing(
            f"intruders_{end}",
            f"Intruder dimensions in {run.name}",
            f"{run.name}: how near each of the first {report.top} left singular vectors of W' is "
            f"to one of W, one mark a layer and vector. Below {number(report.epsilon)} (dashed) "
            f"it is an intruder dimension: {count} in {len(run.layers)} layers.",
            figure,
        )


# ---- two runs ------------------------------------------------------------------------------------


def _pairs(report: Report) -> Iterator[Drawing]:
    for index, pair in enumerate(report.pairs):
        for name, factor, sides in (("right", "A", pair.right), ("left", "B", pair.left)):
            yield _similarity(f"similarity_{index + 1}_{name}", name, factor, pair, sides)


def _similarity(
    name: str, side: str, factor: str, pair: Pair, sides: Mapping[str, Side]
) -> Drawing:
    phi, chance = _mean_over_layers(sides)
    figure, ax = axes(height=3.1)
    rows, columns = phi.shape
    heat_map(
        ax,
        phi,
        scale=Normalize(0, 1),
        label="φ(i, j)",
        text=(lambda value: f"{value:.2f}".removeprefix("0")) if phi.size <= 100 else None,
        size=7,
        aspect=20,
    )
    for axis, n in ((ax.yaxis, rows), (ax.xaxis, columns)):
        ticks = range(0, n, math.ceil(n / 8))
        axis.set_ticks([tick + 0.5 for tick in ticks], [str(tick + 1) for tick in ticks])
    ax.set(
        xlabel=f"j, {shortened(pair.second)}",
        ylabel=f"i, {shortened(pair.first)}",
        title=f"{side} subspaces ({factor})",
    )
    return Drawing(
        name,
        f"Similarity of the {side} subspaces of {pair.first} and {pair.second}",
        f"{pair.first} and {pair.second}: φ(i, j) of the first i and j {side} singular vectors of "
        f"sBA, mean over {len(sides)} layers. By chance: {chance[0, 0]:.3f} at (1, 1), "
        f"{chance[-1, -1]:.3f} at ({rows}, {columns}).",
        figure,
    )


def _mean_over_layers(sides: Mapping[str, Side]) -> tuple[np.ndarray, np.ndarray]:
    """phi and its mean by chance, at each (i, j) over the layers that have so many directions."""
    rows = max(side.phi.shape[0] for side in sides.values())
    columns = max(side.phi.shape[1] for side in sides.values())
    found = np.full((2, len(sides), rows, columns), np.nan)
    for at, side in enumerate(sides.values()):
        i, j = side.phi.shape
        found[0, at, :i, :j], found[1, at, :i, :j] = side.phi.numpy(), side.chance.mean.numpy()
    return np.nanmean(found[0], axis=0), np.nanmean(found[1], axis=0)
