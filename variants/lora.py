"""LoRA: Low-Rank Adaptation (Hu et al. 2021, arXiv:2106.09685, section 4.1).

    W' = W + s B A,    s = alpha / r,    dropout on the input of A alone.

B starts at zero and A at random, so that the adapted model starts as the base. The paper says that
A is "random Gaussian"; the authors' code draws it kaiming-uniform, U(-1/sqrt(i), 1/sqrt(i)), and
that is the default here. rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) is s = alpha / sqrt(r).

LoRA+ (Hayou et al. 2024, arXiv:2402.12354) is this layer with other optimiser groups:
`variants.groups.by_role`.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from variants.checks import check_positive, check_type
from variants.layer import LowRankLinear
from variants.store import WeightStore
from variants.streams import draw_rows


def effective_scale(scaling: str, alpha: float, rank: int) -> float:
    """s: alpha / r ("lora") or alpha / sqrt(r) ("rslora")."""
    if scaling not in ("lora", "rslora"):
        raise ValueError(f"scaling is {scaling!r}; it must be 'lora' or 'rslora'.")
    check_positive("alpha", alpha)
    return alpha / (rank if scaling == "lora" else math.sqrt(rank))


def narrowed(options: Mapping[str, Any], least: int) -> dict[str, Any]:
    """The rank `least` and the alpha that keeps s, of options with a rank above it; else nothing.
    What is no rank or alpha is left for the layer itself to refuse."""
    rank, alpha, scaling = (options.get(key) for key in ("rank", "alpha", "scaling"))
    if type(rank) is not int or rank <= least or not isinstance(alpha, int | float):
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
    """s B A beside a frozen W, with B (o, r) and A (r, i).

    Args:
        rank, alpha, scaling: give s; see `effective_scale`.
        init_A: kaiming (std 1/sqrt(3 i)), gaussian (std 1/r, as in peft) or zero.
        init_B: zero, kaiming (over its own fan-in: std 1/sqrt(3 r)) or matched (A's kaiming std).
        init_offset: keep the initial factors too, as W' = W + s (B A - B0 A0), so that the adapted
            model starts as the base even if both factors are random.
        init_gain: multiplies the initial A.

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
        alpha: float,
        scaling: Literal["lora", "rslora"] = "lora",
        init_A: Literal["kaiming", "gaussian", "zero"] = "kaiming",
        init_B: Literal["zero", "kaiming", "matched"] = "zero",
        init_offset: bool = False,
        init_gain: float = 1.0,
        **given,
    ):
        check_rank(rank, store.shape, path)
        check_type("init_offset", init_offset, bool)
        check_type("init_gain", init_gain, float)
        scale = effective_scale(scaling, alpha, rank)
        super().__init__(store, bias, path=path, seed=seed, scale=scale, **given)
        o, i = store.shape
        kaiming = 1 / math.sqrt(3 * i)
        match init_A:
            case "kaiming":
                A = draw_rows(rank, i, seed, path, "A", std=kaiming)
            case "gaussian":
                A = draw_rows(rank, i, seed, path, "A", distribution="normal", std=1 / rank)
            case "zero":
                A = torch.zeros(rank, i)
            case _:
                raise ValueError(f"init_A is {init_A!r}; it must be kaiming, gaussian or zero.")
        match init_B:
            case "zero":
                B = torch.zeros(o, rank)
            case "kaiming":
                B = draw_rows(rank, o, seed, path, "B", std=1 / math.sqrt(3 * rank)).T.contiguous()
            case "matched":
                B = draw_rows(rank, o, seed, path, "B", std=kaiming).T.contiguous()
            case _:
                raise ValueError(f"init_B is {init_B!r}; it must be zero, kaiming or matched.")
        device = next(store.parameters()).device
        self.A = nn.Parameter((init_gain * A).to(device))
        self.B = nn.Parameter(B.to(device))
        self.offset = init_offset
        if init_offset:
            self.register_buffer("A0", self.A.detach().clone())
            self.register_buffer("B0", self.B.detach().clone())

    @classmethod
    def narrowed(cls, options: Mapping[str, Any], least: int) -> dict[str, Any]:
        return narrowed(options, least)

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.offset:  # [B, -B0] [A; A0]
            return torch.cat([self.B, -self.B0], dim=1), torch.cat([self.A, self.A0])
        return self.B, self.A

    def active_rank(self) -> int:
        return self.A.shape[0]

    @torch.no_grad()
    def take(self, factors: Mapping[str, Tensor], scale: float) -> None:
        if self.offset:
            raise ValueError(f"{self.path} has init_offset, so its factors cannot be taken over.")
        taken = self._fitted(factors, self.A.shape[0])
        k = len(taken["E"])
        self.A[:k] = taken["A"]
        self.B[:, :k] = scale / self.scale * taken["B"] * taken["E"]
        self.B[:, k:] = 0.0
        self.unmerge()
