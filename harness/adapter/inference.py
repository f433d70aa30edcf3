"""From a restored model and texts to logits; the texts and the task that its config names.

Shapes: n texts, b of a batch, t tokens (padded), c classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from harness.adapter.native import Restored
from harness.config import build
from harness.models.mode import evaluating
from harness.tasks.base import Task
from harness.tasks.encoding import as_text, control_tokens_in
from harness.tasks.generation import NO_END
from harness.tasks.turns import End, Writer, Writing

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
    build.check_recorded(config, ["task"], "the adapter's config")
    try:
        task: Task = build.make({"task": {**config["task"], "_partial_": False}}, "task")
    except Exception as error:  # of many kinds, for one: it cannot be had here
        raise ValueError(str(error)) from error
    return task


def writer_of(restored: Restored) -> Writer:
    """A function that writes a text as the run's prompts were written."""
    return Writer(restored.base.tokenizer, Writing.recorded(restored.config.get("task", {})))


def end_of(restored: Restored) -> End:
    """The end of the run's answers; one that has learned plain text may have none."""
    try:
        return writer_of(restored).end
    except ValueError:
        return NO_END


def reads_control_tokens(restored: Restored) -> str:
    """The reading of control tokens in a text by the run: text or tokens."""
    task = restored.config.get("task")  # before there was the setting, they were tokens
    return task.get("control_tokens", "tokens") if task else "text"


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
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    limit: int | None,
    *,
    control_tokens: str = "text",
) -> tuple[dict[str, Tensor], Tensor]:
    """The model's inputs, each (b, t), and the tokens of each text (b,). Raises ValueError on a
    text without a token."""
    encoded = tokenizer(
        list(texts),
        truncation=limit is not None,
        max_length=limit,
        verbose=False,
        **as_text(control_tokens_in(tokenizer, texts, control_tokens)),
    )
    lengths = torch.tensor([len(ids) for ids in encoded["input_ids"]])
    if not lengths.all():
        raise ValueError(f"the text {texts[int(lengths.argmin())]!r} has no tokens.")
    return dict(tokenizer.pad(encoded, padding=True, return_tensors="pt")), lengths


def classify(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    limit: int | None,
    control_tokens: str = "text",
    batch_size: int = 32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Logits (n, c) of a classifier for texts in their order, float32 on the CPU; of a language
    model those of the token after each text (n, v)."""

    def one(some: Sequence[str]) -> Tensor:
        inputs, lengths = tokenize(tokenizer, some, limit, control_tokens=control_tokens)
        logits = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits
        if logits.ndim == 3:  # b t v, padded on the right
            logits = logits[torch.arange(len(some)), lengths - 1]
        return logits.float().cpu()

    starts = range(0, len(texts), batch_size)
    with evaluating(model):
        return torch.cat([one(texts[start : start + batch_size]) for start in starts])
