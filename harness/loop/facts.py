"""The facts that a result says: which run it is, what was trained, what it scored and cost."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.config.build import UnderTest
from harness.config.identity import Identity
from harness.config.settings import Settings
from harness.disk.digest import digest
from harness.disk.inputs import named_files
from harness.disk.inputs import record as files_record
from harness.loop import sessions
from harness.loop.checkpoint import RunState
from harness.loop.step import NonFiniteLoss
from harness.machine import distributed, hardware
from harness.memory.estimate import Plan
from harness.models.base import BaseModel
from harness.tasks.base import Task
from harness.tasks.batch import Batch, Evaluation
from harness.tracking import NoTracker
from variants.layer import AdapterLinear


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


# ---- the result ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Held:
    """The parts that all runs of one comparison share.

    Args:
        plan: the estimate of the memory that a run needs.
        start: gives the layers an adapter's values to start from; see `build.under_test`.
        batches_from: batches of train from one on, for this seed and size.
        read: makes the record of the files that were read, see `inputs`.
    """

    schedule: Callable[[int, int], float]
    tracker: NoTracker
    task: Task
    plan: Plan
    base: BaseModel
    start: Callable[..., list[str]]
    batches_from: Callable[..., Iterator[Batch]]
    read: Callable[[], dict[str, Any] | None]
    environment: dict[str, Any]
    identity: Identity


def environment(settings: Settings, base: BaseModel) -> dict[str, Any]:
    """The causes of a result besides its config; see `hardware.environment`."""
    found = hardware.environment(torch.get_num_threads(), settings.device)
    attention = base.model.config._attn_implementation
    return {**found, **distributed.described(settings.strategy), "attention": attention}


def at_start(settings: Settings, held: Held, test: UnderTest) -> dict[str, Any]:
    """The part of a result that is known before the first step, and all that a failed run has."""
    identity, task, base = held.identity, held.task, held.base
    return {
        "status": "complete",
        "variant": test.variant.name,
        "seed": settings.seed,
        "lr": test.variant.lr,
        "steps": settings.train.steps,
        **of_task(task),
        "base": base.name,
        "notes": [*settings.notes, *base.notes],
        **identity.run,
        "control_hash": identity.control_hash,
        "definition": identity.definition,
        "effective_scale": effective_scale(test.layers),
        "parameters": parameters(test.model, test.layers, test.parameters),
        "matrix_weights": test.coverage,
        "environment_hash": digest(held.environment),
    }


def at_end(
    test: UnderTest,
    state: RunState,
    scores: Mapping[str, Evaluation],
    memory: Mapping[str, int | None],
    *,
    seconds: float,
) -> dict[str, Any]:
    """The part that is known when the trained model has been evaluated.

    Args:
        scores: by split, validation among them.
        memory: of the training phase's peak, measured and estimated.
        seconds: from the start of this process's run.
    """
    return {
        "test": None,
        **{split: score.metrics for split, score in scores.items()},
        "generation": scores["validation"].generation,
        "parameters": parameters(test.model, test.layers, test.parameters),
        "active_rank": {path: layer.active_rank() for path, layer in test.layers.items()},
        "rank_history": state.rank_history,
        "skipped_steps": len(state.skipped),
        **state.scaling(),
        **sessions.in_result(state.sessions),
        "time": {**state.meter.times(), "total_s": seconds},
        "memory": {**memory, "base_bytes": frozen_bytes(test.model)},
    }


def check_finite(scores: Mapping[str, Evaluation], steps: int) -> None:
    """Raise NonFiniteLoss unless the loss on every split is a number."""
    for split, score in scores.items():
        if not math.isfinite(score.metrics["loss_nats"]):
            raise NonFiniteLoss(f"the loss on {split} is not finite after {steps} steps.")
