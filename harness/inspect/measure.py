"""Trained adapters measured layer by layer, and two of them compared.

Where a layer has a row gain g, W' - W = diag(g) (W + s B A) - W is not low-rank. Spectrum, ranks,
amplification and subspaces are then those of s B A, the low-rank part of its direction; norms and
the change of magnitude and direction are those of W' - W itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.adapter.native import Restored
from harness.adapter.restore import restore
from harness.adapter.start import fingerprint
from harness.config import build
from harness.inspect import spectrum
from harness.inspect.spectrum import Chance, LowRank
from variants import AdapterLinear, LowRankLinear
from variants.inject import weight_of


@dataclass(frozen=True, kw_only=True)
class Singular:
    """Singular values of a matrix, descending, and its ranks by them; None where it is 0.

    Args:
        rank_90: the fewest directions with 90 % of the squared Frobenius norm.
    """

    singular_values: Sequence[float]
    effective_rank: float | None
    stable_rank: float | None
    rank_90: int

    @staticmethod
    def of(S: Tensor) -> dict[str, Any]:
        return {
            "singular_values": S.tolist(),
            "effective_rank": spectrum.effective_rank(S),
            "stable_rank": spectrum.stable_rank(S),
            "rank_90": spectrum.rank_for(S, 0.9),
        }


@dataclass(frozen=True, kw_only=True)
class DenseMeasures(Singular):
    """The measures that take SVDs of dense matrices.

    Args:
        singular_values: of W' - W where that is not s B A; else empty.
        own_top_norm: ||U^T W V||_F for W's own first r directions, r as of the layer's s B A.
        cosines: of each leading left singular vector of W' to the nearest one of W.
    """

    own_top_norm: float | None
    cosines: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Layer(Singular):
    """One adapted layer. A measure is None where it is not defined.

    Args:
        rank: active.
        singular_values: of s B A, descending; 0 where they are rounding.
        numerical_rank: how many are not.
        low_rank_norm: ||s B A||_F.
        delta_norm: ||W' - W||_F.
        projected_norm: ||U^T W V||_F, with U and V of s B A.
        random_projected_norm: the same for random U and V.
        delta_magnitude, delta_direction: see `spectrum.Rows`.
    """

    path: str
    shape: tuple[int, int]
    rank: int
    scale: float
    gained: bool
    numerical_rank: int
    weight_norm: float
    low_rank_norm: float
    delta_norm: float
    projected_norm: float | None
    random_projected_norm: float | None
    delta_magnitude: float
    delta_direction: float | None
    dense: DenseMeasures | None

    @property
    def relative_size(self) -> float | None:
        """||W' - W|| / ||W||"""
        return _ratio(self.delta_norm, self.weight_norm)

    @property
    def amplification(self) -> float | None:
        """||s B A|| / ||U^T W V||"""
        return _ratio(self.low_rank_norm, self.projected_norm)

    @property
    def random_amplification(self) -> float | None:
        return _ratio(self.low_rank_norm, self.random_projected_norm)

    @property
    def own_amplification(self) -> float | None:
        return _ratio(self.low_rank_norm, self.dense.own_top_norm if self.dense else None)

    def intruders(self, epsilon: float) -> int | None:
        """The number of leading directions of W' with a cosine below epsilon; None unless dense."""
        return None if self.dense is None else sum(c < epsilon for c in self.dense.cosines)


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """One run, measured.

    Args:
        name: of the run's folder.
        seed, base_sha256: None of an adapter that PEFT has saved, which does not say.
        sha256: of the adapter's files.
        subspaces: path -> s B A, for comparisons.
        notes: sentences that a reader should know.
    """

    name: str
    variant: str
    seed: int | None
    base: str
    base_sha256: str | None
    sha256: str
    layers: Mapping[str, Layer]
    subspaces: Mapping[str, LowRank]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Side:
    """phi(i, j) of the inputs' or of the outputs' subspaces of one layer, with its control."""

    phi: Tensor  # p q
    chance: Chance


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two runs compared: path -> Side; a layer that is 0 in one of them is missing."""

    first: str
    second: str
    right: Mapping[str, Side]  # subspaces of the input, spanned by rows of A
    left: Mapping[str, Side]  # subspaces of the output, spanned by columns of B
    notes: tuple[str, ...]


def inspect_run(path: Path, name: str, *, dense: bool, top: int) -> Inspected:
    """Measure a run's adapter, or an adapter, on the CPU.

    Args:
        dense: compute SVDs of W and W' too.
        top: leading directions of W' that are looked at then.

    Raises ValueError if it cannot be loaded, or if no layer has an update to look at.
    """
    run = restore(path)
    if not any(layer.active_rank() for layer in run.layers.values()):
        raise ValueError(
            f"{name} adapts no weight matrix (its layers have neither factors nor a trained W), "
            "so there is nothing to inspect."
        )
    trained = (p for p, layer in run.layers.items() if layer.active_rank())
    unfactored = [p for p in trained if not isinstance(run.layers[p], LowRankLinear)]
    if unfactored and not dense:
        raise ValueError(
            f"{name} has no factors to look at in {unfactored[0]}; --dense compares its weight "
            "with the base's."
        )
    dropped = [path for path in unfactored if run.layers[path].store is None]
    originals = _base_weights(run, dropped) if dropped else {}
    measured = {
        p: measure_layer(p, layer, originals.get(p), dense=dense, top=top)
        for p, layer in run.layers.items()
    }
    return Inspected(
        name=name,
        variant=run.variant.name,
        seed=run.config["seed"] if run.fingerprints else None,
        base=run.base.name,
        base_sha256=run.fingerprints.get("base"),
        sha256=fingerprint(run.folder),
        layers={p: layer for p, (layer, _) in measured.items()},
        subspaces={p: update for p, (_, update) in measured.items()},
        notes=run.notes,
    )


def compare(first: Inspected, second: Inspected) -> Pair:
    """Similarity of the subspaces of s B A, layer by layer. Raises ValueError unless both runs
    adapt the same layers."""
    for one, other in ((first, second), (second, first)):
        for path, layer in one.layers.items():
            if path not in other.layers:
                raise ValueError(
                    f"{one.name} adapts {path}, which {other.name} does not: only runs with the "
                    "same layers can be compared."
                )
            if layer.shape != (shape := other.layers[path].shape):
                raise ValueError(
                    f"{path} is {layer.shape[0]} x {layer.shape[1]} in {one.name} and "
                    f"{shape[0]} x {shape[1]} in {other.name}: only runs with the same layers can "
                    "be compared."
                )
    notes = []
    if None in (first.base_sha256, second.base_sha256):
        if first.base != second.base:
            notes.append(f"their bases have different names, {first.base} and {second.base}.")
    elif first.base_sha256 != second.base_sha256:
        notes.append("they start from different bases.")
    if first.seed is not None and first.seed == second.seed:
        notes.append(
            f"both have seed {first.seed}: what they draw alike at the start, A above all, can "
            "make their right subspaces similar before any training."
        )
    both = {p: (first.subspaces[p], second.subspaces[p]) for p in first.layers}
    both = {p: (P, Q) for p, (P, Q) in both.items() if P.rank and Q.rank}
    return Pair(
        first=first.name,
        second=second.name,
        right={p: _side(P.V, Q.V) for p, (P, Q) in both.items()},
        left={p: _side(P.U, Q.U) for p, (P, Q) in both.items()},
        notes=tuple(f"{first.name} and {second.name}: {note}" for note in notes),
    )


def compare_all(runs: Sequence[Inspected]) -> list[Pair]:
    """Every pair of `runs` that has low-rank updates on both sides."""
    pairs = [compare(first, second) for first, second in combinations(runs, 2)]
    return [pair for pair in pairs if pair.right]


def _side(P: Tensor, Q: Tensor) -> Side:
    chance = spectrum.similarity_by_chance(P.shape[0], P.shape[1], Q.shape[1])
    return Side(phi=spectrum.similarity(P, Q), chance=chance)


def _base_weights(run: Restored, paths: Sequence[str]) -> dict[str, Tensor]:
    """The layers' weights before training, from the base that the adapter names."""
    model = build.load_base(run.config, run.labels).model
    sites = {path: site for path in paths if (site := run.layers[path].site) is not None}
    return {p: weight_of(model.get_submodule(s.owner), s) for p, s in sites.items()}


