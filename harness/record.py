"""The facts of a result on the trained model, and the laws that it must not have broken."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness import distributed
from harness.control import base_fingerprint, fingerprint
from harness.export import native, peft_format
from harness.export.folders import adapter_folder
from harness.inputs import model_files, named_files
from harness.inputs import record as files_record
from harness.models.base import BaseModel
from harness.tasks.base import Task
from variants.layer import AdapterLinear
from variants.state import trained_state

# Largest difference of logits between the merged and the unmerged model that rounding explains.
MERGE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}


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


def inputs(config: Mapping[str, Any], task: Task, base: BaseModel) -> dict[str, Any] | None:
    """The record in run.json of the files that a run has read; None if they are not all, and
    for the processes that do not write it."""
    if task.remote or not distributed.is_first():
        return None
    start = Path(config["init_from"]) if config["init_from"] else None
    started_from = model_files(adapter_folder(start)) if start else ()
    return files_record((*named_files(config["task"]), *base.files, *started_from))


def ranks(layers: Mapping[str, AdapterLinear]) -> list[int]:
    return [layer.active_rank() for layer in layers.values()]


def effective_scale(layers: Mapping[str, AdapterLinear]) -> float | dict[str, float] | None:
    """s if it is the same for all layers, else by path; None where nothing is low-rank."""
    scales = {path: layer.scale for path, layer in layers.items() if layer.scale is not None}
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
        digests = distributed.gather(fingerprint(trained_state(model, layers).items()))
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


def write_adapter(
    out: Path,
    base: BaseModel,
    layers: Mapping[str, AdapterLinear],
    labels: Sequence[str] | None,
    fingerprints: Mapping[str, str],
    config: Mapping[str, Any],
) -> int:
    """Write what was trained into the folder `out`, for PEFT too if it is low-rank; the bytes of
    its tensors."""
    about = {
        "base": base.name,
        "fingerprints": fingerprints,
        "labels": labels and list(labels),
        "config": config,
    }

    def write(folder: Path) -> None:
        native.write(folder, model=base.model, layers=layers, about=about)
        with contextlib.suppress(peft_format.NotLowRank):
            peft_format.write(
                folder,
                model=base.model,
                layers=layers,
                base=base.name,
                config=config,
                head=base.head,
            )

    native.write_folder(out, write)
    return (out / native.TENSORS).stat().st_size
