"""Answers of a restored model to texts, a batch at a time: labels, or the text that goes on."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from harness.adapter import inference
from harness.adapter.native import Restored
from harness.machine import hardware
from harness.tasks import generation, language

MAX_NEW_TOKENS = 256  # of an answer, where no task says


def classifications(
    restored: Restored, batches: Iterable[list[str]], device: torch.device | str
) -> Iterator[list[dict[str, Any]]]:
    """Per batch, {"text", "label", "probabilities"} for each text."""
    limit, labels = inference.token_limit(restored), restored.labels
    assert labels is not None
    for texts in batches:
        logits = inference.classify(
            restored.model,
            restored.base.tokenizer,
            texts,
            limit=limit,
            control_tokens=inference.reads_control_tokens(restored),
            batch_size=len(texts),
            device=device,
        )
        for_texts = logits.double().softmax(-1).tolist()  # n c
        yield [
            {
                "text": text,
                "label": labels[max(range(len(labels)), key=probabilities.__getitem__)],
                "probabilities": dict(zip(labels, probabilities, strict=True)),
            }
            for text, probabilities in zip(texts, for_texts, strict=True)
        ]


def generations(
    restored: Restored, batches: Iterable[list[str]], device: torch.device | str
) -> Iterator[list[dict[str, Any]]]:
    """Per batch, {"text", "answer"} for each text, which is written as the run's prompts were; the
    answer is greedy."""
    task, writer = restored.config.get("task", {}), inference.writer_of(restored)
    for texts in batches:
        prompts = [language.prompt_tokens(text, writer) for text in texts]
        room = restored.base.max_tokens - max(map(len, prompts))
        if room < 1:
            longest = max(range(len(texts)), key=lambda i: len(prompts[i]))
            raise ValueError(
                f"the text {texts[longest][:20]!r}... has {len(prompts[longest])} tokens, which "
                f"leaves no room for an answer: the model reads {restored.base.max_tokens}."
            )
        answers = generation.generate(
            restored.base.model,
            restored.base.tokenizer,
            prompts,
            max_new_tokens=min(task.get("max_new_tokens", MAX_NEW_TOKENS), room),
            stop=task.get("stop", ()),
            end=inference.end_of(restored),
            batch_size=len(texts),
            device=device,
        )
        yield [{"text": t, "answer": a} for t, a in zip(texts, answers, strict=True)]


def chosen_device(name: str, restored: Restored) -> torch.device:
    """Raises ValueError if the machine has no such device, or the model cannot compute there."""
    parts = (("train", "compute_dtype"), ("model", "dtype"))
    dtypes = [restored.config.get(part, {}).get(key, "float32") for part, key in parts]
    return hardware.resolve_device(name, dtypes, setting="--device")
