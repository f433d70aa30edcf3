"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al. 2024, arXiv:2402.09353, section 4).

    W' = diag(m / ||V'||) V',    V' = W + s B A,    ||V'|| one norm per output neuron.

The paper writes W as (i, o) and calls the norm column-wise; for W (o, i) as torch stores it, it is
the norm of each row, and m has o entries. Initially m = ||W||, so the model starts as the base.
Section 4.3: the norm is treated as a constant in the backward pass (`detach_norm`).

The norm is never taken of a dense V'. With w, b, one row of W and B each,

    ||w + s b A||^2 = ||w||^2 + 2 s b (W A^T)_row + s^2 b (A A^T) b^T

which needs one (o, i) x (i, k) product.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from variants.lora import LoraLinear
from variants.settings import check_type
from variants.store import WeightStore


class DoraLinear(LoraLinear):
    """Magnitude m (o,) and direction V' = W + s B A of a frozen W.

    Args:
        detach_norm: hold ||V'|| constant in the backward pass (the paper's choice); False follows
            the full gradient.
        magnitude_dropout: drop the input of W inside the magnitude's change too,
            y = x W^T + (g - 1) x~ W^T + g s x~ A^T B^T, as the authors' code does; costs a second
            base product. False drops the input of the low-rank product alone.

    The remaining arguments are those of `LoraLinear`.
    """

    def __init__(
        self,
        store: WeightStore,
        bias: Tensor | None,
        *,
        detach_norm: bool = True,
        magnitude_dropout: bool = False,
        **lora,
    ):
        super().__init__(store, bias, **lora)
        check_type("detach_norm", detach_norm, bool)
        check_type("magnitude_dropout", magnitude_dropout, bool)
        if magnitude_dropout and self.dropout == 0.0:
            raise ValueError("magnitude_dropout is true, but dropout is 0; set dropout as well.")
        self.detach_norm, self.magnitude_dropout = detach_norm, magnitude_dropout
        W = self.store.dequantize(torch.float32)
        self.register_buffer("squared_norm", W.square().sum(1), persistent=False)
        self.squared_norm: Tensor
        self._norm: tuple[Any, Tensor] | None = None  # what it was computed for, and the norm
        self.m = nn.Parameter(self.row_norm().detach().clone())  # the same routine: g is 1 exactly

    def roles(self) -> Mapping[str, nn.Parameter]:
        return {"m": self.m, **super().roles()}

    def _compute_row_norm(self) -> Tensor:
        B, A = self.stored_factors()
        AW = A @ self.store.dequantize(A.dtype).T  # k o
        halfway = torch.addmm(AW, A @ A.T, B.T, alpha=self.scale / 2)  # k o: A (W + s/2 B A)^T
        change = (B.T * halfway).sum(0)
        squared = torch.add(self.squared_norm, change, alpha=2 * self.scale)
        # Below eps ||w||^2 the sum is rounding alone, and g would blow up what is left of the row.
        # The smallest normal number is for a row that is zero in W too.
        limits = torch.finfo(torch.float32)
        squared = torch.maximum(squared, limits.eps * self.squared_norm)
        return squared.clamp_min(limits.tiny).sqrt()

    def row_norm(self) -> Tensor:
        """||W + s B A|| per row (o,), a constant in the backward pass if `detach_norm`.

        Computed once a step in training, in the first of the microsteps that `begin_step`
        announces, and once in evaluation: from one pass without gradients to the next, until
        `train()` or `eval()`, a pass with gradients, or a write to A or B. In any other pass it is
        computed anew. A write through `.data` in the middle of an evaluation is not seen.
        """
        key: Any = None  # of a norm that passes share
        goes_on = False
        if torch.compiler.is_compiling():
            pass
        elif torch.is_grad_enabled():
            if self.detach_norm and self.masks is not None:
                key, microstep = self.masks.position
                goes_on = microstep > 0
        elif not self.training:
            key, goes_on = (self.A.device, self.A._version, self.B._version), True
        if goes_on and self._norm is not None and self._norm[0] == key:
            return self._norm[1]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_norm):
            norm = self._compute_row_norm()
        self._norm = None if key is None else (key, norm)
        return norm

    def train(self, mode: bool = True) -> "DoraLinear":
        self._norm = None
        return super().train(mode)

    @torch.no_grad()
    def take(self, factors: Mapping[str, Tensor], scale: float) -> None:
        """Without an m, the row norms of W + s B A: the map stays what it was."""
        super().take({role: factor for role, factor in factors.items() if role != "m"}, scale)
        self.m.copy_(factors.get("m", self._compute_row_norm()))

    def gain(self) -> Tensor:
        return self.m / self.row_norm()

    def adapted(self, x: Tensor) -> Tensor:
        mask = self.mask()
        if not self.magnitude_dropout or mask is None:
            return super().adapted(x)
        rows = rearrange(x.to(self.compute_dtype or x.dtype), "... i -> (...) i")
        dropped = rows * mask(rows.shape, rows.device, rows.dtype) / (1 - self.dropout)
        (B, A), g, W = self.factors(), self.gain(), self.base_weight().to(rows.dtype)
        low_rank = F.linear(F.linear(dropped, A.to(rows.dtype)), B.to(rows.dtype))
        z = (g - 1) * F.linear(dropped, W) + g * self.scale * low_rank
        y = F.linear(rows, W) + z.to(rows.dtype)
        y = y if self.bias is None else y + self.bias.to(rows.dtype)
        return y.view(*x.shape[:-1], -1).to(x.dtype)
