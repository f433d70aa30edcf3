"""The common parts of tasks over rows: splits, the withheld slice, tokens, the order of data.

A kind of task (classification.py, language.py) says what a row is, how it becomes tokens and a
batch, and what is evaluated.

Shapes: b rows of a batch, t tokens (padded).
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from harness.machine import distributed
from harness.tasks import token_cache
from harness.tasks.batch import SPLITS, Batch
from variants.settings import check_positive, check_type
from variants.streams import stream_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCHES_PER_SORT = 50  # length is sorted inside groups of this many batches
MAX_SIGNAL_FRAC = 0.05  # of train


class AnyRow(Protocol):
    """One example. `id` is unique in its split and names the row in predictions."""

    @property
    def id(self) -> int: ...

    @property
    def prompt(self) -> str:
        """The text that a model is given; its hash decides the split where there is none."""

    @property
    def key(self) -> str:
        """Equal for two rows that count as one in two splits; its hash chooses rows."""

    @property
    def words(self) -> str:
        """Equal for two rows whose `key` differs in white space alone."""

    @property
    def content(self) -> Sequence[Any]:
        """The values that a model may see of it, as JSON has them."""


R = TypeVar("R", bound=AnyRow)
V = TypeVar("V")


def hash_split(text: str) -> str:
    """The split that a text belongs to when its source names none: sha1(text) mod 100 below 10 is
    test, below 20 validation, else train. Equal texts never end up in two splits."""
    percentile = int(hashlib.sha1(text.encode()).hexdigest(), 16) % 100
    return "test" if percentile < 10 else "validation" if percentile < 20 else "train"


def with_validation(rows: Mapping[str, list[R]], where: str) -> tuple[dict[str, list[R]], str]:
    """The rows with a validation split, and a note if it was held out from train: about a tenth by
    `hash_split` of the prompts, so that equal ones are never on both sides.

    Raises ValueError naming `where`, the source of train, if train is too small.
    """
    if "validation" in rows:
        return dict(rows), ""
    parts: dict[bool, list[R]] = {True: [], False: []}
    for row in rows["train"]:
        parts[hash_split(row.prompt) == "validation"].append(row)
    if not all(parts.values()):
        raise ValueError(
            f"{where}: {len(rows['train'])} rows are too few to hold out a tenth for validation; "
            "give a validation split."
        )
    note = "validation was held out from train by the hash of the prompt or text"
    return {**rows, "train": parts[False], "validation": parts[True]}, note


def check_counts(*, or_zero: bool = False, **values: int) -> None:
    """Raise ValueError unless each of `values` is a positive whole number, or 0 where allowed."""
    for key, value in values.items():
        check_type(key, value, int)
        check_positive(key, value, or_zero=or_zero)


def smallest(rows: Sequence[AnyRow], count: int) -> list[int]:
    """Positions, in their order, of the `count` rows with the smallest sha256 of their key: a
    choice that depends neither on a seed nor on the order of the rows."""
    digests = [hashlib.sha256(row.key.encode()).digest() for row in rows]
    return sorted(sorted(range(len(rows)), key=lambda i: (digests[i], i))[:count])


def epoch_order(lengths: Sequence[int], *, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """The batches of one epoch, as row positions (b,).

    Shuffled, cut into groups of BATCHES_PER_SORT batches, sorted by length inside a group so that
    little is padded, cut into batches, and the batches shuffled. The rows left over from the last
    batch are dropped: different ones in each epoch, whatever their length. A split smaller than one
    batch is one batch.
    """
    generator = torch.Generator().manual_seed(stream_seed(seed, "data", epoch))
    shuffled = torch.randperm(len(lengths), generator=generator)
    batch_size = min(batch_size, len(lengths))
    shuffled = shuffled[: len(lengths) // batch_size * batch_size]
    length = torch.tensor(lengths)
    batches: list[Tensor] = []
    for group in shuffled.split(BATCHES_PER_SORT * batch_size):
        by_length = group[length[group].argsort(stable=True)]
        batches += by_length.split(batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def padded(values: Sequence[Sequence[int]], fill: int, *, left: bool = False) -> Tensor:
    """(b, t), t that of the longest."""
    longest = max(map(len, values))
    rests = [[fill] * (longest - len(row)) for row in values]
    pairs = zip(values, rests, strict=True)
    return torch.tensor([[*rest, *row] if left else [*row, *rest] for row, rest in pairs])


def by_length(
    work: Callable[[list[int]], Sequence[V]], lengths: Sequence[int], batch_size: int
) -> dict[int, V]:
    """The value of each position, in batches that processes share out. The longest is first: if a
    batch does not fit in memory, it fails at once.

    Args:
        work: positions -> a JSON value of each.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    parts = distributed.share_out(work, batches)
    return dict(zip(order, chain.from_iterable(parts), strict=True))