@torch.no_grad()
def measure_layer(
    path: str, layer: AdapterLinear, original: Tensor | None, *, dense: bool, top: int
) -> tuple[Layer, LowRank]:
    """One layer, and its s B A.

    Args:
        original: W, where the layer no longer has it.
    """
    W = layer.base_weight() if original is None else original.float()
    scale = 1.0 if layer.scale is None else layer.scale
    gain, B, A = None, W.new_zeros(len(W), 0), W.new_zeros(0, W.shape[1])
    if isinstance(layer, LowRankLinear):
        gain, (B, A) = layer.gain(), layer.factors()
    update = spectrum.low_rank(B, A, scale)
    moved = spectrum.rows(W, B, A, scale, gain)
    shape, found = (layer.out_features, layer.in_features), None
    if dense:
        adapted = layer.adapted_weight()
        found = spectrum.dense(W, adapted, top)
        if not isinstance(layer, LowRankLinear):
            moved = spectrum.rows_of_dense(W, adapted)
    r = update.rank
    measured = Layer(
        path=path,
        shape=shape,
        rank=layer.active_rank(),
        scale=scale,
        gained=gain is not None,
        **Singular.of(update.S),
        numerical_rank=r,
        weight_norm=moved.norm_W,
        low_rank_norm=update.norm,
        delta_norm=moved.norm_delta,
        projected_norm=spectrum.projected_norm(W, update) if r else None,
        random_projected_norm=spectrum.random_projected_norm(moved.norm_W, shape, r) if r else None,
        delta_magnitude=moved.delta_magnitude,
        delta_direction=moved.delta_direction,
        dense=None if found is None else _dense_measures(found, r, gain is not None or not r),
    )
    return measured, update


def _dense_measures(found: spectrum.Dense, r: int, differs: bool) -> DenseMeasures:
    return DenseMeasures(
        **Singular.of(found.S if differs else found.S[:0]),
        own_top_norm=float(found.own_top[r - 1]) if r else None,
        cosines=found.cosines.tolist(),
    )


def _ratio(part: float, whole: float | None) -> float | None:
    return part / whole if whole else None
