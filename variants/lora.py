"""LoRA: Low-Rank Adaptation (Hu et al. 2021, arXiv:2106.09685, section 4.1).

    W' = W + s B A,    s = alpha / r,    dropout on the input of A alone.

B starts at zero and A at random, so that the adapted model starts as the base. The paper says that
A is "random Gaussian"; the authors' code draws it kaiming-uniform, U(-1/sqrt(i), 1/sqrt(i)), and
that is the default here. rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) is s = alpha / sqrt(r).

LoRA+ (Hayou et al. 2024, arXiv:2402.12354) is this layer with other optimiser groups:
`variants.groups.by_role`.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from variants import inits
from variants.layer import LowRankLinear
from variants.settings import check_positive, check_type
from variants.store import WeightStore


def effective_scale(scaling: str, alpha: float | None, rank: int) -> float:
    """s: alpha / r ("lora") or alpha / sqrt(r) ("rslora"); an alpha of None stands for 2 r."""
    if scaling not in ("lora", "rslora"):
        raise ValueError(f"scaling is {scaling!r}; it must be 'lora' or 'rslora'.")
    if alpha is None:
        alpha = 2 * rank
    check_positive("alpha", alpha)
    return alpha / (rank if scaling == "lora" else math.sqrt(rank))


def narrowed(options: Mapping[str, Any], least: int) -> dict[str, Any]:
    """The rank `least` and the alpha that keeps s, of options with a rank above it; else nothing.
    What is no rank or alpha is left for the layer itself to refuse."""
    rank, alpha, scaling = (options.get(key) for key in ("rank", "alpha", "scaling"))
    if "alpha" not in options or type(rank) is not int or rank <= least:
        return {}
    alpha = 2 * rank if alpha is None else alpha
    if not isinstance(alpha, int | float):
        return {}
    ratio = least / rank
    return {"rank": least, "alpha": alpha * (math.sqrt(ratio) if scaling == "rslora" else ratio)}


def check_rank(rank: int, shape: tuple[int, int], path: str, name: str = "rank") -> None:
    """Raise ValueError unless 1 <= rank <= min(o, i)."""
    check_type(name, rank, int)
    if not 1 <= rank <= min(shape):
        raise ValueError(
            f"{name} is {rank}; {path} is {shape[0]} x {shape[1]}, so it must lie in "
            f"[1, {min(shape)}]; rank_pattern gives a layer a rank of its own."
        )


class LoraLinear(LowRankLinear):
    """s B A added to a frozen W, with B (o, r) and A (r, i).

    Args:
        rank, alpha, scaling: give s; see `effective_scale`.
        init_A: kaiming (std 1/sqrt(3 i)), gaussian (std 1/r, as in peft) or zero.
        init_B: zero, kaiming (over its own fan-in: std 1/sqrt(3 r)) or matched (A's kaiming std).
        init_offset: keep the initial factors too, as W' = W + s (B A - B0 A0), so that the adapted
            model starts as the base even if both factors are random.
        init_gain: multiplies the initial A.
        init: a start of `variants.inits` or your own, instead of the four above.
        init_base: how the base stays whole at the start, zero, offset or residual: see
            `variants.inits`. None: offset with init_offset, else zero, which is not checked for
            the factors of init_A and init_B.
        weight: W as it was loaded, for a start that looks at it; None: as the store gives it.

    The remaining arguments are those of `LowRankLinear`.
    """

    A0: Tensor
    B0: Tensor

    def __init__(
        self,
        store: WeightStore,
        bias: Tensor | None,
        *,
        path: str,
        seed: int,
        rank: int,
        alpha: float | None,
        scaling: Literal["lora", "rslora"] = "lora",
        init_A: inits.InitA = "kaiming",
        init_B: inits.InitB = "zero",
        init_offset: bool = False,
        init_gain: float = 1.0,
        init: inits.Start | None = None,
        init_base: inits.Base | None = None,
        weight: Tensor | None = None,
        **given,
    ):
        check_rank(rank, store.shape, path)
        check_type("init_offset", init_offset, bool)
        check_type("init_gain", init_gain, float)
        if init_base not in (None, *get_args(inits.Base)):
            raise ValueError(f"init_base is {init_base!r}; it must be zero, offset or residual.")
        if init_offset and init_base not in (None, "offset"):
            raise ValueError(f"init_offset is true; it must be false with init_base {init_base!r}.")
        whole = init is not None or init_base == "zero"  # the older keys may move the base
        if init is None:
            init = functools.partial(inits.drawn, A=init_A, B=init_B, gain=init_gain)
        elif (init_A, init_B, init_gain) != ("kaiming", "zero", 1.0):
            raise ValueError("init is given; leave init_A, init_B and init_gain out.")
        scale = effective_scale(scaling, alpha, rank)
        W = store.dequantize(torch.float32) if weight is None else weight
        B0, A0 = inits.started(init, W, rank=rank, scale=scale, seed=seed, path=path)
        base = "offset" if init_offset else init_base or "zero"
        if whole and base == "zero" and not W.is_meta and B0.any() and A0.any():
            raise ValueError(
                f"init_base is zero, but B A of {path} is not; it must be offset or residual."
            )
        if base == "residual":
            store = store.like(W.detach().float() - scale * B0 @ A0)
        super().__init__(store, bias, path=path, seed=seed, scale=scale, **given)
        self.A, self.B = nn.Parameter(A0), nn.Parameter(B0)
        self.base = base
        if self.base != "zero":
            self.register_buffer("A0", A0.clone())
            self.register_buffer("B0", B0.clone())

    @classmethod
    def narrowed(cls, options: Mapping[str, Any], least: int) -> dict[str, Any]:
        return narrowed(options, least)

    def base_weight(self) -> Tensor:
        W = super().base_weight()
        return W + self.scale * self.B0 @ self.A0 if self.base == "residual" else W

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.base == "zero":
            return self.B, self.A
        return torch.cat([self.B, -self.B0], dim=1), torch.cat([self.A, self.A0])

    def stored_factors(self) -> tuple[Tensor, Tensor]:
        return (self.B, self.A) if self.base == "residual" else self.factors()

    def active_rank(self) -> int:
        return self.A.shape[0]

    @torch.no_grad()
    def take(self, factors: Mapping[str, Tensor], scale: float) -> None:
        if self.base != "zero":
            reason = "init_offset" if self.base == "offset" else "init_base residual"
            raise ValueError(f"{self.path} has {reason}, so its factors cannot be taken over.")
        taken = self._fitted(factors, self.A.shape[0])
        k = len(taken["E"])
        self.A[:k] = taken["A"]
        self.B[:, :k] = scale / self.scale * taken["B"] * taken["E"]
        self.B[:, k:] = 0.0
        self.unmerge()

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """The store of a residual was made with the start that was computed here. Raises
        ValueError if the state's is another one, as an SVD may give elsewhere."""
        if self.base == "residual" and {"A0", "B0"} <= set(state):
            W, there, here = super().base_weight(), state["B0"] @ state["A0"], self.B0 @ self.A0
            if (there.to(here) - here).norm() > inits.TOLERANCE * W.norm() / self.scale:
                raise ValueError(
                    f"{self.path} starts from other factors here than where it was trained, so "
                    "that its base would be another one; restore it where it was trained."
                )
        super().load_adapter_state(state)
