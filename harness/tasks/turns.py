"""A text in turns, some of which are learned, as a tokenizer's chat template writes them or not.

A row becomes pieces of text, each learned or not; encoding.py makes tokens of them. Three things
that a template leaves open are decided here. Its clock shows the date of the config. Where it
writes no end of a turn, the tokenizer's end of text ends the last one, so that every answer learns
to end. And what it writes as tokens, it alone may write: the same characters in a row's own text
are text.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from transformers.utils import chat_template_utils

from harness.words import did_you_mean
from variants.settings import check_type

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEARNED = ("assistant", "text")  # the roles whose turns are learned
DATE = "2024-07-26"  # the one that Llama 3's templates fall back to
CONTROL_TOKENS = ("text", "tokens")
_SENTINEL = "Zqxjk"  # stands for an answer where its end is looked for
# Around a control token that is text: two of the characters that Unicode keeps for such uses.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


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
    def words(self) -> str:
        return json.dumps([(role, text.split()) for role, text in self.turns])

    @property
    def content(self) -> Sequence[Any]:
        return (self.turns,)


@dataclass(frozen=True, kw_only=True)
class Writing:
    """The settings of a task that say how turns are written.

    Args:
        chat: write them with the tokenizer's chat template; None: if it has one.
        prompt_template: how a prompt is written without a chat template.
        date: what a template's clock shows, as in ISO 8601; with a time of day if it has one.
        control_tokens: what the characters of a control token are that stand in a row's own text:
            text, or tokens.

    Raises ValueError on a setting that cannot be used.
    """

    chat: bool | None = None
    prompt_template: str = "{prompt}"
    date: str = DATE
    control_tokens: str = "text"

    def __post_init__(self):
        check_type("chat", self.chat, bool | None)
        check_type("prompt_template", self.prompt_template, str)
        check_type("date", self.date, str)
        if "{prompt}" not in self.prompt_template:
            raise ValueError(
                f"prompt_template is {self.prompt_template!r}; it must contain {{prompt}}."
            )
        try:
            datetime.fromisoformat(self.date)
        except ValueError:
            raise ValueError(
                f"date is {self.date!r}; it must be a date such as {DATE}, or {DATE}T09:30."
            ) from None
        check_control_tokens(self.control_tokens)

    @classmethod
    def recorded(cls, task: Mapping[str, Any]) -> "Writing":
        """The settings of a run, from its config's part `task`, {} if it has none. A task without
        the key `chat` writes plain text; one without `control_tokens` was trained when they
        were tokens everywhere."""
        known = [field.name for field in fields(cls)]
        then = {"chat": False, "control_tokens": "tokens"} if task else {}
        return cls(**{**then, **{name: task[name] for name in known if name in task}})


def check_control_tokens(value: object) -> None:
    """Raise ValueError unless `value` is one of CONTROL_TOKENS."""
    if value not in CONTROL_TOKENS:
        raise ValueError(
            f"control_tokens is {value!r}; it must be {' or '.join(CONTROL_TOKENS)}."
            f"{did_you_mean(value, CONTROL_TOKENS)}"
        )


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """The strings that a tokenizer reads as one token each and that are not text."""
    added = tokenizer.added_tokens_decoder.values()
    known = {str(token) for token in added if token.special} | {*tokenizer.all_special_tokens}
    return {token for token in known if token and not token.isspace()}


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches each of the tokens, the longest first, since a token may hold another."""
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def control_sentence(found: Sequence[set[str]]) -> str:
    """Says for the banner in how many rows control tokens stand as text; empty if in none."""
    if not found:
        return ""
    shown = ", ".join(sorted(set().union(*found))[:5])
    return (
        f"; control tokens stand in {len(found):,} rows as text ({shown}); "
        "task.control_tokens=tokens reads them as tokens"
    )


@dataclass(frozen=True)
class End:
    """The end of the answers that are learned.

    Args:
        tokens: those of which any ends an answer.
        texts: those of which any does, of a template whose turns end with text.
        added: whether the token is put after the last turn, since nothing else would end it.
    """

    tokens: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    added: bool = False


@dataclass(frozen=True)
class Written:
    """A row as text.

    Args:
        pieces: text, learned or not, in order.
        chat: the template has written it: its tokens are those of the whole.
        marks: the characters around control tokens that are text; None where there are none.
        as_text: those control tokens.
    """

    row: Row
    pieces: tuple[tuple[str, bool], ...]
    chat: bool
    marks: tuple[str, str] | None = None
    as_text: frozenset[str] = frozenset()


