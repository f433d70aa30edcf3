"""A text in turns, some of which are learned, as a tokenizer's chat template writes them or not.

Turns are tokenised one by one and joined, so that what a model is given to answer is, token for
token, what it was trained to go on from.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEARNED = ("assistant", "text")  # the roles whose turns are learned


@dataclass(frozen=True, slots=True)
class Row:
    """One example. `id` is unique in its split and names the row in predictions.

    Args:
        turns: (role, text) with roles system, user and assistant in the order of a conversation,
            or a single ("text", ...).
    """

    id: int
    turns: tuple[tuple[str, str], ...]

    @property
    def answer(self) -> str:
        """The last turn, which generation is compared with."""
        return self.turns[-1][1]

    @property
    def prompt(self) -> str:
        """The turns before it; of a plain text all of it."""
        return "\n".join(text for _, text in self.turns[:-1]) or self.answer

    @property
    def key(self) -> str:
        return json.dumps(self.turns)

    @property
    def content(self) -> Sequence[Any]:
        return (self.turns,)


def render(
    row: Row, tokenizer: "PreTrainedTokenizerBase", *, chat: bool, prompt_template: str
) -> list[tuple[str, bool]]:
    """The row as pieces of text, each learned or not.

    Args:
        chat: write the turns as the tokenizer's chat template has them; else a user's turn is put
            into `prompt_template` and the others stand as they are.

    Raises ValueError if the template refuses the row, or does not write a conversation piece after
    piece.
    """
    if not chat or row.turns[0][0] == "text":
        return [
            (prompt_template.replace("{prompt}", text) if role == "user" else text, role in LEARNED)
            for role, text in row.turns
        ]
    messages = [{"role": role, "content": text} for role, text in row.turns]

    def written(count: int, *, ask: bool) -> str:
        """The first messages, and with `ask` how the assistant's next turn begins."""
        try:
            text = tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=ask
            )
        except TemplateError as error:  # such as "roles must alternate"
            raise ValueError(
                f"row {row.id}: the tokenizer's chat template refuses the conversation ({error}); "
                "change it, or set task.chat=false."
            ) from error
        assert isinstance(text, str)
        return text

    pieces, done = [], ""
    for index, (role, _) in enumerate(row.turns):
        if role != "assistant":
            continue
        for text, learned in (
            (written(index, ask=True), False),
            (written(index + 1, ask=False), True),
        ):
            if not text.startswith(done):
                raise ValueError(
                    "the tokenizer's chat template does not write a conversation turn after turn, "
                    "so that its answers cannot be told from the rest; set task.chat=false."
                )
            pieces.append((text[len(done) :], learned))
            done = text
    return pieces


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [
        tokenizer.bos_token_id
    ]
