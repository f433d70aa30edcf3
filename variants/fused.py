"""The one fast path: y = g * (x W^T + s (x~ A^T) B^T) + bias, forward and backward by hand.

Against the same formula left to autograd it writes the low-rank term into the base product's own
output (`addmm_`), holds x once and nothing of size (o, i), and regenerates the dropout mask in the
backward pass instead of keeping it. x~ is x with dropout; the base product sees x itself.

Gradients, with z = x W^T + s h^T B^T, h = A x~^T, dz = g * dy and dh = s B^T dz^T:

    dx = dz W + dropout(dh^T A)   dA = dh x~        dB = s (h dz)^T
    dg = sum_n dy * z             dbias = sum_n dy

h and dh lie as (k, n): with the short axis last, the same products take two to eight times as long
on a CPU.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from variants.base import WeightStore

_DRAWS_PER_WORD = 4  # 16-bit draws in one 64-bit word


def dropout_keep(
    shape: torch.Size,
    p: float,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    part: tuple[int, int] = (0, 1),
) -> Tensor:
    """A mask of ones, and zeros with probability p (to 2^-16), a function of `seed`.

    Consumes nothing from the global generator, so two variants of one seed see the same base
    dropout, and recomputation sees the same mask again. `part` (index, parts): it is the index-th
    of so many equal parts of a larger mask, whose rows the processes of a run share.
    """
    skip, offset = divmod(part[0] * shape.numel(), _DRAWS_PER_WORD)
    count = max(1, -(-(offset + shape.numel()) // _DRAWS_PER_WORD))  # no words, nothing to split
    if device.type == "cpu":  # a third of the time of torch's own generator
        generator = np.random.SFC64(seed)
        generator.random_raw(skip, output=False)
        words = torch.from_numpy(generator.random_raw(count))
    else:  # where a word lies in its stream depends on how many are drawn, so all are
        total = max(1, -(-part[1] * shape.numel() // _DRAWS_PER_WORD))
        words = torch.empty(total, dtype=torch.int64, device=device)
        words.random_(-(2**63), None, generator=torch.Generator(device).manual_seed(seed))
        words = words[skip : skip + count]
    draws = words.view(torch.int16)[offset : offset + shape.numel()].view(shape)
    # Not a boolean: to multiply by one takes longer than to draw it.
    return draws.float().ge_(round(p * 2**16) - 2**15).to(dtype)


class _GainedLowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, B, A, gain, store, scale, dropout, mask, dtype, out_dtype):
        W = store.dequantize(dtype)
        dropped = x
        if dropout > 0.0:  # 1 / (1 - p) goes into the scale
            dropped = x * dropout_keep(x.shape, dropout, mask[0], x.device, dtype, mask[1])
            scale = scale / (1.0 - dropout)
        h = A.to(dtype) @ dropped.T  # k n
        plain = bias is None or gain is not None
        z = x @ W.T if plain else torch.addmm(bias.to(dtype), x, W.T)  # n o
        z.addmm_(h.T, B.to(dtype).T, alpha=scale)
        y = z
        if gain is not None:
            y = (z * gain).to(out_dtype)  # not in bfloat16, where 1.002 z rounds back to z
            if bias is not None:
                y += bias.to(out_dtype)
        ctx.save_for_backward(
            x if ctx.needs_input_grad[3] else None,
            h if ctx.needs_input_grad[2] else None,
            z if gain is not None else None,
            bias,
            B,
            A,
            gain,
        )
        ctx.store, ctx.scale, ctx.shape, ctx.dtype = store, scale, x.shape, dtype
        ctx.dropout, ctx.mask = dropout, mask
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, h, z, bias, B, A, gain = ctx.saved_tensors
        needs_x, needs_bias, needs_B, needs_A, needs_gain = ctx.needs_input_grad[:5]
        dtype, scale = ctx.dtype, ctx.scale
        d_bias = dy.sum(0, dtype=bias.dtype) if needs_bias else None
        d_gain = torch.sum(dy.to(gain.dtype) * z, 0) if needs_gain else None
        dz = dy if gain is None else (dy * gain).to(dtype)
        dh = (B.to(dtype).T @ dz.T).mul_(scale)  # k n
        keep = None
        if ctx.dropout > 0.0 and (needs_x or needs_A):
            seed, part = ctx.mask
            keep = dropout_keep(ctx.shape, ctx.dropout, seed, dy.device, dtype, part)
        d_A = d_B = d_x = None
        if needs_A:
            d_A = (dh @ (x if keep is None else x * keep)).to(A.dtype)
        if needs_B:
            d_B = (h @ dz).mul_(scale).T.to(B.dtype)
        if needs_x:
            d_x = dz @ ctx.store.dequantize(dtype)
            if keep is None:
                d_x.addmm_(dh.T, A.to(dtype))
            else:
                d_x.addcmul_(dh.T @ A.to(dtype), keep)
        return d_x, d_bias, d_B, d_A, d_gain, None, None, None, None, None, None


def gained_low_rank_linear(
    x: Tensor,
    store: "WeightStore",
    bias: Tensor | None,
    B: Tensor,
    A: Tensor,
    *,
    scale: float,
    gain: Tensor | None = None,
    dropout: float = 0.0,
    mask_seed: int | None = None,
    part: tuple[int, int] = (0, 1),
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """x (..., i) -> g * (x W^T + s (x~ A^T) B^T) + bias (..., o), in x's dtype.

    Args:
        B, A: (o, k) and (k, i), k >= 0; gain (o,) or None for ones; bias (o,) or None.
        dropout: 0 to switch it off; else `mask_seed` and `part` decide the mask.
        compute_dtype: dtype of the products; None for x's.

    Differentiable once in x, bias, B, A and gain. Under torch.compile the plain formula is
    traced instead, and its dropout then draws from the global generator.
    """
    dtype = compute_dtype or x.dtype
    if torch.compiler.is_compiling():
        rows = x.to(dtype)
        low_rank = F.linear(F.linear(F.dropout(rows, dropout), A.to(dtype)), B.to(dtype))
        y = F.linear(rows, store.dequantize(dtype)) + scale * low_rank
        y = y if gain is None else (y * gain).to(x.dtype)
        return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    y = _GainedLowRankLinear.apply(
        rows, bias, B, A, gain, store, scale, dropout, (mask_seed, part), dtype, x.dtype
    )
    return y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype)
