"""What every text classification task shares: splits, tokens, batches, loss, evaluation.

A concrete task reads rows and hands them to `TextClassification`.

Shapes: b rows of a batch, t tokens (padded), c classes.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.evaluation import Evaluation, classification_evaluation, classify
from harness.spelling import did_you_mean
from harness.tasks import token_cache
from harness.tasks.base import SPLITS, Batch
from variants.base import stream_seed
from variants.checks import check_type

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCHES_PER_SORT = 50  # length is sorted inside groups of this many batches
MAX_SIGNAL_FRAC = 0.05  # of train


@dataclass(frozen=True, slots=True)
class Row:
    """One example. `id` is unique in its split and names the row in predictions."""

    id: int
    text: str
    label: str


def hash_split(text: str) -> str:
    """The split that a text belongs to when its source names none: sha1(text) mod 100 below 10 is
    test, below 20 validation, else train. Equal texts never end up in two splits."""
    percentile = int(hashlib.sha1(text.encode()).hexdigest(), 16) % 100
    return "test" if percentile < 10 else "validation" if percentile < 20 else "train"


def label_names(rows: Iterable[Row], where: str) -> tuple[str, ...]:
    """The labels that occur, sorted; by value if all of them are numbers.

    Raises ValueError naming `where` if there are fewer than two.
    """
    names = {row.label for row in rows}
    if len(names) < 2:
        raise ValueError(
            f"{where}: every label is {min(names)!r}; at least two classes are needed."
        )
    if all(re.fullmatch(r"[-+]?\d+(\.\d+)?", name) for name in names):
        return tuple(sorted(names, key=lambda name: (float(name), name)))
    return tuple(sorted(names))


def check_labels(rows: Iterable[Row], labels: Sequence[str], where: str) -> None:
    """Raise ValueError, '`where` <row id>: ...', on the first row with another label than these."""
    known = set(labels)
    for row in rows:
        if row.label not in known:
            raise ValueError(
                f"{where} {row.id}: label {row.label!r} does not occur in train, where "
                f"{len(labels)} labels do.{did_you_mean(row.label, labels)}"
            )


def hold_out_validation(train: Sequence[Row], where: str) -> tuple[list[Row], list[Row]]:
    """(train, validation): about a tenth of the rows by `hash_split`, for data without validation.

    Raises ValueError naming `where` if no row falls in it.
    """
    validation = [row for row in train if hash_split(row.text) == "validation"]
    kept = [row for row in train if hash_split(row.text) != "validation"]
    if not (validation and kept):
        raise ValueError(
            f"{where}: {len(train)} rows are too few to hold out a tenth for validation; "
            "give a validation split."
        )
    return kept, validation


def epoch_order(lengths: Sequence[int], *, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """The batches of one epoch, as row positions (b,).

    Shuffled, cut into groups of BATCHES_PER_SORT batches, sorted by length inside a group so that
    little is padded, cut into batches, and the batches shuffled. The rows left over from the last
    batch are dropped: another few in each epoch, whatever their length. A split smaller than one
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