class RowTask(ABC, Generic[R]):
    """Most of a `harness.tasks.base.Task`.

    Args:
        name: as in conf/task/.
        rows: train, validation and test.
        signal_rows: how many rows of train to withhold as the split `signal`, at most 5 % of
            train: the `smallest`, the same for every seed.
        max_tokens: the length at which rows are cut.
        notes: sentences for `describe`; empty ones are left out.
        other_data: what else the data consist of, for the fingerprint.

    Attributes:
        truncated_rows: rows per split that `prepare` cut.
        lost_rows: rows per split of which it left nothing to learn, and which it dropped.
        leaked_rows: test rows whose words also occur in train, in the same order.
    """

    remote = False

    def __init__(
        self,
        name: str,
        rows: Mapping[str, Sequence[R]],
        *,
        signal_rows: int,
        max_tokens: int,
        notes: Sequence[str],
        other_data: str,
    ):
        check_counts(or_zero=True, signal_rows=signal_rows)
        check_counts(max_tokens=max_tokens)
        self.name, self.max_tokens, self.notes = name, max_tokens, tuple(filter(None, notes))
        train = rows["train"]
        withheld = smallest(train, min(signal_rows, int(MAX_SIGNAL_FRAC * len(train))))
        left_out = set(withheld)
        self.rows: dict[str, list[R]] = {
            "train": [row for i, row in enumerate(train) if i not in left_out],
            "signal": [train[i] for i in withheld],
            "validation": list(rows["validation"]),
            "test": list(rows["test"]),
        }
        pairs = (("validation", "train"), ("test", "train"), ("test", "validation"))
        self._copied = [self._copies(*pair) for pair in pairs]
        self.leaked_rows = self._copied[1][2]
        digest = hashlib.sha256(other_data.encode())
        for split in SPLITS:
            for row in self.rows[split]:
                digest.update(json.dumps([split, row.id, *row.content]).encode() + b"\n")
        self.fingerprint = digest.hexdigest()
        self.truncated_rows: dict[str, int] = {}
        self.lost_rows = dict.fromkeys(SPLITS, 0)
        self._tokens: token_cache.Tokens = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def _copies(self, split: str, other: str) -> tuple[str, str, int, int]:
        """Counts the rows of `split` that also occur in `other`, and those of them that differ
        there in white space; both numbers follow the two names."""
        there = self.rows[other] + (self.rows["signal"] if other == "train" else [])
        words, keys = {row.words for row in there}, {row.key for row in there}
        copied = [row for row in self.rows[split] if row.words in words]
        return split, other, len(copied), sum(row.key not in keys for row in copied)

    @property
    def counts(self) -> dict[str, int]:
        return {split: len(self.rows[split]) for split in SPLITS}

    # ---- tokens ----------------------------------------------------------------------------------

    def prepare(self, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> None:
        """Tokenise every split once, cutting rows at `max_tokens`, special tokens included; what an
        earlier process has tokenised is read from `harness.tasks.token_cache`.

        Raises ValueError if the tokenizer has no padding token or does not fit the task.
        """
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no padding token, which batches need: "
                "set tokenizer.pad_token."
            )
        data = self._tokens_depend_on(tokenizer, max_tokens)
        key = token_cache.cache_key(data, tokenizer, max_tokens)
        cached = token_cache.load(key)
        if cached is None:
            cached = self._tokenise(tokenizer, max_tokens)
            token_cache.save(key, *cached)
        self._tokens, counts = cached
        self.truncated_rows = counts["cut"]
        self.shared_rows = counts.get("shared", {})
        self._tokenizer = tokenizer

    @abstractmethod
    def _tokens_depend_on(self, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> str:
        """A digest of the data, and of the settings that `_tokenise` goes by. Raises ValueError if
        the tokenizer does not fit the task."""

    @abstractmethod
    def _tokenise(
        self, tokenizer: "PreTrainedTokenizerBase", max_tokens: int
    ) -> tuple[token_cache.Tokens, token_cache.Counts]:
        """Every split's tokens, and of each how many rows were "cut"."""

    def _prepared(self) -> "PreTrainedTokenizerBase":
        if self._tokenizer is None:
            raise RuntimeError(
                f"{self.name} is not tokenised: call prepare(tokenizer, max_tokens)."
            )
        return self._tokenizer

    # ---- batches ---------------------------------------------------------------------------------

    def train_batches(self, *, seed: int, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """Endless batches of train from the `start`-th on; see `epoch_order`.

        Raises ValueError if batch_size < 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        assert start >= 0, start
        self._prepared()
        return self._batches_from(start, seed, batch_size)

    def _batches_from(self, start: int, seed: int, batch_size: int) -> Iterator[Batch]:
        epoch = 0
        while True:
            batches = self._epoch(seed, batch_size, epoch)
            for positions in batches[start:]:
                yield self._batch("train", positions)
            start, epoch = max(0, start - len(batches)), epoch + 1

    def _epoch(self, seed: int, batch_size: int, epoch: int) -> Sequence[Any]:
        """The batches of an epoch, each as `_batch` takes it."""
        lengths = [len(ids) for ids in self._tokens["train"]["input_ids"]]
        order = epoch_order(lengths, batch_size=batch_size, seed=seed, epoch=epoch)
        return [positions.tolist() for positions in order]

    @abstractmethod
    def _batch(self, split: str, positions: Any) -> Batch:
        """The rows at these positions of a split, padded."""

    def _lengths(self, split: str) -> list[int]:
        """The number of tokens of each row of a split to be evaluated. Raises ValueError on a split
        that does not exist or has no rows."""
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; it must be one of {SPLITS}.")
        if not self.rows[split]:
            raise ValueError(f"{self.name} has no rows in {split!r}: nothing to evaluate.")
        self._prepared()
        return [len(ids) for ids in self._tokens[split]["input_ids"]]

    # ---- for people ------------------------------------------------------------------------------

    def texts(self, split: str) -> list[str]:
        """The rows of a split without their answers, in the order of `evaluate`'s predictions."""
        return [row.prompt for row in self.rows[split]]

    def describe(self) -> str:
        """Rows per split, and what a reader should know: held-out, cut, leaked rows."""
        parts = [f"{count:,} {split}" for split, count in self.counts.items()]
        sentences = [f"{self.name}: {', '.join(parts)} rows", *self.notes]
        if cut := sum(self.truncated_rows.values()):
            sentences.append(f"{cut:,} of {sum(self.counts.values()):,} rows were cut to fit")
        for split, other, count, spaced in self._copied:
            if count:
                but = f", {spaced:,} of them but for white space" if spaced else ""
                sentences.append(f"the text of {count:,} {split} rows also occurs in {other}{but}")
        return "; ".join(sentences)
