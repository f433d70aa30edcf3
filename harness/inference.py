"""From a restored model and texts to logits; the texts and the task that its config names.

Shapes: n texts, b of a batch, t tokens (padded), c classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from harness import assembly
from harness.evaluation import evaluating
from harness.export.native import Restored
from harness.tasks.base import Task

_NO_LIMIT = 10**9  # a model that limits nothing says sys.maxsize
# For adapters whose data is not here: short and long, plain and opinionated, prose and a question.
SENTENCES = (
    "The film is a quiet, patient portrait of two people who never quite say what they mean.",
    "Terrible. I want my two hours back.",
    "My card was charged twice for the same purchase, how do I get one of the payments back?",
    "The committee will meet again in March to decide where the new library should stand.",
    "It begins well, and then forgets what it was about.",
    "Shares fell by four per cent after the company lowered its forecast for the second time.",
    "An absolute joy from the first scene to the last!",
    "Water boils at a lower temperature the higher up one goes.",
)


def recorded_task(config: Mapping[str, Any]) -> Task:
    """The task of a run, from its config. Raises ValueError if it names none, one that is not
    among this project's, or one whose data cannot be read."""
    if "task" not in config:
        raise ValueError("the adapter does not say which task it was trained on.")
    assembly.check_recorded(config, ["task"], "the adapter's config")
    try:
        task: Task = assembly.make({"task": {**config["task"], "_partial_": False}}, "task")
    except Exception as error:  # of many kinds, for one: it cannot be had here
        raise ValueError(str(error)) from error
    return task


def sample_texts(restored: Restored, count: int) -> tuple[list[str], str]:
    """Up to `count` real texts and what they are: rows of the run's validation split, or
    `SENTENCES` where its data is not here."""
    try:
        task = recorded_task(restored.config)
    except ValueError:
        return list(SENTENCES[:count]), f"{len(SENTENCES[:count])} built-in sentences"
    texts = task.texts("validation")
    texts = texts[:: max(1, len(texts) // count)][:count]  # a file may be sorted by label
    return texts, f"{len(texts)} validation rows of {task.name}"


def token_limit(restored: Restored) -> int | None:
    """The length at which the run cut its rows, special tokens included; None if nothing did."""
    limit = restored.base.max_tokens
    if (wanted := restored.config.get("task", {}).get("max_tokens")) is not None:
        limit = min(limit, wanted)
    return limit if limit < _NO_LIMIT else None


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int | None
) -> dict[str, Tensor]:
    """The model's inputs, each (b, t). Raises ValueError on a text without a token."""
    encoded = tokenizer(
        list(texts),
        padding=True,
        truncation=limit is not None,
        max_length=limit,
        return_tensors="pt",
    )
    empty = (encoded["attention_mask"].sum(1) == 0).nonzero()
    if len(empty):
        raise ValueError(f"the text {texts[int(empty[0])]!r} has no tokens.")
    return dict(encoded)


def classify(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    limit: int | None,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Logits (n, c) of a classifier for texts in their order, float32 on the CPU; of a language
    model those of the token after each text (n, v)."""

    def batches() -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(texts), batch_size):
            inputs = tokenize(tokenizer, texts[start : start + batch_size], limit)
            yield {name: tensor.to(device) for name, tensor in inputs.items()}

    def one(inputs: dict[str, Tensor]) -> Tensor:
        logits = model(**inputs).logits
        if logits.ndim == 3:  # b t v, padded on the right
            last = inputs["attention_mask"].sum(1) - 1
            logits = logits[torch.arange(len(last), device=logits.device), last]
        return logits.float().cpu()

    with evaluating(model):
        return torch.cat([one(inputs) for inputs in batches()])
