"""The common parts of text classification tasks: labels, tokens, batches, loss, evaluation.

A concrete task reads rows and hands them to `TextClassification`.

Shapes: n rows of a split, b rows of a batch, t tokens (padded), c classes.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.models.mode import evaluating
from harness.tasks import metrics, token_cache
from harness.tasks.batch import SPLITS, Batch, Evaluation
from harness.tasks.encoding import as_text, control_tokens_in
from harness.tasks.rows import RowTask, by_length, padded
from harness.tasks.turns import check_control_tokens, control_sentence
from harness.words import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from harness.models.base import BaseModel


@dataclass(frozen=True, slots=True)
class Row:
    """One example. `id` is unique in its split and names the row in predictions."""

    id: int
    text: str
    label: str

    @property
    def prompt(self) -> str:
        return self.text

    @property
    def key(self) -> str:
        return self.text

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    @property
    def content(self) -> Sequence[Any]:
        return self.text, self.label


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


class TextClassification(RowTask[Row]):
    """A `harness.tasks.base.Task` over rows of text with one label each.

    Args:
        rows: train, validation and test. The labels of all of them are in `labels`.
        labels: class names in the order of the model's outputs.
        name, signal_rows, max_tokens, notes: see `RowTask`.
        control_tokens: what the characters of a control token are that stand in a text: text, or
            tokens.
    """

    primary_metric = "accuracy"

    def __init__(
        self,
        name: str,
        rows: Mapping[str, Sequence[Row]],
        labels: tuple[str, ...],
        /,
        *,
        signal_rows: int = 256,
        max_tokens: int = 64,
        control_tokens: str = "text",
        notes: Sequence[str] = (),
    ):
        check_control_tokens(control_tokens)
        super().__init__(
            name,
            rows,
            signal_rows=signal_rows,
            max_tokens=max_tokens,
            notes=(f"{len(labels)} classes", *notes),
            other_data=json.dumps(labels),
        )
        self.labels, self.control_tokens = labels, control_tokens
        self.control_rows: list[set[str]] = []
        number = {label: i for i, label in enumerate(labels)}
        self._gold = {
            split: torch.tensor([number[row.label] for row in self.rows[split]], dtype=torch.long)
            for split in SPLITS
        }

    @property
    def metrics(self) -> dict[str, metrics.Metric]:
        return metrics.classification(len(self.labels))

    def _tokens_depend_on(self, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> str:
        special = tokenizer.num_special_tokens_to_add()
        if max_tokens <= special:
            raise ValueError(
                f"max_tokens is {max_tokens}; it must be at least {special + 1}, since the "
                f"tokenizer adds {special} special tokens."
            )
        texts = [row.text for split in SPLITS for row in self.rows[split]]
        self.control_rows = control_tokens_in(tokenizer, texts, self.control_tokens)
        return f"{self.fingerprint} {self.control_tokens}"

    def _tokenise(
        self, tokenizer: "PreTrainedTokenizerBase", max_tokens: int
    ) -> tuple[token_cache.Tokens, token_cache.Counts]:
        """Raises ValueError if a row has no tokens at all."""
        all_tokens: token_cache.Tokens = {}
        cut = {}
        split_them = as_text(self.control_rows)
        for split in SPLITS:
            texts = [row.text for row in self.rows[split]]
            tokens = (
                tokenizer(texts, truncation=True, max_length=max_tokens, **split_them).data
                if texts
                else {"input_ids": []}
            )
            lengths = [len(ids) for ids in tokens["input_ids"]]
            if 0 in lengths:
                row = self.rows[split][lengths.index(0)]
                raise ValueError(f"{split} row {row.id}: {row.text!r} has no tokens.")
            # Only a row of exactly max_tokens can have been cut.
            full = [text for text, n in zip(texts, lengths, strict=True) if n == max_tokens]
            uncut = tokenizer(full, verbose=False, **split_them)["input_ids"] if full else []
            cut[split] = sum(len(ids) > max_tokens for ids in uncut)
            all_tokens[split] = tokens
        return all_tokens, {"cut": cut}

    def _batch(self, split: str, positions: Sequence[int]) -> Batch:
        tokenizer, tokens = self._prepared(), self._tokens[split]
        fills = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        left = tokenizer.padding_side == "left"
        inputs = {
            name: padded([rows[i] for i in positions], fills.get(name) or 0, left=left)
            for name, rows in tokens.items()
        }
        return Batch(
            inputs=inputs,
            labels=self._gold[split][positions],
            rows=tuple(self.rows[split][i].id for i in positions),
            n_tokens=sum(len(tokens["input_ids"][i]) for i in positions),
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of the batch in nats, float32."""
        logits = model(**batch.inputs).logits  # b c
        return F.cross_entropy(logits.float(), batch.labels)

    def evaluate(
        self, model: nn.Module, split: str, *, batch_size: int, device: torch.device | str
    ) -> Evaluation:
        """Metrics and predictions, in the order of the split whatever the batch size; `label` is
        the truth. The model returns an object with `logits` (b, c), as transformers' do.

        Raises ValueError on a split that does not exist or has no rows.
        """
        lengths, gold = self._lengths(split), self._gold[split]

        def logits_of(positions: list[int]) -> list[list[float]]:
            batch = self._batch(split, positions).to(device)
            return model(**batch.inputs).logits.float().tolist()

        with evaluating(model):
            found = by_length(logits_of, lengths, batch_size)
        logits = torch.tensor([found[i] for i in range(len(lengths))])  # n c
        loss_nats = F.cross_entropy(logits, gold, reduction="none")  # n
        predicted = logits.argmax(-1)  # n
        predictions = [
            {
                "row": row.id,
                "label": row.label,
                "prediction": self.labels[guess],
                "correct": self.labels[guess] == row.label,
                "loss_nats": nats,
            }
            for row, guess, nats in zip(
                self.rows[split], predicted.tolist(), loss_nats.tolist(), strict=True
            )
        ]
        scores = classification_metrics(predicted.numpy(), gold.numpy(), loss_nats.numpy())
        return Evaluation(scores, predictions)

    def check_base(self, base: "BaseModel") -> None:
        """Raises ValueError, naming the row, if the base cannot read one in a batch with others:
        some classify by a text's last end-of-text token and need the same number in each."""
        if not _counts_ends(base.model):
            return
        end = base.model.config.eos_token_id
        counts = {split: [ids.count(end) for ids in self._tokens[split]["input_ids"]]
                  for split in SPLITS}  # fmt: skip
        usual = Counter(chain(*counts.values())).most_common(1)[0][0]
        if usual == 0:
            raise ValueError(
                f"{base.name} classifies by a text's end-of-text token, which its tokenizer does "
                "not put after a text; give the tokenizer that the model was trained with."
            )
        for split in SPLITS:
            for row, count in zip(self.rows[split], counts[split], strict=True):
                if count != usual:
                    raise ValueError(
                        f"{split} row {row.id} has {count} end-of-text tokens and most rows have "
                        f"{usual}, and {base.name} needs the same number in each: take them out "
                        "of its text, or set task.control_tokens=text."
                    )

    def remember(self, base: object) -> None:
        """A classifier has no text to forget."""

    def samples(self, split: str, predictions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Gives every row's text with its prediction."""
        pairs = zip(self.texts(split), predictions, strict=True)
        return [{"text": text, **prediction} for text, prediction in pairs]

    def describe(self) -> str:
        """Says what `RowTask` says, and names the control tokens in texts."""
        return super().describe() + control_sentence(self.control_rows)

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


def _counts_ends(model: Any) -> bool:
    """True if a classifier refuses rows with other numbers of end-of-text tokens in one batch."""
    end = model.config.eos_token_id
    if not (model.config.is_encoder_decoder and isinstance(end, int)):
        return False
    other = 0 if end else 1
    ids = torch.tensor([[other, end], [end, end]], device=model.device)
    with evaluating(model):
        try:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        except ValueError:
            return True
    return False


def classification_metrics(
    predicted: np.ndarray, gold: np.ndarray, loss_nats: np.ndarray
) -> dict[str, float | int]:
    """accuracy, macro_f1, mean loss_nats and n, from three arrays (n,), n > 0.

    macro_f1 is the unweighted mean of F1 = 2 TP / (gold + predicted) over the classes that occur
    in `gold` or in `predicted`; a class that occurs in neither is left out, and one without a
    true positive counts 0.
    """
    classes = max(gold.max(), predicted.max()) + 1
    true_positive = np.bincount(gold[gold == predicted], minlength=classes)
    occurrences = np.bincount(gold, minlength=classes) + np.bincount(predicted, minlength=classes)
    f1 = 2.0 * true_positive[occurrences > 0] / occurrences[occurrences > 0]
    return {
        "accuracy": float(np.mean(gold == predicted)),
        "macro_f1": float(f1.mean()),
        "loss_nats": float(np.mean(loss_nats, dtype=np.float64)),
        "n": len(gold),
    }
