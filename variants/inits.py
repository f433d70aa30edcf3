"""Starts: the factors B0 (o, r) and A0 (r, i) that a low-rank layer begins with.

A start is a function of the frozen weight W (o, i), given in float32,

    start(W, *, rank, scale, seed, path) -> (B0, A0)

and takes what it does not use as **_. It may look at W, and draws from (seed, path, role) alone.
The base stays whole at the start by one of

    zero       B0 A0 = 0
    offset     W' = W + s (B A - B0 A0), in every dtype; costs products of rank 2 r
    residual   the store is made of W - s B0 A0, in float32, before it is rounded or quantised, and
               W is the store + s B0 A0: products of rank r, and W' starts as near to the loaded
               weight as the store keeps W - s B0 A0
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from variants.streams import draw_rows

TOLERANCE = 1e-5  # of ||W||: what two machines may differ by in s B0 A0
Start = Callable[..., tuple[Tensor, Tensor]]
Base = Literal["zero", "offset", "residual"]
InitA = Literal["kaiming", "gaussian", "zero"]
InitB = Literal["zero", "kaiming", "matched"]


def kaiming(rank: int, length: int, *key: object, fan_in: int) -> Tensor:
    """Rows (rank, length) of U(-1/sqrt(fan_in), 1/sqrt(fan_in)), of std 1/sqrt(3 fan_in)."""
    return draw_rows(rank, length, *key, std=1 / math.sqrt(3 * fan_in))


def gaussian(rank: int, length: int, *key: object, std: float) -> Tensor:
    """Rows (rank, length) of N(0, std^2)."""
    return draw_rows(rank, length, *key, distribution="normal", std=std)


def drawn(
    W: Tensor, *, rank: int, seed: int, path: str, A: InitA, B: InitB, gain: float, **_
) -> tuple[Tensor, Tensor]:
    """Random factors that do not look at W; see `LoraLinear`'s init_A, init_B and init_gain."""
    for key, name, allowed in (("init_A", A, InitA), ("init_B", B, InitB)):
        if name not in (names := get_args(allowed)):
            raise ValueError(
                f"{key} is {name!r}; it must be {', '.join(names[:-1])} or {names[-1]}."
            )
    o, i = W.shape
    A0, B0 = torch.zeros(rank, i), torch.zeros(rank, o)
    if A == "kaiming":
        A0 = kaiming(rank, i, seed, path, "A", fan_in=i)
    elif A == "gaussian":
        A0 = gaussian(rank, i, seed, path, "A", std=1 / rank)
    if B != "zero":  # matched: of A's standard deviation
        B0 = kaiming(rank, o, seed, path, "B", fan_in=rank if B == "kaiming" else i)
    return B0.T, gain * A0


@torch.no_grad()
def started(
    start: Start, W: Tensor, *, rank: int, scale: float, seed: int, path: str
) -> tuple[Tensor, Tensor]:
    """B0 and A0 of a start, in float32 on W's device. Raises ValueError for other shapes."""
    B0, A0 = start(W.detach().float(), rank=rank, scale=scale, seed=seed, path=path)
    if (B0.shape, A0.shape) != ((W.shape[0], rank), (rank, W.shape[1])):
        raise ValueError(
            f"init gives {path} B of {tuple(B0.shape)} and A of {tuple(A0.shape)}; they must be "
            f"{W.shape[0]} x {rank} and {rank} x {W.shape[1]}."
        )
    return B0.to(W.device, torch.float32).contiguous(), A0.to(W.device, torch.float32).contiguous()
