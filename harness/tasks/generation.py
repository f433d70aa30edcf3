"""Greedy generation whose settings are pinned, whatever the model's own configuration says.

transformers fills what a caller leaves open from the model's generation_config.json, which may ask
for sampling; here nothing is left open.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def pinned_config(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", max_new_tokens: int
) -> "GenerationConfig":
    """Greedy, one beam, nothing penalised; ends where the model or the tokenizer ends a text."""
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id if model.generation_config else None
    known = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.0,
        eos_token_id=sorted(known) or None,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
    )


@contextmanager
def _configured(model: "PreTrainedModel", config: "GenerationConfig") -> Iterator[None]:
    """With `config` as the model's own, so that nothing else can fill a gap in it."""
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int,
    device: torch.device | str,
) -> list[str]:
    """The greedy answer to each prompt, special tokens left out, cut before the first `stop`.

    Args:
        prompts: token ids; padded on the left, so that all answers start at one column.
    """
    config = pinned_config(model, tokenizer, max_new_tokens)
    extra: dict[str, Any] = {}
    if stop:
        extra = {"stop_strings": list(stop), "tokenizer": tokenizer}
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    assert tokenizer.pad_token_id is not None
    for first in range(0, len(order), batch_size):
        positions = order[first : first + batch_size]
        longest = max(len(prompts[i]) for i in positions)
        gaps = [longest - len(prompts[i]) for i in positions]
        pairs = list(zip(gaps, positions, strict=True))
        ids = torch.tensor([[tokenizer.pad_token_id] * gap + [*prompts[i]] for gap, i in pairs])
        mask = torch.tensor([[0] * gap + [1] * len(prompts[i]) for gap, i in pairs])
        with _configured(model, config), torch.no_grad():
            made: Any = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                **extra,
            )
        for i, row in zip(positions, made[:, longest:].tolist(), strict=True):
            answer = str(tokenizer.decode(row, skip_special_tokens=True))
            cuts = [at for text in stop if (at := answer.find(text)) >= 0]
            answers[i] = answer[: min(cuts)] if cuts else answer
    return answers
