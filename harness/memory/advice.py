"""Advice when memory has run out: the overrides that help most, and by how much."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from harness.config import build
from harness.memory.estimate import BatchShape, Estimate, Estimator
from harness.words import size

SETTINGS = yaml.safe_load(Path(__file__).with_name("settings.yaml").read_text())
ADVICE = 4  # overrides that are named


def is_out_of_memory(error: BaseException) -> bool:
    """True if a device, or the host, had no memory left."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def out_of_memory(config: Mapping[str, Any], task: Any = None) -> str:
    """One message: what was needed, and what each of four overrides would make of it.

    Args:
        task: the run's; None to make it of the config.
    """
    device = config["train"]["device"]
    task = build.make(config, "task") if task is None else task
    labels, rows = task.labels, config["train"]["batch_size"]
    shape = BatchShape(rows, task.max_tokens, padded=rows > 1)
    try:
        limit = build.outline_base(config, labels).max_tokens
        shape = dataclasses.replace(shape, tokens=min(shape.tokens, limit))
        now = Estimator(config, labels).at(shape)
        effects = [
            (_estimate(config, labels, shape, changes), text)
            for changes, text in remedies(config, shape)
        ]
    except Exception:  # the cause is known; that its size is not must not hide it
        texts = [text for _, text in remedies(config, shape)][:ADVICE]
        return f"{device} is out of memory; what helps: {'; '.join(texts)}."
    effects.sort(key=lambda pair: pair[0].total_bytes)
    lines = [
        f"{device} is out of memory. For {shape.rows} rows of {shape.tokens} tokens a step needs "
        f"about {now}. What helps most, one by one:"
    ]
    width = max(len(text) for _, text in effects)
    lines += [
        f"  {text:<{width}}  {size(then.total_bytes)}, "
        f"{size(now.total_bytes - then.total_bytes)} less"
        for then, text in effects[:ADVICE]
        if then.total_bytes < now.total_bytes
    ]
    return "\n".join(lines)


def remedies(config: Mapping[str, Any], shape: BatchShape) -> list[tuple[dict[str, Any], str]]:
    """The changes to a config that may lower its peak, dotted key -> value, and as overrides."""
    train, found = config["train"], []

    def offer(**changes: Any) -> None:
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        texts = (f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in dotted.items())
        found.append((dotted, " ".join(texts)))

    if not train["activation_checkpointing"]:
        offer(train__activation_checkpointing=True)
    if (rows := train["batch_size"]) > 1:  # the same gradient, but for where the rows are cut
        offer(
            train__batch_size=(rows + 1) // 2,
            train__accumulation=2 * train["accumulation"],
        )
    if shape.tokens > 1 and "max_tokens" in config["task"]:
        offer(task__max_tokens=shape.tokens // 2)
    if config["model"]["dtype"] == "float32":
        offer(model__dtype="bfloat16", train__compute_dtype="bfloat16")
    store = SETTINGS["small_store"]
    if config["variant"]["store"]["_target_"] != store:
        offer(variant__store___target_=store)
    if "rank" in config["variant"]["adapter"] and config["rank"] > 1:
        offer(rank=config["rank"] // 2)
    return found


def _estimate(
    config: Mapping[str, Any],
    labels: Sequence[str] | None,
    shape: BatchShape,
    changes: Mapping[str, Any],
) -> Estimate:
    changed = copy.deepcopy(dict(config))
    for key, value in changes.items():
        *path, last = key.split(".")
        node = changed
        for part in path:
            node = node[part]
        node[last] = value
    rows, tokens = shape.rows, shape.tokens
    if "train.batch_size" in changes:
        rows = (rows + 1) // 2
    if "task.max_tokens" in changes:
        tokens = changes["task.max_tokens"]
    if "rank" in changes:
        changed["variant"]["adapter"]["rank"] = changes["rank"]
    return Estimator(changed, labels).at(BatchShape(rows, tokens, padded=shape.padded))
