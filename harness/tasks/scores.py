"""Evaluation: a model's outputs on a split -> metrics and one prediction per row.

Shapes: n rows, c classes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.machine import distributed

if TYPE_CHECKING:
    from harness.tasks.base import Batch


@dataclass(frozen=True)
class Evaluation:
    """The scores of one pass over a split.

    Args:
        metrics: by name, without a prefix; a loss ends in `_nats`, `n` is the number of rows.
        predictions: one JSON object per row, in the order of the split.
        generation: how the answers were generated, if any were.
    """

    metrics: dict[str, float | int]
    predictions: list[dict[str, Any]]
    generation: dict[str, Any] | None = None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode that it had.

    `no_grad` and not `inference_mode`: a tensor that a layer caches in here (a norm, a rotary
    table) must still be usable in the next training step.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def classify(model: nn.Module, batches: Sequence["Batch"], device: torch.device | str) -> Tensor:
    """Logits (n, c) of the batches' rows in their order, float32 on the CPU.

    The model returns an object with `logits` (b, c), as transformers' classifiers do.
    """

    def logits(batch: "Batch") -> list[list[float]]:
        return model(**batch.to(device).inputs).logits.float().tolist()

    with evaluating(model):
        parts = distributed.share_out(logits, batches)
    return torch.tensor([row for part in parts for row in part])


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


def classification_evaluation(
    logits: Tensor, gold: Tensor, *, rows: Sequence[int], labels: Sequence[str]
) -> Evaluation:
    """Metrics and predictions from logits (n, c) and the true classes (n,), both on the CPU.

    Each prediction is {"row", "label", "prediction", "correct", "loss_nats"}; `label` is the truth.
    """
    assert logits.shape == (len(rows), len(labels)), (logits.shape, len(rows), len(labels))
    loss_nats = F.cross_entropy(logits, gold, reduction="none").numpy()  # n
    predicted = logits.argmax(-1).numpy()  # n
    predictions = [
        {
            "row": row,
            "label": labels[truth],
            "prediction": labels[guess],
            "correct": truth == guess,
            "loss_nats": nats,
        }
        for row, truth, guess, nats in zip(
            rows, gold.tolist(), predicted.tolist(), loss_nats.tolist(), strict=True
        )
    ]
    return Evaluation(classification_metrics(predicted, gold.numpy(), loss_nats), predictions)
