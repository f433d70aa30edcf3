"""What a result says of the model that was trained, and the laws that it must not have broken."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from harness.control import base_fingerprint
from variants.base import AdapterLinear

# Largest difference of logits between the merged and the unmerged model that rounding explains.
MERGE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}


class BrokenLaw(RuntimeError):
    """A result that cannot be trusted: the base was written, or merging changed the function."""


def ranks(layers: Mapping[str, AdapterLinear]) -> list[int]:
    return [layer.active_rank() for layer in layers.values()]


def effective_scale(layers: Mapping[str, AdapterLinear]) -> float | dict[str, float] | None:
    """s if it is the same for all layers, else by path; None where nothing is low-rank."""
    scales = {path: layer.scale for path, layer in layers.items() if layer.factors()[1].numel()}
    if len(set(scales.values())) > 1:
        return scales
    return next(iter(scales.values()), None)


def parameters(model: nn.Module, layers: Mapping[str, AdapterLinear], total: int) -> dict[str, int]:
    """trainable: held during training. trainable_final: in use now. total: of the base model."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    pruned = sum(
        sum(p.numel() for p in layer.roles().values()) - layer.active_parameters()
        for layer in layers.values()
    )
    return {"trainable": trainable, "trainable_final": trainable - pruned, "total": total}


def frozen_bytes(model: nn.Module) -> int:
    """Bytes of everything frozen: stores with their codes and scales, embeddings, norms."""
    frozen = (p for p in model.parameters() if not p.requires_grad)
    return sum(p.numel() * p.element_size() for p in frozen)


def merged_max_abs_diff(
    model: nn.Module, layers: Mapping[str, AdapterLinear], inputs: Mapping[str, Tensor]
) -> float:
    """Merge, compare the logits of one batch with the unmerged model's, unmerge."""
    model.eval()
    with torch.no_grad():
        unmerged = model(**inputs).logits
        for layer in layers.values():
            layer.merge()
        merged = model(**inputs).logits
        for layer in layers.values():
            layer.unmerge()
    return float((merged - unmerged).abs().max())


def check_laws(model: nn.Module, before: str, merged_diff: float, dtype: torch.dtype) -> dict:
    """base_fingerprint and merged_max_abs_diff for the result. Raises BrokenLaw."""
    after = base_fingerprint(model)
    if before != after:
        raise BrokenLaw("something wrote the frozen base during the run.")
    if not merged_diff <= MERGE_TOLERANCE[dtype]:
        raise BrokenLaw(f"the merged model's logits differ from the unmerged by {merged_diff:.3g}.")
    fingerprints: dict[str, Any] = {"before": before, "after": after}
    return {"base_fingerprint": fingerprints, "merged_max_abs_diff": merged_diff}
