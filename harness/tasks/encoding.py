"""Turns rows of text (turns.py) into tokens, and marks those that are learned.

What a chat template has written is tokenised as a whole, as whoever serves the model does: a
tokenizer may write the beginning of a text otherwise than the same characters in the midst of one.
Where a piece ends is then looked for: the tokens of all that stands before are the beginning of the
whole's, or else a token lies on both sides, and counts as learned, as in transformers.

Without a template, rows are what the tokenizer puts before a text, the whole, and its end of text.
There a prompt is a text of its own, and stays token for token what the model is given to answer:
if a token of the whole lies on both sides, the answer is tokenised alone.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from harness.tasks.turns import Writer, Written, any_of, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHOR = "\n"  # before a text in the midst of one: no tokenizer puts a space after it


@dataclass(frozen=True)
class Encoded:
    """A row's tokens.

    Args:
        ids, learned: of each token.
        shared: tokens that hold the end of a prompt and the beginning of its answer.
        before: tokens that the tokenizer puts before a text.
    """

    ids: list[int]
    learned: list[bool]
    shared: int = 0
    before: int = 0


def prefix_of(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that the tokenizer puts before a text: its BOS, or none."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    mask = encoded["special_tokens_mask"]
    return encoded["input_ids"][: mask.index(0)] if 0 in mask else []


def encode(writer: Writer, rows: Sequence[Written], *, ending: bool = True) -> Iterator[Encoded]:
    """Each row's tokens.

    Args:
        ending: put the end of text after a row that has no other end.

    Raises ValueError, naming the row, where its answers cannot be told from the rest.
    """
    tokenizer = writer.tokenizer
    texts: list[str] = []
    for written in rows:
        if written.marks is None:
            whole = "".join(text for text, _ in written.pieces)
            texts += [whole, *(whole[:end] for end in _ends(written.pieces)[:-1])]
    encoder = _Encoder(tokenizer, texts)
    prefix = prefix_of(tokenizer)
    for written in rows:
        encoded = encoder.row(written)
        ids, learned = encoded.ids, encoded.learned
        before = 0 if written.chat or ids[: len(prefix)] == prefix else len(prefix)
        ids, learned = [*prefix[:before], *ids], [False] * before + learned
        if ending and (token := _ending(writer, written)) is not None and ids[-1:] != [token]:
            ids, learned = [*ids, token], [*learned, True]
        yield Encoded(ids, learned, encoded.shared, before)


def _ending(writer: Writer, written: Written) -> int | None:
    """The end of text, where it is put after the row."""
    if written.row.turns[0][0] == "text":  # which nothing has to end
        return writer.tokenizer.eos_token_id
    return writer.end.tokens[0] if writer.end.added else None


def _ends(pieces: Sequence[tuple[str, bool]]) -> list[int]:
    return list(accumulate(len(text) for text, _ in pieces))


class _Encoder:
    """Tokens of pieces of text, after the other texts have been tokenised in one call."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]):
        self.tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        if texts := list(dict.fromkeys(texts)):
            found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            self._known = dict(zip(texts, found, strict=True))
        self._anchor = self._plain(_ANCHOR)

    def row(self, written: Written) -> Encoded:
        if written.marks is None:
            return self._segment(written, written.pieces, first=True)
        ids: list[int] = []
        learned: list[bool] = []
        shared = 0
        for number, (pieces, as_text) in enumerate(_segments(written)):
            if as_text:
                found = self._as_text("".join(text for text, _ in pieces), written)
                part = Encoded(found, [pieces[0][1]] * len(found))
            else:
                part = self._segment(written, pieces, first=number == 0)
            ids, learned, shared = ids + part.ids, learned + part.learned, shared + part.shared
        return Encoded(ids, learned, shared)

    def _segment(
        self, written: Written, pieces: Sequence[tuple[str, bool]], *, first: bool
    ) -> Encoded:
        """Pieces without a control token that is text; not the `first` of a row if others stand
        before them."""
        if not pieces:
            return Encoded([], [])
        whole, ends = "".join(text for text, _ in pieces), _ends(pieces)
        ids = self._ids(whole, first)
        bounds: list[tuple[int, int]] = []  # first token after the end, with a shared one or not
        offsets: list[tuple[int, int]] | None = None
        shared = 0
        for index, end in enumerate(ends[:-1]):
            before = self._ids(whole[:end], first)
            if ids[: len(before)] == before:
                bounds.append((len(before), len(before)))
                continue
            if not written.chat:
                return self._apart(pieces, first)
            offsets = offsets or self._offsets(whole, first, ids, written)
            without = sum(stop <= end for _, stop in offsets)
            with_shared = sum(start < end for start, _ in offsets)
            bounds.append((without, max(without, with_shared)))
            shared += not pieces[index][1] and with_shared > without
        learned: list[bool] = [False] * len(ids)
        starts = [(0, 0), *bounds]
        stops = [*bounds, (len(ids), len(ids))]
        for (_, is_learned), (start, _), (_, stop) in zip(pieces, starts, stops, strict=True):
            if is_learned:  # all that holds a character of it
                learned[start:stop] = [True] * (stop - start)
        return Encoded(ids, learned, shared)

    def _apart(self, pieces: Sequence[tuple[str, bool]], first: bool) -> Encoded:
        """Tokenises piece after piece."""
        ids: list[int] = []
        learned: list[bool] = []
        for number, (text, is_learned) in enumerate(pieces):
            found = self._ids(text, first and number == 0)
            ids, learned = ids + found, learned + [is_learned] * len(found)
        return Encoded(ids, learned)

    def _ids(self, text: str, first: bool) -> list[int]:
        """Tokens of a text, at the beginning of one or in its midst."""
        return self._plain(text) if first or not text else self._in_midst(text, self._plain)

    def _in_midst(self, text: str, tokens_of: Callable[[str], list[int]]) -> list[int]:
        """The text's tokens after the anchor's, where these stay what they are."""
        found = tokens_of(_ANCHOR + text)
        anchored = found[: len(self._anchor)] == self._anchor
        return found[len(self._anchor) :] if anchored else tokens_of(text)

    def _plain(self, text: str) -> list[int]:
        if (found := self._known.get(text)) is not None:
            return found
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _as_text(self, token: str, written: Written) -> list[int]:
        """A control token's characters as text, in the midst of one."""
        found = self._in_midst(token, partial(without_added_tokens, self.tokenizer))
        if self.tokenizer.convert_tokens_to_ids(token) in found:
            raise ValueError(
                f"row {written.row.id}: the tokenizer cannot write {token!r} as text; take it out, "
                "or set task.control_tokens=tokens."
            )
        return found

    def _offsets(
        self, whole: str, first: bool, ids: list[int], written: Written
    ) -> list[tuple[int, int]]:
        """The characters of each token, from where the one before it ends."""
        shift = 0
        if getattr(self.tokenizer, "is_fast", False):
            if not first and ids != self._plain(whole):
                whole, shift = _ANCHOR + whole, len(_ANCHOR)
            encoded: Any = self.tokenizer(
                whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            found, end = [], 0
            skipped = len(encoded["input_ids"]) - len(ids)
            for start, stop in encoded["offset_mapping"][skipped:]:
                # Some tokenizers leave white space out of their tokens' characters.
                start, stop = start - shift, stop - shift
                start = min(start, end)
                end = max(end, stop)
                found.append((start, end))
            return found
        raise ValueError(
            f"row {written.row.id}: {type(self.tokenizer).__name__} does not say which characters "
            "a token stands for, and a token of this conversation holds the end of one turn and "
            "the beginning of the next; use a tokenizer with a tokenizer.json, or set "
            "task.chat=false."
        )


def _segments(written: Written) -> Iterator[tuple[list[tuple[str, bool]], bool]]:
    """Cuts a row's pieces at the marks, which it drops, and tells the control tokens that are text
    from the rest. A mark without its partner cuts, too."""
    assert written.marks is not None
    start, end = written.marks
    tokens = any_of(written.as_text).pattern
    current: list[tuple[str, bool]] = []
    for text, learned in written.pieces:
        for part in re.split(f"({start}(?:{tokens}){end}|[{start}{end}])", text):
            if part[:1] not in (start, end):
                if part:
                    current.append((part, learned))
                continue
            if current:
                yield current, False
                current = []
            if len(part) > 1:
                yield [(part[1:-1], learned)], True
    if current:
        yield current, False


def without_added_tokens(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Tokens of a text in which no control token is seen."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    words = [text]
    if backend.pre_tokenizer is not None:
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for word in words for token in backend.model.tokenize(word)]


def control_tokens_in(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], read_as: str = "text"
) -> list[set[str]]:
    """Finds the control tokens that are to be text, of each text that has any."""
    control = any_of(special_tokens(tokenizer))
    found = [{*control.findall(text)} for text in texts if read_as == "text"]
    return [tokens for tokens in found if tokens]


def as_text(found: Sequence[set[str]]) -> dict[str, bool]:
    """The arguments with which a tokenizer reads the control tokens that were found as text."""
    return {"split_special_tokens": True} if found else {}
