"""NormalFloat-4: weights as 4-bit codes, one scale a block (QLoRA, Dettmers et al. 2023).

A weight is read row by row in blocks of 64 (the last may be shorter). With T the table below,

    absmax = max |w| over the block        code = the index of the entry of T nearest to w / absmax

and w is restored as T[code] * absmax. Two codes share a byte, the first in the high nibble; an odd
end is filled with the code of zero.

The table. Section 3 of the paper asks for quantiles of a normal distribution with an exact zero;
its equation 4 does not give the published values, the authors' code does and is followed:
Phi^-1 at linspace(0.9677083, 1/2, 9)[:-1] for the 8 positive entries, minus Phi^-1 at
linspace(0.9677083, 1/2, 8)[:-1] for the 7 negative ones, zero, all divided by the largest; where
0.9677083 = 1 - (1/30 + 1/32) / 2.

Double quantisation (section 3) keeps the scales themselves in 8 bits: their mean is taken off and
the rest coded in blocks of 256 against the signed dynamic map (Dettmers 2016, arXiv:1511.04561).
The weight's codes come from the exact scales and are not rounded again.

Every bit, of codes, scales and restored weights, is that of bitsandbytes (0.50, on the CPU). Where
its kernels differ from each other by a rounding the comment says which is followed.
"""

import math

import torch
from einops import rearrange
from torch import Tensor

TABLE = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)
ZERO_CODE = 7
BLOCKS = tuple(2**power for power in range(5, 13))  # 32 to 4096

_PIECE = 2**19  # entries in flight, a multiple of every block: 2 MiB of float32
_TINY = 1e-38  # stands in for the scale of a block of zeros


def dynamic_table() -> Tensor:
    """The signed 8-bit dynamic map (256,) in float32, ascending, within [-0.993, 1].

    For each decade 10^-6 .. 10^0 the means of neighbours in linspace(0.1, 1), twice as many as in
    the decade below and of both signs; then 0 and 1.
    """
    entries = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1)
        means = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        entries += [means, -means]
    return torch.cat(entries).sort().values


DYNAMIC_TABLE = dynamic_table()


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """The index (uint8) of the nearest entry of an ascending table; a tie goes to the lower."""
    midpoints = ((table[:-1] + table[1:]) / 2).to(values.device)
    return torch.bucketize(values, midpoints, out_int32=True).to(torch.uint8)


def pack(codes: Tensor) -> Tensor:
    """Codes (n,) below 16 -> bytes (ceil(n / 2),), the first of two in the high nibble."""
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=ZERO_CODE)
    return codes[0::2] << 4 | codes[1::2]


def unpack(packed: Tensor, count: int) -> Tensor:
    """The first `count` codes of `pack`, as uint8."""
    return rearrange([packed >> 4, packed & 15], "half n -> (n half)")[:count]


def check_block(block: int, name: str = "block") -> None:
    """Raises ValueError for a block size that bitsandbytes has no kernel for."""
    if block not in BLOCKS:
        raise ValueError(f"{name} is {block}; it must be one of {', '.join(map(str, BLOCKS))}.")


