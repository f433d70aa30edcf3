"""Matches arms before they are compared: by rank, or by trained parameters.

Configs are resolved and plain, those of the arms' jobs. torch is imported only to count.
"""

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from harness.models.base import BaseModel
    from variants import AdapterLinear, Variant


def allocated_rank(config: Mapping[str, Any]) -> int | None:
    """The most directions that an adapted layer may hold; None for a variant without ranks."""
    adapter = config["variant"]["adapter"]
    return adapter.get("max_rank") or adapter.get("rank")


def check_rank(configs: Mapping[str, Mapping[str, Any]], reference: str) -> None:
    """Raise ValueError unless all arms that have a rank share it, and the layers that it is for.

    They are measured against the reference, or against the first arm with a rank if it has none.
    """
    ranked = {arm: config for arm, config in configs.items() if allocated_rank(config) is not None}
    first = reference if reference in ranked else next(iter(ranked), None)
    for arm, config in ranked.items():
        for key in ("rank", "rank_pattern", "targets", "layers"):
            ours, theirs = (
                allocated_rank(c) if key == "rank" else c[key] for c in (config, ranked[str(first)])
            )
            if ours != theirs:
                raise ValueError(
                    f"match=rank: {key} of {arm} is {ours}, that of {first} {theirs}; set them "
                    "alike, or compare them unmatched with hydra.sweeper.match=none."
                )


def match_parameters(
    reference: str, rank: int, arms: Collection[str], count: Callable[[str, int], int]
) -> dict[str, dict[str, Any]]:
    """Finds for each other arm the largest uniform rank, not above the reference's, at which it
    trains no more parameters than the reference.

    Args:
        rank: the reference's.
        count: (arm, rank) -> trained parameters, see `adapter_parameters`.

    Returns arm -> {rank, trainable, gap_frac}, where gap_frac is the share of the reference's
    parameters that the arm does without. Raises ValueError if an arm trains more even at rank 1.
    """
    most = count(reference, rank)
    matched: dict[str, dict[str, Any]] = {}
    for arm in arms:
        for smaller in range(rank, 0, -1):
            if arm == reference or (trainable := count(arm, smaller)) <= most:
                break
        else:
            raise ValueError(
                f"match=parameters: {arm} trains {trainable:,} parameters at rank 1, {reference} "
                f"{most:,} at rank {rank}; give the reference a higher rank."
            )
        trainable = most if arm == reference else trainable
        matched[arm] = {"rank": smaller, "trainable": trainable, "gap_frac": 1 - trainable / most}
    return matched


def adapter_parameters(base: "BaseModel", variant: "Variant", config: Mapping[str, Any]) -> int:
    """Parameters trained in adapted layers, the most that are held at any time; heads not counted.

    Raises ValueError where `inject` does. `base` is left as it was.
    """
    import dataclasses

    from harness.config import build
    from variants import DenseStore

    copy = dataclasses.replace(base, model=_same_weights(base.model))
    dense = dataclasses.replace(variant, store=DenseStore)  # however it is kept: not trained
    layers: Mapping[str, AdapterLinear] = build.adapt(copy, dense, config)
    return sum(p.numel() for layer in layers.values() for p in layer.roles().values())


def _same_weights(model: "PreTrainedModel") -> "PreTrainedModel":
    """Other modules over the same tensors: `inject` swaps modules in place."""
    import copy

    from torch import nn

    tensors = {id(t): nn.Parameter(t.detach(), requires_grad=False) for t in model.parameters()}
    return copy.deepcopy(model, {**tensors, **{id(b): b for b in model.buffers()}})
