"""The peak of memory while a model without values goes through its forward and backward pass.

On the device `meta` a tensor has a shape, a dtype and a storage of so many bytes, but no values.
The operators of torch, autograd and the adapters' own backward pass run on it as they would on
values; what is allocated, kept for the backward pass and let go again is the same, in the same
order. `LiveBytes` counts it.

Three things cannot be left to that. Attention: without a device torch would take the plain formula,
which keeps the scores (b, heads, t, t); what runs is a fused kernel, and `_FusedAttention` holds
what that holds: q, k, v, the output, the log-sum-exp of each row of scores, and the mask as
numbers. (With dropout a CPU has no fused kernel, and the plain formula is right.) The product of
the experts of a mixture, each with the rows that are its own: on `meta` torch has it in bfloat16
alone, and nobody knows how many rows each has, so that all are given as many. Questions about
values, such as "is any row padded?": the answer is yes to "is all of it so?", for which reason
nothing is padded, packed or infinite unless a mask is given.

Shapes: b rows, t tokens, d size of a head; s rows of all experts, e experts.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from variants.reading import ReadWeight


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is entered and not yet let go.

    Args:
        known: tensors that were there before; they and their views count nothing.
        at_peak: called whenever `peak` has risen.
    """

    def __init__(self, known: Iterable[Tensor], at_peak: Callable[[], None] = lambda: None):
        super().__init__()
        self.now = self.peak = 0
        self._at_peak = at_peak
        self._known = [tensor.untyped_storage() for tensor in known]
        self._seen = {storage._cdata for storage in self._known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return args[0].dtype == torch.bool or 0
        if func is torch.ops.aten.unique_consecutive.default and args[0].is_meta:
            result: Any = (args[0].new_empty(1), *(args[0].new_empty(0, dtype=torch.long),) * 2)
        elif func is torch.ops.aten.index.Tensor and args[0].is_meta:
            result = func(args[0], _chosen(args[1]))
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        self.now += storage.nbytes()
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        if self.now > self.peak:
            self.peak = self.now
            self._at_peak()

    def _free(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.now -= nbytes


def _chosen(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Indices by position; a mask is true everywhere."""
    positions: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            each = torch.empty(index.numel(), dtype=torch.long, device=index.device)
            positions += [each] * index.ndim
        else:
            positions.append(index)
    return positions


@contextmanager
def fused_kernels(*, dropout: bool) -> Iterator[None]:
    """Put fused kernels' memory in the place of scaled_dot_product_attention and grouped_mm, on
    `meta` alone.

    A mode of torch functions would not do: it is off inside backward(), where checkpointed layers
    run again.

    Args:
        dropout: whether the attention kernel of the device in question has dropout.
    """
    plain: Any = F.scaled_dot_product_attention
    plain_grouped: Any = F.grouped_mm

    def fused(query, key, value, attn_mask=None, dropout_p=0.0, **options):
        if not query.is_meta or (dropout_p > 0.0 and not dropout):
            return plain(query, key, value, attn_mask, dropout_p, **options)
        return _FusedAttention.apply(query, key, value, attn_mask)

    def grouped(rows, weights, **options):
        if not rows.is_meta:
            return plain_grouped(rows, weights, **options)
        if not isinstance(weights, ReadWeight):
            return _GroupedProduct.apply(rows, weights)
        alike = zip(weights.layers, rows.tensor_split(len(weights.layers)), strict=True)
        return torch.cat([layer(some) for layer, some in alike])

    F.scaled_dot_product_attention = fused  # type: ignore[assignment]
    F.grouped_mm = grouped  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain
        F.grouped_mm = plain_grouped


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weights):  # s i, e i o
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weights)
        return rows.new_empty(len(rows), weights.shape[-1])

    @staticmethod
    def backward(ctx, grad):
        _, weights = ctx.saved_tensors
        of_rows = grad.new_empty(len(grad), weights.shape[1]) if ctx.needs_input_grad[0] else None
        return of_rows, torch.empty_like(weights) if ctx.needs_input_grad[1] else None


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask):
        b, h, t, _ = query.shape
        laid = query.new_empty(b, t, h, value.shape[-1])  # as the kernels lay it
        out = rearrange(laid, "b t h d -> b h t d")
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)  # b h t
        numbers = None if mask is None else mask.to(query.dtype)
        ctx.save_for_backward(query, key, value, numbers, out, log_sums)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
