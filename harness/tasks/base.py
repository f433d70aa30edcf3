"""The interface between the training loop and a task.

A task is data, a loss and an evaluation. It is read in its constructor, so that its labels are
known before the model is built, and tokenised once by `prepare`, when the tokenizer is known.

Shapes: b rows of a batch, t tokens (padded), c classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from harness.tasks.batch import Batch, Evaluation
from harness.tasks.metrics import Metric

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from harness.models.base import BaseModel
    from harness.tasks.forgetting import Reference


class Task(Protocol):
    """One dataset in four splits, its loss and its metrics.

    `signal` is a slice of train that every variant leaves out of training; the loss on it tells a
    rank allocator when to grow. It may be empty; the other splits never are.

    Attributes:
        name: as in conf/task/.
        labels: class names in the order of the model's outputs; None for language modelling.
        fingerprint: sha256 (hex) of the data as used, all splits and their rows' ids.
        metrics: what can be said beforehand of each of `Evaluation.metrics` that may be compared.
        primary_metric: the key of `Evaluation.metrics` that a comparison is about.
        counts: rows per split.
        truncated_rows: rows per split that `prepare` cut.
        lost_rows: rows per split of which it left nothing to learn, and which it dropped.
        max_tokens: the length at which the task wants its rows cut; the loop passes the smaller of
            this and the model's own limit to `prepare`.
        remote: the data are not in files that its settings name, so that a change is noticed only
            when they are read.
    """

    name: str
    labels: tuple[str, ...] | None
    fingerprint: str
    metrics: dict[str, Metric]
    primary_metric: str
    counts: dict[str, int]
    truncated_rows: dict[str, int]
    lost_rows: dict[str, int]
    max_tokens: int
    remote: bool

    def prepare(self, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> None:
        """Tokenise every split once, cutting rows at `max_tokens`. Raises ValueError if the
        tokenizer cannot pad or `max_tokens` leaves no room for text."""

    def check_base(self, base: "BaseModel") -> None:
        """Raises ValueError if the base cannot do what the task will ask of it. Called after
        `prepare`, before anything is trained."""

    def train_batches(self, *, seed: int, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """Endless batches of train, on the CPU, from the `start`-th on (as if that many had been
        taken before). Their order depends on (seed, "data", epoch) alone."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of the batch in nats, float32, a scalar with a gradient."""

    def evaluate(
        self, model: nn.Module, split: str, *, batch_size: int, device: torch.device | str
    ) -> Evaluation:
        """Metrics and per-row predictions on a split. Leaves the model's mode and the global
        random state as they were. Raises ValueError on an unknown or empty split."""

    def remember(self, base: "BaseModel") -> "Reference | None":
        """The predictions of the base, not adapted yet, for a held-out text, to compare with the
        trained model; None if the task has no such text. Called after `prepare`."""

    def texts(self, split: str) -> list[str]:
        """The rows of a split as text, in the order of `evaluate`'s predictions."""

    def samples(self, split: str, predictions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Gives rows of a split with the model's predictions, for a human to read.

        Args:
            predictions: those of `evaluate`.
        """

    def example(self) -> str:
        """The first training row for a human: text, label, tokens, ids."""

    def describe(self) -> str:
        """One line for the banner: rows per split and whatever a reader should know of them."""
