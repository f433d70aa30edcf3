"""The facts of a result on the trained model, and the laws that it must not have broken."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.disk.inputs import named_files
from harness.disk.inputs import record as files_record
from harness.loop.checkpoint import trained_state
from harness.machine import distributed
from harness.models.base import BaseModel
from harness.models.fingerprint import tensors_sha256
from harness.tasks.base import Task
from variants.base import AdapterLinear

# Largest difference of logits between the merged and the unmerged model that rounding explains.
MERGE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}


def base_fingerprint(model: nn.Module) -> str:
    """sha256 of every frozen parameter: the same before and after a run, or something wrote the
    base."""
    frozen = sorted((n, p) for n, p in model.named_parameters() if not p.requires_grad)
    return tensors_sha256((name, distributed.whole(p.detach())) for name, p in frozen)


class BrokenLaw(ValueError):
    """A result that cannot be trusted: the base was written, or merging changed the function, or
    what the method consists of was not done."""


def of_task(task: Task) -> dict[str, Any]:
    """The facts on the task that a comparison needs. Call it after `prepare`."""
    return {
        "task": task.name,
        "primary_metric": task.primary_metric,
        "metrics": {name: dataclasses.asdict(metric) for name, metric in task.metrics.items()},
        "classes": task.labels and len(task.labels),
        "rows": {"used": task.counts, "cut": task.truncated_rows, "lost": task.lost_rows},
    }


def inputs(
    config: Mapping[str, Any], task: Task, base: BaseModel, started_from: Iterable[Path]
) -> dict[str, Any] | None:
    """The record in run.json of the files that a run has read; None if they are not all, and
    for the processes that do not write it."""
    if task.remote or not distributed.is_first():
        return None
    return files_record((*named_files(config["task"]), *base.files, *started_from))


def ranks(layers: Mapping[str, AdapterLinear]) -> list[int]:
    return [layer.active_rank() for layer in layers.values()]


def effective_scale(layers: Mapping[str, AdapterLinear]) -> float | dict[str, float] | None:
    """s if it is the same for all layers, else by path; None where nothing is low-rank."""
    scales = {path: layer.scale for path, layer in layers.items() if layer.factors()[1].numel()}
    if len({f"{scale:.12g}" for scale in scales.values()}) > 1:  # alpha / r, but for rounding
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
    """Compare the logits of one batch with the unmerged model's; each layer is merged while it is
    passed through, since a sharded one is whole then alone."""
    model.eval()
    with torch.no_grad():
        unmerged = model(**inputs).logits
        hooks = [
            hook
            for layer in layers.values()
            for hook in (
                layer.register_forward_pre_hook(lambda layer, _: layer.merge()),
                layer.register_forward_hook(lambda layer, *_: layer.unmerge()),
            )
        ]
        merged = model(**inputs).logits
        for hook in hooks:
            hook.remove()
    return float((merged - unmerged).abs().max())


def check_replicas(model: nn.Module, layers: Mapping[str, AdapterLinear]) -> None:
    """Raise BrokenLaw unless all processes hold the same trained values and ranks, to the bit."""
    if distributed.world_size() > 1:
        state = trained_state(model, layers)
        digests = distributed.gather(tensors_sha256(sorted(state.items())))
        if len(set(digests)) > 1:
            raise BrokenLaw("the processes of this run no longer hold the same adapter.")


def check_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise BrokenLaw if a weight that is not trained has a gradient, or asks for one. The loop
    clears those of the trained weights alone, so that a leak is seen at any later time."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if id(parameter) not in trained and (parameter.requires_grad or parameter.grad is not None):
            raise BrokenLaw(f"the frozen weight {name} has a gradient.")


def check_laws(model: nn.Module, before: str, merged_diff: float, dtypes: Sequence[str]) -> dict:
    """base_fingerprint and merged_max_abs_diff for the result. Raises BrokenLaw.

    Args:
        dtypes: that the model is kept in and computes in; the coarsest rounds the logits.
    """
    after = base_fingerprint(model)
    if before != after:
        raise BrokenLaw("something wrote the frozen base during the run.")
    if not merged_diff <= max(MERGE_TOLERANCE[dtype] for dtype in dtypes):
        raise BrokenLaw(f"the merged model's logits differ from the unmerged by {merged_diff:.3g}.")
    fingerprints: dict[str, Any] = {"before": before, "after": after}
    return {"base_fingerprint": fingerprints, "merged_max_abs_diff": merged_diff}
