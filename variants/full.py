"""The controls: full fine-tuning of the adapted layers, and layers that are left as they are."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import AdapterLinear
from variants.store import WeightStore


class FullLinear(AdapterLinear):
    """W and the bias themselves, trained as float32 copies; the store is dropped.

    W + D with a trained D would decay D where full fine-tuning decays W, and would hold W twice.
    So there is no W left to subtract: `delta_weight` raises ValueError.
    """

    def __init__(
        self,
        store: WeightStore,
        bias: Tensor | None,
        *,
        path: str,
        seed: int,
        compute_dtype: torch.dtype | None = None,
    ):
        super().__init__(store, bias, path=path, seed=seed, compute_dtype=compute_dtype)
        self.W = nn.Parameter(store.dequantize(torch.float32).clone())
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().float().clone())
        self.store = _Dropped(store)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.W.new_zeros(self.out_features, 0), self.W.new_zeros(0, self.in_features)

    def roles(self) -> Mapping[str, nn.Parameter]:
        return {"W": self.W, **super().roles()}

    def active_rank(self) -> int:
        return min(self.W.shape)

    def definition(self) -> Tensor:
        return self.W.clone()

    def delta_weight(self) -> Tensor:
        raise ValueError(
            f"{self.path} was fine-tuned in place and no longer holds its base weight: "
            "subtract the base model's from adapted_weight()."
        )

    def adapted(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.W.to(dtype), bias).to(x.dtype)


class _Dropped(WeightStore):
    """The rest of a store whose weight is no longer held."""

    def __init__(self, store: WeightStore):
        super().__init__()
        self.shape, self.dtype = store.shape, store.dtype

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        raise ValueError("this layer no longer holds a frozen weight.")

    def nbytes(self) -> int:
        return 0


class FixedLinear(AdapterLinear):
    """W as it is. For training biases alone (BitFit, Ben Zaken et al. 2021, arXiv:2106.10199) or
    nothing but the model's head."""

    def factors(self) -> tuple[Tensor, Tensor]:
        device = next(self.store.parameters()).device
        return (
            torch.zeros(self.out_features, 0, device=device),
            torch.zeros(0, self.in_features, device=device),
        )
