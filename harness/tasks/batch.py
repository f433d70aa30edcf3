"""The values that pass between a task and the loop: batches, and the scores of a split.

Shapes: b rows of a batch, t tokens (padded).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SPLITS = ("train", "signal", "validation", "test")
IGNORED = -100  # as a label: not learned


@dataclass(frozen=True)
class Batch:
    """Some rows of one split, padded to the longest of them.

    Args:
        inputs: the model's keyword arguments by name, each (b, t): input_ids, attention_mask and
            whatever else the tokenizer makes.
        labels: (b,) class numbers, or (b, t) tokens, IGNORED where one is not learned.
        rows: the rows' ids, as they appear in predictions.
        n_tokens: tokens in the batch, padding left out.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    rows: tuple[int, ...]
    n_tokens: int

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`; to a GPU its tensors are copied while the host goes on."""
        inputs = {name: _moved(tensor, device) for name, tensor in self.inputs.items()}
        return Batch(inputs, _moved(self.labels, device), self.rows, self.n_tokens)

    @property
    def learned(self) -> int:
        """The number of learned labels, or tokens, of which nothing predicts the first."""
        predicted = self.labels if self.labels.ndim == 1 else self.labels[:, 1:]
        return int((predicted != IGNORED).sum())


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()  # or the copy would be waited for
    return tensor.to(device, non_blocking=True)


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
