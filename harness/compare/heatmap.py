"""Heat maps: a matrix as coloured cells, and a model's layers as such a matrix."""

import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from harness.compare.look import axes, shortened

FITS = 30  # characters of a row's cells, without the name of the module


def heat_map(
    ax: Axes,
    values: NDArray[np.float64],
    *,
    scale: Normalize,
    label: str,
    text: Callable[[float], str] | None,
    size: float = 8.5,
    aspect: int = 12,
) -> Colorbar:
    """Colour a cell for each of `values` (rows, columns), none for NaN, and draw the colour bar.

    Args:
        label: of the bar.
        text: value -> the text in its cell; None for no text.
        aspect: of the bar, long over wide.
    """
    colors = colormaps["cividis"].resampled(32)  # a bar of more than 50 would be a bitmap
    mesh = ax.pcolormesh(np.ma.masked_invalid(values), cmap=colors, norm=scale)
    for (row, column), value in np.ndenumerate(values):
        if text is not None and not np.isnan(value):
            color = "white" if scale(value) < 0.55 else "black"
            ax.text(column + 0.5, row + 0.5, text(value), size=size, ha="center", va="center",
                    color=color)  # fmt: skip
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    return ax.figure.colorbar(mesh, ax=ax, label=label, pad=0.02, aspect=aspect)


def layer_map(
    values: Mapping[str, float | None],
    *,
    title: str,
    scale: Normalize,
    label: str,
    text: Callable[[float], str],
) -> tuple[Figure, Colorbar]:
    """A value of each layer, by its path: blocks along x, modules along y.

    Cells hold their numbers where there is room for all.
    """
    places = {path: place(path) for path in values}
    blocks = sorted({block for block, _ in places.values()}, key=lambda b: (b is None, b))
    modules = list(dict.fromkeys(module for _, module in places.values()))
    cells = np.full((len(modules), len(blocks)), np.nan)
    for path, (block, module) in places.items():
        value = values[path]
        cells[modules.index(module), blocks.index(block)] = np.nan if value is None else value
    longest = max((len(text(value)) for value in cells[~np.isnan(cells)]), default=0)
    figure, ax = axes(height=1.0 + 0.23 * len(modules))
    fits = longest * len(blocks) <= FITS
    bar = heat_map(ax, cells, scale=scale, label=label, text=text if fits else None)
    every = math.ceil(len(blocks) / 12)
    ax.set_xticks(
        np.arange(0, len(blocks), every) + 0.5,
        ["none" if block is None else str(block) for block in blocks][::every],
    )
    ax.set_yticks(np.arange(len(modules)) + 0.5, short_names(modules))
    ax.invert_yaxis()
    ax.set(xlabel="block", title=shortened(title))
    return figure, bar


def place(path: str) -> tuple[int | None, str]:
    """bert.encoder.layer.5.attention.self.query -> 5, attention.self.query"""
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", path)
    return (int(found[1]), found[2]) if found else (None, path)


def short_names(names: Sequence[str]) -> list[str]:
    """Each name's shortest ending, in whole parts, that no other name has; the name itself where
    it is the ending of another."""
    short = []
    for name in names:
        parts = name.split(".")
        endings = [".".join(parts[-i:]) for i in range(1, len(parts) + 1)]
        own = (e for e in endings if sum(f".{n}".endswith(f".{e}") for n in names) == 1)
        short.append(next(own, name))
    return short
