"""Random numbers that are a function of a name: equal on every machine, in any order of drawing."""

import hashlib
from typing import Literal

import torch
from torch import Tensor


def stream_seed(*key: object) -> int:
    """A 63-bit seed that depends on `key` alone: sha256, so equal on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def draw_rows(
    count: int,
    length: int,
    *key: object,
    distribution: Literal["uniform", "normal"] = "uniform",
    std: float,
) -> Tensor:
    """`count` random rows (count, length) of standard deviation `std`, from the stream `key`.

    Drawn on the CPU in float32, one row after the other: the first 8 rows of 16 are the 8 rows that
    a smaller request returns, on every device. `uniform` is U(-sqrt(3) std, sqrt(3) std).
    """
    generator = torch.Generator().manual_seed(stream_seed(*key))
    rows = torch.empty(count, length)
    for row in rows:
        if distribution == "uniform":
            row.uniform_(-(3**0.5) * std, 3**0.5 * std, generator=generator)
        else:
            row.normal_(0.0, std, generator=generator)
    return rows
