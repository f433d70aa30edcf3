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

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from variants.checks import check_type
from variants.lora import LoraLinear
from variants.store import WeightStore

_steps_taken = 0  # by all optimisers of this process


def _count_step(*_: object) -> None:
    global _steps_taken
    _steps_taken += 1


register_optimizer_step_post_hook(_count_step)


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
        W = store.dequantize(torch.float32)
        self.register_buffer("squared_norm", W.square().sum(1), persistent=False)
        self.squared_norm: Tensor
        self._norm: tuple[tuple[int, ...], tuple[int, int] | None, Tensor] | None = None
        self.m = nn.Parameter(self.row_norm().detach().clone())  # the same routine: g is 1 exactly

    def roles(self) -> Mapping[str, nn.Parameter]:
        return {"m": self.m, **super().roles()}

    def _compute_row_norm(self) -> Tensor:
        B, A = self.factors()
        AW = A @ self.store.dequantize(torch.float32).T  # k o
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

        Kept while A and B are unchanged: from one microstep to the next of the same step, as
        `begin_step` announces them, and from one pass without gradients to the next, but not
        between the two kinds. Their version numbers show in-place writes, and since a fused
        optimiser writes without raising them, the steps of all optimisers are counted too. A write
        through `.data` between two passes without gradients is not seen.
        """
        with_gradients = torch.is_grad_enabled()
        place = self.masks.position if with_gradients and self.detach_norm and self.masks else None
        if torch.compiler.is_compiling() or (with_gradients and place is None):
            self._norm = None
            with torch.set_grad_enabled(with_gradients and not self.detach_norm):
                return self._compute_row_norm()
        factors = (self.A, self.B)
        versions = (_steps_taken, *(f._version for f in factors), *(f.data_ptr() for f in factors))
        if self._norm is None or self._norm[0] != versions or not _goes_on(self._norm[1], place):
            with torch.no_grad():
                norm = self._compute_row_norm()
        else:
            norm = self._norm[2]
        self._norm = (versions, place, norm)
        return norm

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
        (B, A), g, W = self.factors(), self.gain(), self.store.dequantize(rows.dtype)
        low_rank = F.linear(F.linear(dropped, A.to(rows.dtype)), B.to(rows.dtype))
        z = (g - 1) * F.linear(dropped, W) + g * self.scale * low_rank
        y = F.linear(rows, W) + z.to(rows.dtype)
        y = y if self.bias is None else y + self.bias.to(rows.dtype)
        return y.view(*x.shape[:-1], -1).to(x.dtype)


def _goes_on(last: tuple[int, int] | None, now: tuple[int, int] | None) -> bool:
    """True if this pass is a later microstep of the last one's step. Passes that nobody announced
    apart may have writes between them that no version number shows."""
    if last is None or now is None:
        return last is now
    return now[0] == last[0] and now[1] > last[1]
