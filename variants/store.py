"""Frozen weights, however they are kept.

Shapes: i input features, o output features.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class WeightStore(nn.Module, ABC):
    """A frozen (o, i) weight, however it is kept.

    What it keeps are Parameters with requires_grad False (codes included, so that they can be
    sharded); nothing writes them after __init__. `dtype` is the weight's own, as it was loaded.
    """

    shape: tuple[int, int]
    dtype: torch.dtype

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The dense weight (o, i) in `dtype`. The caller must not write it."""

    @abstractmethod
    def like(self, weight: Tensor) -> "WeightStore":
        """A store of this kind, with these settings and this dtype, for another weight (o, i)."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes kept, with codes, scales and tables."""


class DenseStore(WeightStore):
    """The weight as it was loaded, in its own dtype."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.shape, self.dtype = (weight.shape[0], weight.shape[1]), weight.dtype

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)

    def like(self, weight: Tensor) -> "DenseStore":
        return DenseStore(weight.to(self.dtype))

    def nbytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()


def check_kept(kept: Tensor, dtype: torch.dtype, count: int, what: str) -> None:
    """Raise ValueError unless a part of a store is of `dtype`, has `count` entries, is finite."""
    if kept.dtype != dtype or kept.numel() != count:
        raise ValueError(
            f"{what} is {kept.numel()} entries of {kept.dtype}; it must be {count} of {dtype}."
        )
    if dtype.is_floating_point and not (kept.is_meta or kept.isfinite().all()):
        raise ValueError(f"{what} has a NaN or an infinity.")


def frozen(kept: Tensor) -> nn.Parameter:
    """A Parameter that no cast touches: float32 becomes the int32 words of its bits."""
    bits = kept.view(torch.int32) if kept.dtype == torch.float32 else kept
    return nn.Parameter(bits.clone(), requires_grad=False)
