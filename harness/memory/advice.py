"""Advice when memory has run out: the overrides that help most, and by how much."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from harness.config import build
from harness.config.identity import changed
from harness.memory.estimate import BatchShape, Estimate, Estimator
from harness.words import size

SETTINGS = yaml.safe_load(Path(__file__).with_name("settings.yaml").read_text())
ADVICE = 4  # overrides that are named


def is_out_of_memory(error: BaseException) -> bool:
    """True if a device, or the host, had no memory left."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def out_of_memory(config: Mapping[str, Any]) -> str:
    """One message: what was needed, and what each of four overrides would make of it."""
    device, task = config["train"]["device"], build.make(config, "task")
    labels, rows = task.labels, config["train"]["batch_size"]
    shape = BatchShape(rows, task.max_tokens, padded=rows > 1)
    try:
        limit = build.outline_base(config, labels).max_tokens
        shape = dataclasses.replace(shape, tokens=min(shape.tokens, limit))
        now = Estimator(config, labels).at(shape)
        effects = [
            (_estimate(config, labels, shape, changes), _text(changes))
            for changes in remedies(config, shape)
        ]
    except Exception:  # the cause is known; that its size is not must not hide it
        texts = list(map(_text, remedies(config, shape)))[:ADVICE]
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


def remedies(config: Mapping[str, Any], shape: BatchShape) -> list[dict[str, Any]]:
    """The changes to a config that may lower its peak, each dotted key -> value."""
    train, rank, rows = config["train"], config["rank"], config["train"]["batch_size"]
    store, adapter = config["variant"]["store"]["_target_"], config["variant"]["adapter"]
    halved = {"train.batch_size": (rows + 1) // 2, "train.accumulation": 2 * train["accumulation"]}
    offers = [
        (not train["activation_checkpointing"], {"train.activation_checkpointing": True}),
        (rows > 1, halved),  # the same gradient, but for where the rows are cut
        (shape.tokens > 1 and "max_tokens" in config["task"],
         {"task.max_tokens": shape.tokens // 2}),
        (config["model"]["dtype"] == "float32",
         {"model.dtype": "bfloat16", "train.compute_dtype": "bfloat16"}),
        (store != SETTINGS["small_store"], {"variant.store._target_": SETTINGS["small_store"]}),
        ("rank" in adapter and rank > 1, {"rank": rank // 2}),
    ]  # fmt: skip
    return [changes for wanted, changes in offers if wanted]


def _text(changes: Mapping[str, Any]) -> str:
    """The overrides to type."""
    texts = {k: str(v).lower() if isinstance(v, bool) else v for k, v in changes.items()}
    return " ".join(f"{key}={text}" for key, text in texts.items())


def _estimate(
    config: Mapping[str, Any], labels: Sequence[str] | None, shape: BatchShape, changes: Any
) -> Estimate:
    ranks = {"variant.adapter.rank": changes["rank"]} if "rank" in changes else {}
    rows = (shape.rows + 1) // 2 if "train.batch_size" in changes else shape.rows
    tokens = changes.get("task.max_tokens", shape.tokens)
    estimator = Estimator(changed(config, {**changes, **ranks}), labels)
    return estimator.at(BatchShape(rows, tokens, padded=shape.padded))
