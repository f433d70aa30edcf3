"""Measurements as a reader wants them: tables for a terminal and a page, every number as JSON."""

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from harness.compare.heatmap import short_names
from harness.compare.table import Table, aligned
from harness.disk.digest import mapped
from harness.inspect.measure import Inspected, Layer, Pair, Side, Singular
from harness.words import kind_of

FORMAT = 1
DIGITS = 9  # significant, of numbers in JSON


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The measurements of some runs and of their pairs.

    Args:
        dense: whether dense SVDs were asked for.
        top, epsilon: leading left singular vectors of W', and the cosine below which one is an
            intruder dimension.
    """

    runs: Sequence[Inspected]
    pairs: Sequence[Pair]
    dense: bool
    top: int
    epsilon: float

    @property
    def notes(self) -> list[str]:
        """Notes for a reader of the numbers."""
        found = [f"{run.name}: {note}" for run in self.runs for note in run.notes]
        found += [note for pair in self.pairs for note in pair.notes]
        for run in self.runs:
            layers = run.layers.values()
            if any(layer.gained for layer in layers):
                found.append(
                    f"{run.name} scales rows, W' = diag(g) (W + sBA), so that dW is not low-rank: "
                    "ranks, amplification and similarity are those of sBA, the low-rank part of "
                    "its direction; ‖dW‖, ΔM and ΔD are those of dW."
                )
            if any(layer.rank and not layer.singular_values for layer in layers):
                found.append(
                    f"{run.name} trained whole matrices: ranks are those of the dense W' - W, and "
                    "there are no factors to compare with another run's."
                )
            if zero := sum(layer.delta_norm == 0 for layer in layers):
                found.append(f"{run.name}: dW is zero in {zero} of {len(layers)} layers.")
        return found


# ---- numbers -------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Three digits; nothing for None."""
    return "" if value is None else f"{value:.3g}"


def mean(values: Iterable[float | None]) -> float | None:
    """Over those that are known; None if none is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def total(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if known else None


def spectrum_of(layer: Layer) -> Singular:
    """The singular values of sBA, or of W' - W for a layer without factors."""
    return layer if layer.singular_values or layer.dense is None else layer.dense


def short_kinds(kinds: Sequence[str]) -> list[str]:
    """Each kind's name as short as it can be told apart, for figures and telephones."""
    inside = [name.rpartition("*.")[2] for name in kinds]
    return short_names(inside if len(set(inside)) == len(inside) else kinds)


def by_kind(run: Inspected) -> dict[str, list[Layer]]:
    """The layers that have the same place in their blocks, in the model's order."""
    found: dict[str, list[Layer]] = {}
    for path, layer in run.layers.items():
        found.setdefault(kind_of(path), []).append(layer)
    return found


def correlation(run: Inspected) -> float | None:
    """Pearson's, of the change of magnitude and the change of direction over layers."""
    points = [(layer.delta_magnitude, layer.delta_direction) for layer in run.layers.values()]
    x, y = (
        np.array([point for point in points if point[1] is not None], dtype=float).reshape(-1, 2).T
    )
    if len(x) < 3 or not x.std() > 0 or not y.std() > 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


# ---- tables --------------------------------------------------------------------------------------


def _cells(report: Report, layers: Collection[Layer]) -> dict[str, str]:
    """Column -> its text for some layers: mostly the mean over them."""

    def of(get: Callable[[Layer], float | None]) -> str:
        return number(mean(map(get, layers)))

    cells = {
        "rank": of(lambda layer: layer.rank),
        "effective": of(lambda layer: spectrum_of(layer).effective_rank),
        "stable": of(lambda layer: spectrum_of(layer).stable_rank),
        "90 %": of(lambda layer: spectrum_of(layer).rank_90 or None),
        "‖dW‖/‖W‖": of(lambda layer: layer.relative_size),
        "amplified": of(lambda layer: layer.amplification),
        "random": of(lambda layer: layer.random_amplification),
    }
    if any(layer.gained and layer.dense for run in report.runs for layer in run.layers.values()):
        cells["effective dW"] = of(lambda one: one.dense.effective_rank if one.dense else None)
    if report.dense:
        cells["own top"] = of(lambda layer: layer.own_amplification)
    cells["ΔM"] = of(lambda layer: layer.delta_magnitude)
    cells["ΔD"] = of(lambda layer: layer.delta_direction)
    if report.dense:
        cells["intruders"] = number(total(layer.intruders(report.epsilon) for layer in layers))
    return cells


def _shape(layer: Layer) -> str:
    return "{} x {}".format(*layer.shape)


def runs_table(report: Report) -> Table:
    """A line for each run: means over its layers."""
    return Table.of(
        "Runs",
        (
            {
                "run": run.name,
                "layers": str(len(run.layers)),
                **_cells(report, run.layers.values()),
                "corr(ΔM, ΔD)": number(correlation(run)),
            }
            for run in report.runs
        ),
    )