class Writer:
    """Writes rows for one tokenizer.

    Raises ValueError if a chat template is asked for and there is none.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", writing: Writing):
        self.tokenizer, self.writing = tokenizer, writing
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if writing.chat and not has_template:
            raise ValueError("task.chat is true, but the tokenizer has no chat template.")
        self.chat = has_template if writing.chat is None else writing.chat
        self._template = str(tokenizer.get_chat_template()) if self.chat else ""

    def write(self, row: Row, *, answered: bool = True) -> Written:
        """The row as pieces of text.

        Args:
            answered: with its last turn; without it, as a model is given the row to answer.

        Raises ValueError if the template refuses it, or does not write a conversation piece after
        piece.
        """
        found = self.control_tokens(row)
        marks = None
        if any(found):
            row, marks = self._marked(row, found)
        pieces = tuple(self._pieces(row, answered))
        return Written(row, pieces, self._by_template(row), marks, frozenset().union(*found))

    def control_tokens(self, row: Row) -> list[set[str]]:
        """Finds, in each turn, the control tokens that are to be text."""
        if self.writing.control_tokens == "tokens":
            return [set() for _ in row.turns]
        return [{*self._control[role in LEARNED].findall(text)} for role, text in row.turns]

    @cached_property
    def end(self) -> End:
        """The end of an answer, found from the tokens that the template writes after one.

        Raises ValueError where nothing would end it.
        """
        if not self.chat:
            return self._end_of_text("the tokenizer has no end-of-text token (eos_token)")
        for before in (["user"], ["system", "user"]):  # some templates ask for the one or the other
            messages = [{"role": role, "content": "a"} for role in before]
            messages.append({"role": "assistant", "content": _SENTINEL})
            try:
                _, found, after = self._rendered(messages, ask=False).rpartition(_SENTINEL)
            except ValueError:
                continue
            if found:
                break
        else:
            after = ""
        ids = self.tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"]
        added = self.tokenizer.added_tokens_decoder
        for token in ids:
            if token in added and not str(added[token]).isspace():
                return End(tokens=(token,))
        if after.strip():
            return End(texts=(after.rstrip(),))
        return self._end_of_text(
            "the tokenizer's chat template writes no end of a turn and the tokenizer has no "
            "end-of-text token (eos_token)"
        )

    @property
    def end_sentence(self) -> str:
        """Says for the banner how answers end, if whoever serves the adapter must know it."""
        if not self.chat:
            return ""
        end, tokenizer = self.end, self.tokenizer
        if end.texts:
            return f"; answers end at the text {end.texts[0]!r}"
        name = tokenizer.convert_ids_to_tokens(end.tokens[0])
        if end.added:
            return f"; the chat template writes no end of a turn: {name!r} is put after the last"
        if end.tokens[0] == tokenizer.eos_token_id:
            return ""
        return f"; answers end at {name!r} (eos_token_id={end.tokens[0]} where they are generated)"

    def _end_of_text(self, lacking: str) -> End:
        token = self.tokenizer.eos_token_id
        if token is None:
            raise ValueError(
                f"{lacking}, so that no answer would learn to end; "
                'add "eos_token" to its tokenizer_config.json.'
            )
        return End(tokens=(int(token),), added=True)

    # ---- a row -----------------------------------------------------------------------------------

    def _by_template(self, row: Row) -> bool:
        return self.chat and row.turns[0][0] != "text"

    def _pieces(self, row: Row, answered: bool) -> list[tuple[str, bool]]:
        if not self._by_template(row):
            template = self.writing.prompt_template
            return [
                (template.replace("{prompt}", text) if role == "user" else text, role in LEARNED)
                for role, text in row.turns[: None if answered else -1]
            ]
        messages = [{"role": role, "content": text} for role, text in row.turns]
        pieces, done = [], ""
        for index, (role, _) in enumerate(row.turns):
            if role != "assistant":
                continue
            for count, learned in ((index, False), (index + 1, True)):
                if learned and not answered and count == len(row.turns):
                    continue
                text = self._rendered(messages[:count], ask=not learned, row=row)
                if not text.startswith(done):
                    raise ValueError(
                        f"row {row.id}: the tokenizer's chat template does not write a "
                        "conversation turn after turn, so that its answers cannot be told from "
                        "the rest; set task.chat=false."
                    )
                pieces.append((text[len(done) :], learned))
                done = text
        return pieces

    def _rendered(
        self, messages: list[dict[str, str]], *, ask: bool, row: Row | None = None
    ) -> str:
        """The template's text of some messages, with `ask` and how the next turn begins."""
        try:
            with fixed_clock(self._template, self.writing.date):
                text = self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=ask
                )
        except Exception as error:  # of any kind: a template is a program of the checkpoint's
            where = "" if row is None else f"row {row.id}: "
            reason = str(error) or type(error).__name__
            raise ValueError(
                f"{where}the tokenizer's chat template refuses the conversation ({reason}); "
                "change it, or set task.chat=false."
            ) from error
        assert isinstance(text, str)
        return text

    def _marked(self, row: Row, found: Sequence[set[str]]) -> tuple[Row, tuple[str, str]]:
        """The row with marks around its control tokens, and the marks."""
        everything = "".join(text for _, text in row.turns)
        start, end = [mark for mark in _MARKS if mark not in everything][:2]
        turns = [
            (role, any_of(tokens).sub(lambda match: f"{start}{match[0]}{end}", text))
            for (role, text), tokens in zip(row.turns, found, strict=True)
        ]
        return Row(row.id, tuple(turns)), (start, end)

    @cached_property
    def _control(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """The texts that would be read as tokens in a prompt, and in an answer, which may hold
        tokens of its own, such as those around a model's thoughts, but not the one that ends it."""
        special = special_tokens(self.tokenizer)
        if not self.chat:
            return any_of(special), any_of(special)
        decoder = self.tokenizer.added_tokens_decoder
        added = {str(token) for token in decoder.values()}
        template = str(self.tokenizer.chat_template)
        named = {token for token in added if not token.isspace() and token in template}
        ends = set()
        with suppress(ValueError):  # a text needs none
            ends = {str(decoder[token]) for token in self.end.tokens if token in decoder}
        return any_of(special | named), any_of(special | ends)


@contextmanager
def fixed_clock(template: str, date: str) -> Iterator[None]:
    """Lets a chat template read `date` from its clock, and keeps it from drawing at random."""
    environment = chat_template_utils._compile_jinja_template(template).environment
    shown = datetime.fromisoformat(date)

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("it draws at random, so that no two runs would read the same")

    globals_before, filters_before = dict(environment.globals), dict(environment.filters)
    environment.globals |= {"strftime_now": shown.strftime, "lipsum": refuse}
    environment.filters["random"] = refuse
    try:
        yield
    finally:
        environment.globals.update(globals_before)
        environment.filters.update(filters_before)
