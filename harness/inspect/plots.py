"""The figures of an inspection. A figure without data is left out."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib import colormaps
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm, Normalize
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from harness.compare.curves import _place as place
from harness.compare.curves import _short as short_names
from harness.compare.svg import (
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
from harness.inspect.report import Report, by_kind, correlation, kind, number, spectrum_of

EMPTY_GROUP = re.compile(r'<g id="[^"]*"/>\n?')  # of a line without points; ids would repeat


def figures(report: Report) -> dict[str, str]:
    """Name -> SVG text, the same bytes for the same report, in the order of the page."""
    with matplotlib.style.context(["default", LOOK]):
        return {
            drawing.name: EMPTY_GROUP.sub("", svg(drawing))
            for draw in (_spectra, _sizes, _amplification, _scatters, _intruders, _pairs, _ranks)
            for drawing in draw(report)
        }


def _numbered(report: Report) -> Iterator[tuple[str, Inspected]]:
    """The end of a figure's name, and its run."""
    for index, run in enumerate(report.runs):
        yield f"{index + 1}_{file_name(run.name)}", run


def _styles(run: Inspected) -> dict[str, Style]:
    """A colour and a marker for each kind of layer."""
    kinds = list(by_kind(run))
    looks = [(COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i in range(len(kinds))]
    return {name: Style(*look) for name, look in zip(kinds, looks, strict=True)}


def _short_kinds(run: Inspected) -> dict[str, str]:
    """Each kind's name, as short as it can be told apart."""
    kinds = list(by_kind(run))
    return dict(zip(kinds, short_names(kinds), strict=True))


def _plain_numbers(axis: Axis) -> None:
    """0.002 and not 2 x 10^-3, which needs a renderer of formulas, on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


# ---- spectra -------------------------------------------------------------------------------------


def _spectra(report: Report) -> Iterator[Drawing]:
    for end, run in _numbered(report):
        style, short = _styles(run), _short_kinds(run)
        lines = {
            path: [s for s in spectrum_of(run.layers[path])[0] if s > 0] for path in run.layers
        }
        if not any(lines.values()):
            continue
        figure, ax = axes(height=_with_key(style))
        for path, values in lines.items():
            look = style[kind(path)]
            marker = look.marker if len(values) <= 32 else ""
            ax.plot(range(1, len(values) + 1), values, color=look.color, marker=marker,
                    markersize=3, linewidth=0.9, alpha=0.8)  # fmt: skip
        ax.set_yscale("log")
        _plain_numbers(ax.yaxis)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.set(xlabel="j", ylabel=f"singular value σⱼ of {_update(run)}", title=shortened(run.name))
        _key(figure, {short[name]: look for name, look in style.items()})
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


def _map(
    name: str,
    title: str,
    run: Inspected,
    get: Callable[[Layer], float | None],
    *,
    label: str,
    scale: Normalize,
    caption: str,
) -> Drawing | None:
    """A value of each layer: blocks along x, modules along y."""
    places = {path: place(path) for path in run.layers}
    blocks = sorted({block for block, _ in places.values()}, key=lambda b: (b is None, b))
    modules = list(dict.fromkeys(module for _, module in places.values()))
    values = np.full((len(modules), len(blocks)), np.nan)
    for path, (block, module) in places.items():
        value = get(run.layers[path])
        values[modules.index(module), blocks.index(block)] = np.nan if value is None else value
    if np.isnan(values).all():
        return None
    figure, ax = axes(height=1.05 + 0.23 * len(modules))
    every = math.ceil(len(blocks) / 12)
    colors = colormaps["cividis"].resampled(32)  # a bar of more than 50 would be a bitmap
    mesh = ax.pcolormesh(np.ma.masked_invalid(values), cmap=colors, norm=scale)
    longest = max(len(f"{value:.2g}") for value in values[~np.isnan(values)])
    fits = longest * len(blocks) <= 30  # characters, beside the names of the modules
    for (row, column), value in np.ndenumerate(values):
        if fits and not np.isnan(value):
            color = "white" if scale(value) < 0.55 else "black"
            ax.text(column + 0.5, row + 0.5, f"{value:.2g}", size=8, ha="center", va="center",
                    color=color)  # fmt: skip
    bar = figure.colorbar(mesh, ax=ax, label=label, pad=0.02, aspect=12)
    if isinstance(scale, LogNorm):
        _plain_numbers(bar.ax.yaxis)
    ax.set_xticks(
        np.arange(0, len(blocks), every) + 0.5,
        ["none" if block is None else str(block) for block in blocks][::every],
    )
    ax.set_yticks(np.arange(len(modules)) + 0.5, short_names(modules))
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.invert_yaxis()
    ax.set(xlabel="block", title=shortened(run.name))
    return Drawing(name, title, caption, figure)


def _sizes(report: Report) -> Iterator[Drawing]:
    known = [
        s for run in report.runs for layer in run.layers.values() if (s := layer.relative_size)
    ]
    if not known:
        return
    scale = _log_scale(known)
    for end, run in _numbered(report):
        if drawing := _map(
            f"size_{end}",
            f"Relative size of dW in {run.name}",
            run,
            lambda layer: layer.relative_size or None,
            label="‖dW‖ / ‖W‖",
            scale=scale,
            caption=f"{run.name}: ‖dW‖ / ‖W‖ (Frobenius) of each layer"
            + ("; one scale for all runs." if len(report.runs) > 1 else "."),
        ):
            yield drawing


def _log_scale(values: Sequence[float]) -> Normalize:
    low, high = min(values), max(values)
    return LogNorm(low, high) if high > 1.01 * low else LogNorm(low / 1.5, high * 1.5)


def _ranks(report: Report) -> Iterator[Drawing]:
    layers = [layer for run in report.runs for layer in run.layers.values()]
    highest = max((layer.rank for layer in layers if layer.singular_values), default=0)
    several = "; one scale for all runs." if len(report.runs) > 1 else "."
    for end, run in _numbered(report):
        if len({layer.rank for layer in run.layers.values() if layer.singular_values}) < 2:
            continue  # the same rank everywhere: the table says it
        if drawing := _map(
            f"rank_active_{end}",
            f"Active rank in {run.name}",
            run,
            lambda layer: layer.rank,
            label="active rank",
            scale=Normalize(0, highest),
            caption=f"{run.name}: active rank of each layer{several}",
        ):
            yield drawing
    effective = [e for layer in layers if (e := spectrum_of(layer)[1]) is not None]
    if not effective:
        return
    for end, run in _numbered(report):
        if drawing := _map(
            f"rank_effective_{end}",
            f"Effective rank of {_update(run)} in {run.name}",
            run,
            lambda layer: spectrum_of(layer)[1],
            label="effective rank",
            scale=Normalize(0, max(effective)),
            caption=f"{run.name}: exp(entropy) of the singular values of {_update(run)}, each "
            f"layer{several}",
        ):
            yield drawing


# ---- amplification -------------------------------------------------------------------------------


def _amplification(report: Report) -> Iterator[Drawing]:
    values: dict[str, Callable[[Layer], float | None]] = {
        "W's own top": lambda layer: layer.own_amplification,
        "random U, V": lambda layer: layer.random_amplification,
        "U, V of sBA": lambda layer: layer.amplification,
    }
    marks: dict[str, dict[str, Any]] = {
        "W's own top": {"marker": "x", "color": INK, "markersize": 4, "alpha": 0.7},
        "random U, V": {"marker": "|", "color": INK, "markersize": 8, "alpha": 0.7},
        "U, V of sBA": {"marker": "o", "color": COLORS[0], "markersize": 4.5, "alpha": 0.8},
    }
    if not report.dense:
        del values["W's own top"]
    for end, run in _numbered(report):
        if all(layer.amplification is None for layer in run.layers.values()):
            continue
        kinds = by_kind(run)
        figure, ax = axes(height=1.35 + 0.27 * len(kinds))
        for row, layers in enumerate(kinds.values()):
            for what, get in values.items():
                x = [value for layer in layers if (value := get(layer)) is not None]
                ax.plot(x, [row] * len(x), linestyle="", **marks[what])
        ax.set_xscale("log")
        _plain_numbers(ax.xaxis)
        ax.set_yticks(range(len(kinds)), list(_short_kinds(run).values()))
        ax.set_ylim(len(kinds) - 0.4, -0.6)
        ax.grid(axis="y", visible=False)
        ax.set(xlabel="‖sBA‖ / ‖UᵀWV‖", title=shortened(run.name))
        handles = [Line2D([], [], linestyle="", label=what, **marks[what]) for what in values]
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
        style, short = _styles(run), _short_kinds(run)
        figure, ax = axes(height=_with_key(style))
        drawn = set()
        for path, layer in run.layers.items():
            if layer.delta_direction is not None and layer.delta_norm > 0:
                look = style[kind(path)]
                drawn.add(kind(path))
                ax.plot(layer.delta_direction, layer.delta_magnitude, look.marker, color=look.color,
                        markersize=5, alpha=0.85)  # fmt: skip
        if not drawn:
            continue
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(4))
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.margins(0.08)
        ax.set(xlabel="change of direction ΔD", ylabel="change of magnitude ΔM",
               title=shortened(run.name))  # fmt: skip
        _key(figure, {short[name]: style[name] for name in style if name in drawn})
        found = correlation(run)
        yield Drawing(
            f"direction_{end}",
            f"Change of magnitude against change of direction in {run.name}",
            f"{run.name}: one mark a layer. ΔM: mean over rows of |‖w'‖ - ‖w‖|; ΔD: mean over rows "
            "of 1 - cos(w', w). "
            + ("" if found is None else f"Correlation {found:+.2f} over {len(run.layers)} layers."),
            figure,
        )


def _with_key(style: Mapping[str, Style]) -> float:
    """Height of a figure with a key below it, in inches."""
    return 2.6 + 0.19 * math.ceil(len(style) / 2)


def _key(figure: matplotlib.figure.Figure, style: Mapping[str, Style]) -> None:
    handles = [
        Line2D([], [], linestyle="", marker=look.marker, color=look.color, label=name, markersize=5)
        for name, look in style.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)


# ---- intruder dimensions -------------------------------------------------------------------------


def _intruders(report: Report) -> Iterator[Drawing]:
    if not report.dense:
        return
    for end, run in _numbered(report):
        style, short = _styles(run), _short_kinds(run)
        figure, ax = axes(height=_with_key(style))
        shift = np.linspace(-0.3, 0.3, len(style)) if len(style) > 1 else [0.0]
        for path, layer in run.layers.items():
            assert layer.dense is not None
            at = list(style).index(kind(path))
            look, cosines = style[kind(path)], layer.dense.cosines
            x = np.arange(1, len(cosines) + 1) + shift[at]
            ax.plot(x, cosines, look.marker, color=look.color, markersize=3.5, alpha=0.8)
        ax.axhline(report.epsilon, color=INK, linewidth=1, linestyle="--")
        ax.set_ylim(0, 1.03)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(
            xlabel="left singular vector of W', by singular value",
            ylabel="cosine to nearest of W",
            title=shortened(run.name),
        )
        _key(figure, {short[name]: look for name, look in style.items()})
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
    colors = colormaps["cividis"].resampled(32)
    mesh = ax.pcolormesh(phi, cmap=colors, norm=Normalize(0, 1))
    figure.colorbar(mesh, ax=ax, label="φ(i, j)", pad=0.02, aspect=20)
    rows, columns = phi.shape
    for axis, n in ((ax.yaxis, rows), (ax.xaxis, columns)):
        ticks = range(0, n, math.ceil(n / 8))
        axis.set_ticks([tick + 0.5 for tick in ticks], [str(tick + 1) for tick in ticks])
    if rows * columns <= 100:
        for (i, j), value in np.ndenumerate(phi):
            color = "white" if value < 0.55 else "black"
            ax.text(j + 0.5, i + 0.5, f"{value:.2f}".removeprefix("0"), size=7, ha="center",
                    va="center", color=color)  # fmt: skip
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
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
