"""Greedy generation whose settings are pinned, whatever the model's own configuration says.

transformers fills what a caller leaves open from the model's generation_config.json, which may ask
for sampling; here nothing is left open.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from harness.machine import distributed
from harness.tasks.rows import by_length, padded
from harness.tasks.turns import End

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

NO_END = End()


def ends(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", learned: End = NO_END
) -> list[int] | None:
    """The tokens that end an answer: the model's, the tokenizer's, and those that are learned."""
    of_model = model.generation_config.eos_token_id if model.generation_config else None
    known = {*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id}
    return sorted((known | {*learned.tokens}) - {None}) or None


def pinned_config(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    max_new_tokens: int,
    end: End = NO_END,
) -> "GenerationConfig":
    """Greedy settings: one beam, no penalty; an answer ends where the model or the tokenizer ends a
    text, or where answers were learned to `end`."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.0,
        eos_token_id=ends(model, tokenizer, end),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
    )


def recorded(config: "GenerationConfig", stop: Sequence[str]) -> dict[str, Any]:
    """The settings with which answers were made, as a result records them: JSON values."""
    settings = {k: v for k, v in config.to_dict().items() if v is not None}
    return {**settings, "stop": list(stop), "padding": "left"}


@contextmanager
def _configured(model: "PreTrainedModel", config: "GenerationConfig") -> Iterator[None]:
    """Makes `config` the model's own meanwhile, so that nothing else can fill a gap in it."""
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
    end: End = NO_END,
    batch_size: int,
    device: torch.device | str,
) -> list[str]:
    """The greedy answer to each prompt, special tokens left out, cut before the first `stop` or
    `end`.

    Args:
        prompts: token ids; padded on the left, so that all answers start at one column.
        end: how the answers end that were learned.
    """
    config = pinned_config(model, tokenizer, max_new_tokens, end)
    stop = [*stop, *end.texts]
    config.stop_strings = stop or None
    ends_of: set[int] = {*(config.eos_token_id or ())}
    assert tokenizer.pad_token_id is not None

    def answers_to(positions: list[int]) -> list[str]:
        some = [prompts[i] for i in positions]
        ids = padded(some, tokenizer.pad_token_id, left=True)
        mask = padded([[1] * len(prompt) for prompt in some], 0, left=True)
        with _configured(model, config), torch.no_grad():
            made: Any = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                tokenizer=tokenizer,  # to find the stop strings
                # A sharded model is passed through by all processes, or by none.
                synced_gpus=distributed.world_size() > 1,
            )
        found = []
        for row in made[:, ids.shape[1] :].tolist():
            # One that ends an answer need not be special, and would be decoded.
            row = row[: next((i for i, token in enumerate(row) if token in ends_of), None)]
            answer = str(tokenizer.decode(row, skip_special_tokens=True))
            cuts = [at for text in stop if (at := answer.find(text)) >= 0]
            found.append(answer[: min(cuts)] if cuts else answer)
        return found

    answers = by_length(answers_to, list(map(len, prompts)), batch_size)
    return [answers[i] for i in range(len(prompts))]