def kinds_table(report: Report, run: Inspected) -> Table:
    """A line for each kind of layer, and one for all."""

    def row(name: str, layers: Collection[Layer], shape: str) -> dict[str, str]:
        about = {"layer": name, "n": str(len(layers)), "o x i": shape}
        return {**about, **_cells(report, layers)}

    rows = []
    for name, layers in by_kind(run).items():
        shapes = set(map(_shape, layers))
        rows.append(row(name, layers, shapes.pop() if len(shapes) == 1 else "various"))
    return Table.of(run.name, [*rows, row("all layers", run.layers.values(), "")])


def layers_table(report: Report, run: Inspected) -> Table:
    """A line for each layer."""
    rows = (
        {"layer": path, "o x i": _shape(layer), "s": number(layer.scale), **_cells(report, [layer])}
        for path, layer in run.layers.items()
    )
    return Table.of(f"Every layer of {run.name}", rows)


def pairs_table(report: Report) -> Table:
    """phi of the first directions and of whole subspaces, means over layers, and by chance."""
    columns = ["runs", "subspace", "layers", "φ(1, 1)", "by chance", "φ(all)", "by chance"]
    rows = []
    for pair in report.pairs:
        for name, sides in (("right (A)", pair.right), ("left (B)", pair.left)):
            cells = [f"{pair.first} and {pair.second}", name, str(len(sides))]
            for at in (0, -1):
                found, chance, std = mean_similarity(sides, at)
                cells += [f"{found:.3f}", f"{chance:.3f} ± {std:.3f}"]
            rows.append(cells)
    return Table("Similarity", columns, rows)


def mean_similarity(sides: Mapping[str, Side], at: int) -> tuple[float, float, float]:
    """phi[at, at] as the mean over layers; mean and standard deviation of that by chance."""
    n = len(sides)
    phi = math.fsum(float(side.phi[at, at]) for side in sides.values()) / n
    chance = math.fsum(float(side.chance.mean[at, at]) for side in sides.values()) / n
    variance = math.fsum(float(side.chance.std[at, at]) ** 2 for side in sides.values())
    return phi, chance, math.sqrt(variance) / n


def text(report: Report) -> str:
    """The report for a terminal."""
    parts = [_aligned(kinds_table(report, run), run.name) for run in report.runs]
    if len(report.runs) > 1:
        parts.append(_aligned(runs_table(report), "All runs"))
    if report.pairs:
        parts.append(_aligned(pairs_table(report), "Similarity of subspaces"))
    notes = list(report.notes)
    if not report.dense:
        notes.append(
            "Intruder dimensions, W's own top directions and the spectrum of a dense dW need "
            "--dense."
        )
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes)])


def _aligned(table: Table, title: str) -> str:
    return "\n".join([title, *aligned([table.columns, *table.rows])])


# ---- JSON ----------------------------------------------------------------------------------------


def json_text(report: Report) -> str:
    """inspect.json: the same bytes for the same adapters and settings."""
    content = {
        "format": FORMAT,
        "settings": {"dense": report.dense, "top": report.top, "epsilon": report.epsilon},
        "notes": report.notes,
        "runs": [_run(run, report.epsilon) for run in report.runs],
        "pairs": [_pair(pair) for pair in report.pairs],
    }
    return json.dumps(mapped(content, _rounded), indent=1, ensure_ascii=False) + "\n"


def _run(run: Inspected, epsilon: float) -> dict[str, Any]:
    layers = {}
    for path, layer in run.layers.items():
        content = dataclasses.asdict(layer)
        del content["path"]
        layers[path] = {
            **content,
            "relative_size": layer.relative_size,
            "amplification": layer.amplification,
            "random_amplification": layer.random_amplification,
            "own_amplification": layer.own_amplification,
            "intruders": layer.intruders(epsilon),
        }
    about = ("name", "variant", "seed", "base", "base_sha256", "sha256")
    return {
        **{key: getattr(run, key) for key in about},
        "magnitude_direction_correlation": correlation(run),
        "layers": layers,
    }


def _pair(pair: Pair) -> dict[str, Any]:
    def sides(of: Mapping[str, Side]) -> dict[str, Any]:
        return {
            path: {
                "phi": side.phi.tolist(),
                "chance_mean": side.chance.mean[-1, -1].item(),
                "chance_std": side.chance.std[-1, -1].item(),
            }
            for path, side in of.items()
        }

    return {"runs": [pair.first, pair.second], "right": sides(pair.right), "left": sides(pair.left)}


def _rounded(leaf: Any) -> Any:
    """A number to DIGITS digits, without the last bits that a library's version changes."""
    return float(f"{leaf:.{DIGITS}g}") if isinstance(leaf, float) else leaf