def quantize(weight: Tensor, block: int = 64) -> tuple[Tensor, Tensor]:
    """A weight of n entries -> packed codes (ceil(n/2),) uint8, absmax (ceil(n/block),) float32.

    Raises ValueError for a dtype other than float32, float16 and bfloat16, a block size that is not
    a power of two from 32 to 4096, and a weight with a NaN or an infinity.
    """
    check_block(block)
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"weight is {weight.dtype}; NF4 codes float32, float16 or bfloat16.")
    flat = weight.detach().reshape(-1)
    count = flat.numel()
    codes = torch.empty(-(-count // 2), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-count // block), dtype=torch.float32, device=flat.device)
    if flat.is_meta:  # no values, for which there is nothing to do
        return codes, absmax
    whole = count - count % block
    for start in range(0, whole, _PIECE):
        stop = min(start + _PIECE, whole)
        blocks = rearrange(flat[start:stop].float(), "(n block) -> n block", block=block)
        largest = blocks.abs().amax(1)
        scaled = blocks * (1.0 / largest.clamp(min=_TINY))[:, None]
        codes[start // 2 : stop // 2] = pack(
            nearest(rearrange(scaled, "n block -> (n block)"), TABLE)
        )
        absmax[start // block : stop // block] = largest
    if whole < count:  # bitsandbytes divides here, and a short block of zeros keeps the stand-in
        rest = flat[whole:].float()
        absmax[-1] = rest.abs().amax().clamp(min=_TINY)
        codes[whole // 2 :] = pack(nearest(rest / absmax[-1], TABLE))
    if not absmax.isfinite().all():
        raise ValueError("weight holds a NaN or an infinity; NF4 needs finite values.")
    return codes, absmax


def dequantize(
    codes: Tensor,
    absmax: Tensor,
    shape: tuple[int, ...],
    *,
    block: int = 64,
    dtype: torch.dtype = torch.float32,
    table: Tensor = TABLE,
) -> Tensor:
    """Restores a weight of `shape` from the codes of `quantize`: a float32 product, then `dtype`.

    Float32 is made in the memory of the result alone; other dtypes in pieces of 2^19 entries, so
    that nothing of the weight's size is ever held but the result.
    """
    count = math.prod(shape)
    if codes.is_meta:
        return torch.empty(shape, dtype=dtype, device="meta")
    table = table.to(codes.device)
    pairs = torch.cartesian_prod(table, table)  # 256 2: both values of a byte
    if torch.compiler.is_compiling():  # one fused kernel, which needs no memory but the result's
        scales = absmax.repeat_interleave(block)[:count]
        return (pairs[codes.int()].flatten()[:count] * scales).to(dtype).view(shape)
    words = pairs.view(torch.int64).view(1, -1)  # 1 256: two float32 are one word of 8 bytes
    padded = absmax.numel() * block
    out = torch.empty(padded, dtype=dtype, device=codes.device)
    in_place = dtype == torch.float32
    step = padded if in_place else _PIECE
    scratch = out if in_place else out.new_empty(min(step, padded), dtype=torch.float32)
    for start in range(0, padded, step):
        stop = min(start + step, padded)
        values = scratch[: stop - start].view(-1, block)
        looked_up = values.view(torch.int64)  # blocks block/2: codes, then what they stand for
        piece = codes[start // 2 : stop // 2]
        looked_up.view(-1)[: len(piece)].copy_(piece)
        looked_up.view(-1)[len(piece) :].zero_()  # what is beyond the last code is cut off
        torch.gather(words.expand(len(values), -1), 1, looked_up, out=looked_up)
        values.mul_(absmax[start // block : stop // block, None])
        if not in_place:
            out[start:stop] = values.view(-1)
    return out[:count].view(shape)


def quantize_dynamic(values: Tensor, block: int = 256) -> tuple[Tensor, Tensor]:
    """Signed float32 values (b,) -> 8-bit codes (b,) uint8, their absmax (ceil(b/block),) float32.

    A value over its absmax is moved to the nearest of 65,536 points in [-1, 1] before the nearest
    entry of the map is taken, as bitsandbytes does on the CPU. Its CUDA kernel takes the nearest
    entry at once, and so differs in about one code of a thousand, by one step.
    """
    check_block(block, "nested_block")
    padded = torch.nn.functional.pad(values, (0, -len(values) % block))
    blocks = rearrange(padded, "(n block) -> n block", block=block)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax)[:, None]).nan_to_num(nan=-1.0)  # a block of zeros is code 0
    points = ((scaled.clamp(-1.0, 1.0) + 1.0) * 32767.5 + 0.5).floor()
    return nearest(points.view(-1)[: len(values)] / 32767.5 - 1.0, DYNAMIC_TABLE), absmax


def quantize_absmax(absmax: Tensor, block: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Scales (b,) -> 8-bit codes (b,) uint8, their absmax (ceil(b/block),), their mean (1,)."""
    offset = absmax.mean().view(1)
    return *quantize_dynamic(absmax - offset, block), offset


def dequantize_absmax(
    codes: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    *,
    block: int = 256,
    table: Tensor = DYNAMIC_TABLE,
) -> Tensor:
    """The scales (b,) in float32 that `quantize_absmax` coded, rounded once in each operation."""
    values = table.to(codes.device).index_select(0, codes.int())
    return values.mul_(nested_absmax.repeat_interleave(block)[: len(codes)]).add_(offset)
