"""The one fast path: y = g * (x W^T + s (x~ A^T) B^T) + bias, forward and backward by hand.

Against the same formula left to autograd it adds the base product to the low-rank term within the
product itself (`addmm_`), holds x once and nothing of size (o, i), and regenerates the dropout mask
in the backward pass instead of keeping it. x~ is x with dropout; the base product sees x itself.

Gradients, with z = x W^T + s h^T B^T, h = A x~^T, dz = g * dy and dh = s B^T dz^T:

    dx = dz W + dropout(dh^T A)   dA = dh x~        dB = s (h dz)^T
    dg = sum_n dy * z             dbias = sum_n dy

h and dh lie as (k, n): with the short axis last, the same products take two to eight times as long
on a CPU. Their rows are in c blocks, one for each thread, as (c, k, n / c): a BLAS leaves a product
with so short an axis to one thread, and a batch of c of them it shares out.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.dropout import Mask

if TYPE_CHECKING:
    from variants.store import WeightStore


class _GainedLowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, B, A, gain, store, scale, dropout, mask, dtype, out_dtype):
        shape = x.shape[:-1]
        x = rearrange(x, "... i -> (...) i")
        W = store.dequantize(dtype)
        dropped = x
        if dropout > 0.0:  # 1 / (1 - p) goes into the scale
            dropped = x * mask(x.shape, x.device, dtype)
            scale = scale / (1.0 - dropout)
        c = _blocks(x)
        h = A.to(dtype).expand(c, -1, -1) @ _split(dropped, c).mT  # c k n
        # z is written through views and is none itself: whoever gets a view from here cannot write
        # it in place, as a ReLU(inplace=True) does.
        z = x.new_empty(*shape, len(W))  # ... o
        rows = _split(z.view(-1, len(W)), c)
        if start_from_bias := bias is not None and gain is None:
            rows.copy_(bias)
        rows.baddbmm_(h.mT, B.to(dtype).T.expand(c, -1, -1), beta=start_from_bias, alpha=scale)
        z.view(-1, len(W)).addmm_(x, W.T)
        y = z
        if gain is not None:  # in float32: in bfloat16 1.002 z rounds back to z
            y = z * gain if bias is None else torch.addcmul(bias, z, gain)
            y = y.to(out_dtype)
        ctx.save_for_backward(
            x if ctx.needs_input_grad[3] else None,
            h if ctx.needs_input_grad[2] else None,
            z if gain is not None else None,
            bias,
            B,
            A,
            gain,
        )
        ctx.store, ctx.scale, ctx.dtype, ctx.dropout, ctx.mask = store, scale, dtype, dropout, mask
        ctx.shape, ctx.rows_shape = (*shape, x.shape[1]), x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, h, z, bias, B, A, gain = ctx.saved_tensors
        needs_x, needs_bias, needs_B, needs_A, needs_gain = ctx.needs_input_grad[:5]
        dtype, scale = ctx.dtype, ctx.scale
        dy = rearrange(dy, "... o -> (...) o")
        z = None if z is None else z.view(dy.shape)
        d_bias = dy.sum(0, dtype=bias.dtype) if needs_bias else None
        d_gain = torch.sum(dy.to(gain.dtype) * z, 0) if needs_gain else None
        dz = dy if gain is None else (dy * gain).to(dtype)
        c = _blocks(dz)
        dh = (B.to(dtype).T.expand(c, -1, -1) @ _split(dz, c).mT).mul_(scale)  # c k n
        keep = None
        if ctx.dropout > 0.0 and (needs_x or needs_A):
            keep = ctx.mask(ctx.rows_shape, dy.device, dtype)
        d_A = d_B = d_x = None
        if needs_x:  # first: the other gradients are not held together with a dense W
            W = ctx.store.dequantize(dtype)
            d_x = (dh.mT @ A.to(dtype).expand(c, -1, -1)).view(ctx.rows_shape)
            d_x = (d_x if keep is None else d_x.mul_(keep)).addmm_(dz, W).view(ctx.shape)
            del W
        if needs_A:
            d_A = (dh @ _split(x if keep is None else x * keep, c)).sum(0).to(A.dtype)
        if needs_B:
            d_B = (h @ _split(dz, c)).sum(0).mul_(scale).T.to(B.dtype)
        return d_x, d_bias, d_B, d_A, d_gain, None, None, None, None, None, None


def _blocks(rows: Tensor) -> int:
    """The number of equal blocks for the threads; 1 where a device shares out its work itself."""
    return math.gcd(len(rows), torch.get_num_threads()) if rows.device.type == "cpu" else 1


def _split(rows: Tensor, c: int) -> Tensor:
    """(n, d) -> (c, n / c, d), without a copy if the rows are contiguous."""
    return rows.reshape(c, len(rows) // c, rows.shape[1])


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
    mask: Mask | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """x (..., i) -> g * (x W^T + s (x~ A^T) B^T) + bias (..., o), in x's dtype.

    Args:
        B, A: (o, k) and (k, i), k >= 0; gain (o,) or None for ones; bias (o,) or None.
        dropout: 0 to switch it off; else `mask` gives its mask, twice the same.
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
    output: Tensor = _GainedLowRankLinear.apply(
        x.to(dtype), bias, B, A, gain, store, scale, dropout, mask, dtype, x.dtype
    )
    return output.to(x.dtype)


def frozen_linear(
    x: Tensor, store: "WeightStore", bias: Tensor | None, compute_dtype: torch.dtype | None = None
) -> Tensor:
    """x (..., i) -> x W^T + bias (..., o): the same product without factors."""
    o, i = store.shape
    B, A = (torch.zeros(shape, device=x.device) for shape in ((o, 0), (0, i)))
    return gained_low_rank_linear(x, store, bias, B, A, scale=1.0, compute_dtype=compute_dtype)