class TextClassification:
    """A `harness.tasks.base.Task` over rows of text with one label each.

    Args:
        name: as in conf/task/.
        rows: train, validation and test. The labels of all of them are in `labels`.
        labels: class names in the order of the model's outputs.
        signal_rows: how many rows of train to withhold as the split `signal`, at most 5 % of
            train: those with the smallest sha256 of their text, the same for every seed.
        max_tokens: the length at which rows are cut.
        notes: sentences for `describe`.

    Attributes:
        truncated_rows: rows per split that `prepare` cut.
        leaked_rows: test rows whose text also occurs in train.
    """

    primary_metric = "accuracy"

    def __init__(
        self,
        name: str,
        rows: Mapping[str, Sequence[Row]],
        labels: tuple[str, ...],
        *,
        signal_rows: int = 256,
        max_tokens: int = 64,
        notes: Sequence[str] = (),
    ):
        check_type("signal_rows", signal_rows, int)
        check_type("max_tokens", max_tokens, int)
        if signal_rows < 0:
            raise ValueError(f"signal_rows is {signal_rows}; it must be 0 or more.")
        self.name, self.labels, self.max_tokens = name, labels, max_tokens
        self.notes = tuple(notes)
        train = rows["train"]
        signal_rows = min(signal_rows, int(MAX_SIGNAL_FRAC * len(train)))
        by_digest = sorted(
            range(len(train)), key=lambda i: (hashlib.sha256(train[i].text.encode()).digest(), i)
        )
        withheld = set(by_digest[:signal_rows])
        self.rows: dict[str, list[Row]] = {
            "train": [row for i, row in enumerate(train) if i not in withheld],
            "signal": [train[i] for i in sorted(withheld)],
            "validation": list(rows["validation"]),
            "test": list(rows["test"]),
        }
        self.counts = {split: len(self.rows[split]) for split in SPLITS}
        trained_texts = {row.text for row in train}
        self.leaked_rows = sum(row.text in trained_texts for row in self.rows["test"])
        self.fingerprint = self._fingerprint()
        number = {label: i for i, label in enumerate(labels)}
        self._gold = {
            split: torch.tensor([number[row.label] for row in self.rows[split]], dtype=torch.long)
            for split in SPLITS
        }
        self.truncated_rows: dict[str, int] = {}
        self._tokens: dict[str, dict[str, list[list[int]]]] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self.labels).encode())
        for split in SPLITS:
            for row in self.rows[split]:
                digest.update(json.dumps([split, row.id, row.text, row.label]).encode() + b"\n")
        return digest.hexdigest()

    def prepare(self, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> None:
        """Tokenise every split once, cutting rows at `max_tokens`, special tokens included; what an
        earlier process has tokenised is read from `harness.tasks.token_cache`.

        Raises ValueError if the tokenizer has no padding token, if `max_tokens` leaves no room
        beside the special tokens, or if a row has no tokens at all.
        """
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no padding token, which batches need: "
                "set tokenizer.pad_token."
            )
        special = tokenizer.num_special_tokens_to_add()
        if max_tokens <= special:
            raise ValueError(
                f"max_tokens is {max_tokens}; it must be at least {special + 1}, since the "
                f"tokenizer adds {special} special tokens."
            )
        file = token_cache.cache_file(self.fingerprint, tokenizer, max_tokens)
        cached = token_cache.load(file)
        if cached is None:
            cached = self._tokenise(tokenizer, max_tokens)
            token_cache.save(file, *cached)
        self._tokens, self.truncated_rows = cached
        self._tokenizer = tokenizer

    def _tokenise(
        self, tokenizer: "PreTrainedTokenizerBase", max_tokens: int
    ) -> tuple[token_cache.Tokens, dict[str, int]]:
        """Every split's tokens, and how many rows of each were cut."""
        all_tokens: token_cache.Tokens = {}
        cut = {}
        for split in SPLITS:
            texts = [row.text for row in self.rows[split]]
            tokens = (
                tokenizer(texts, truncation=True, max_length=max_tokens).data
                if texts
                else {"input_ids": []}
            )
            lengths = [len(ids) for ids in tokens["input_ids"]]
            if 0 in lengths:
                row = self.rows[split][lengths.index(0)]
                raise ValueError(f"{split} row {row.id}: {row.text!r} has no tokens.")
            # Only a row of exactly max_tokens can have been cut.
            full = [text for text, n in zip(texts, lengths, strict=True) if n == max_tokens]
            uncut = tokenizer(full, verbose=False)["input_ids"] if full else []
            cut[split] = sum(len(ids) > max_tokens for ids in uncut)
            all_tokens[split] = tokens
        return all_tokens, cut

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
        lengths = [len(ids) for ids in self._tokens["train"]["input_ids"]]
        epoch, skip = divmod(start, max(1, len(lengths) // batch_size))
        while True:
            order = epoch_order(lengths, batch_size=batch_size, seed=seed, epoch=epoch)
            for positions in order[skip:]:
                yield self._batch("train", positions.tolist())
            epoch, skip = epoch + 1, 0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of the batch in nats, float32."""
        logits = model(**batch.inputs).logits  # b c
        return F.cross_entropy(logits.float(), batch.labels)

    def evaluate(
        self, model: nn.Module, split: str, *, batch_size: int, device: torch.device | str
    ) -> Evaluation:
        """Metrics and predictions, in the order of the split whatever the batch size.

        Raises ValueError on a split that does not exist or has no rows.
        """
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; it must be one of {SPLITS}.")
        if not self.rows[split]:
            raise ValueError(f"{self.name} has no rows in {split!r}: nothing to evaluate.")
        self._prepared()
        tokens = self._tokens[split]["input_ids"]
        # Longest first: if a batch does not fit in memory, it fails at once.
        order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
        batches = (
            self._batch(split, order[i : i + batch_size]) for i in range(0, len(order), batch_size)
        )
        by_length = classify(model, batches, device)  # n c
        logits = torch.empty_like(by_length)
        logits[order] = by_length
        rows = [row.id for row in self.rows[split]]
        return classification_evaluation(logits, self._gold[split], rows=rows, labels=self.labels)

    def remember(self, base: object) -> None:
        """A classifier has no text to forget."""

    def texts(self, split: str) -> list[str]:
        """The rows of a split as text, in the order of `evaluate`'s predictions."""
        return [row.text for row in self.rows[split]]

    def example(self) -> str:
        """The first training row: text, label, tokens and ids as the model sees them."""
        tokenizer, row = self._prepared(), self.rows["train"][0]
        ids = self._tokens["train"]["input_ids"][0]
        return "\n".join(
            [
                f"text    {row.text}",
                f"label   {row.label} (class {self.labels.index(row.label)} of {len(self.labels)})",
                f"tokens  {' '.join(tokenizer.convert_ids_to_tokens(ids))}",
                f"ids     {' '.join(map(str, ids))}",
            ]
        )

    def describe(self) -> str:
        """Rows per split, classes, and what a reader should know: held-out, cut, leaked rows."""
        parts = [f"{count:,} {split}" for split, count in self.counts.items()]
        sentences = [
            f"{self.name}: {', '.join(parts)} rows, {len(self.labels)} classes",
            *self.notes,
        ]
        if cut := sum(self.truncated_rows.values()):
            sentences.append(f"{cut:,} of {sum(self.counts.values()):,} rows were cut to fit")
        if self.leaked_rows:
            sentences.append(f"the text of {self.leaked_rows:,} test rows also occurs in train")
        return "; ".join(sentences)

    def _prepared(self) -> "PreTrainedTokenizerBase":
        if self._tokenizer is None:
            raise RuntimeError(
                f"{self.name} is not tokenised: call prepare(tokenizer, max_tokens)."
            )
        return self._tokenizer

    def _batch(self, split: str, positions: Sequence[int]) -> Batch:
        tokenizer, tokens = self._prepared(), self._tokens[split]
        padding = {
            "input_ids": tokenizer.pad_token_id,
            "token_type_ids": tokenizer.pad_token_type_id,
        }
        lengths = [len(tokens["input_ids"][i]) for i in positions]
        longest = max(lengths)

        def padded(name: str) -> Tensor:  # b t
            fill, values = padding.get(name, 0), [tokens[name][i] for i in positions]
            rests = [[fill] * (longest - len(row)) for row in values]
            pairs = zip(values, rests, strict=True)
            if tokenizer.padding_side == "left":
                return torch.tensor([rest + row for row, rest in pairs])
            return torch.tensor([row + rest for row, rest in pairs])

        return Batch(
            inputs={name: padded(name) for name in tokens},
            labels=self._gold[split][positions],
            rows=tuple(self.rows[split][i].id for i in positions),
            n_tokens=sum(lengths),
        )
