"""The controls: full fine-tuning of the adapted layers, and layers that are left as they are."""

import torch
from torch import Tensor, nn

from variants.layer import AdapterLinear, UnadaptedLinear
from variants.store import WeightStore


class FixedLinear(UnadaptedLinear):
    """For training biases alone (BitFit, Ben Zaken et al. 2021, arXiv:2106.10199) or nothing but
    the model's head."""


class FullLinear(AdapterLinear):
    """W and the bias themselves, trained as float32 copies; there is no store.

    W + D with a trained D would decay D where full fine-tuning decays W, and would hold W twice.
    So there is no W left to subtract: `delta_weight` raises ValueError.
    """

    def __init__(self, store: WeightStore, bias: Tensor | None, **given):
        super().__init__(store, bias, **given)
        self.W = nn.Parameter(store.dequantize(torch.float32).clone())
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().float().clone())
        self.store = None

    def base_weight(self) -> Tensor:
        return self.W

    def definition(self, W: Tensor) -> Tensor:
        return W

    def delta_weight(self) -> Tensor:
        raise ValueError(
            f"{self.path} was fine-tuned in place and no longer holds its base weight: "
            "subtract the base model's from adapted_weight()."
        )
