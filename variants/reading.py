"""W' for a model's code that reads a weight instead of calling a layer.

Some read it for its dtype or device (T5's feed-forward, Mamba), some multiply with it themselves:
experts, routers, convolutions, embeddings, nn.MultiheadAttention, Mamba's dt_proj. All get the
right answer here. Shape, dtype and device cost nothing; a product of the input with the weight, the
look-up of its rows, and the product of a mixture's grouped tokens with their experts call the
layers, so that no dense W' is formed; any other operation computes W' from the definition, so that
gradients reach what is trained.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

# Questions that the outside of a weight answers.
_OUTSIDE = {
    *(getattr(torch.Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "layout",
      "is_cuda", "is_meta", "is_quantized", "requires_grad")),
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.element_size,
    torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.__len__,
}  # fmt: skip


_DATA = getattr(torch.Tensor, "data").__get__  # noqa: B009 (torch's stub calls it a tensor)


class ReadWeight(torch.Tensor):
    """The adapted weight of a layer in the base's dtype, computed when it is used; or those of the
    layers of a stack, (n, o, i).

    An operation on it raises ValueError where the answer would not be the layer's: a write, which
    would be lost, and training with dropout where W' is computed, since dropout acts on the layer's
    input alone.

    Args:
        layers: AdapterLinear, which imports this; one, or with `stacked` several of one shape.
        transposed: (..., i, o) instead of (..., o, i).
        kernel: the shape (o, ...) in which a convolution keeps W (o, i).
    """

    layers: Sequence[Any]
    stacked: bool
    transposed: bool
    kernel: torch.Size | None

    @staticmethod
    def __new__(
        cls,
        layers: Sequence[Any],
        *,
        stacked: bool = False,
        transposed: bool = False,
        kernel: torch.Size | None = None,
    ) -> "ReadWeight":
        first = layers[0]
        shape = (first.out_features, first.in_features)
        if transposed:
            shape = shape[::-1]
        weight: ReadWeight = torch.Tensor._make_wrapper_subclass(
            cls,
            kernel or ((len(layers), *shape) if stacked else shape),
            dtype=first.dtype,
            device=next(first.parameters()).device,
        )
        weight.layers, weight.stacked = layers, stacked
        weight.transposed, weight.kernel = transposed, kernel
        return weight

    def dense(self) -> Tensor:
        """W' (o, i), or as it is kept, differentiable in what is trained."""
        found = [_definition(layer) for layer in self.layers]
        weight = torch.stack(found) if self.stacked else found[0]
        weight = weight.mT if self.transposed else weight
        return weight if self.kernel is None else weight.view(self.kernel)

    def flipped(self) -> "ReadWeight":
        """With the last two axes exchanged."""
        return ReadWeight(self.layers, stacked=self.stacked, transposed=not self.transposed)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _OUTSIDE:
                return func(*args, **kwargs)
        if func == _DATA:  # each look at it is another object
            return args[0]  # or a write to it would be lost
        if (fast := _FAST.get(_name(func))) is not None:
            found = fast(*args, **kwargs)
            if found is not None:
                return found
        name, first = getattr(func, "__name__", ""), [*args, *kwargs.values()][0]
        if isinstance(first, cls) and (
            name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
        ):
            raise ValueError(
                f"this model's code writes the weight of {first.layers[0].path} in place, which an "
                "adapter over a frozen weight does not allow; leave that layer out of targets."
            )
        args, kwargs = _dense((args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks the classmethod
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = _dense((args, kwargs or {}))  # from code below Python's functions
        return func(*args, **kwargs)


def _definition(layer: Any) -> Tensor:
    if layer.mask() is not None:
        raise ValueError(
            f"dropout is {layer.dropout}, but this model's code reads the weight of "
            f"{layer.path} instead of calling the layer, so that its input would not be "
            "dropped; set dropout=0, or leave that layer out of targets."
        )
    merged = layer.merged_weight
    weight: Tensor = layer.definition(layer.base_weight()) if merged is None else merged
    return weight.to(layer.dtype)


def _dense(value: Any) -> Any:
    """The value with each ReadWeight in it, however nested, computed."""
    return tree_map_only(ReadWeight, lambda weight: weight.dense(), value)


# ---- operations that call the layers, None where they cannot -------------------------------------


def _name(func: Any) -> str:
    """The name of a function, or of the property that it gives."""
    name = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else name


def _one(weight: Any, *, transposed: bool) -> Any:
    """The layer of a single weight that is kept so, unless it adds a bias of its own."""
    if not isinstance(weight, ReadWeight) or weight.stacked or weight.kernel is not None:
        return None
    layer = weight.layers[0]
    return layer if weight.transposed is transposed and layer.bias is None else None


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    if isinstance(input, ReadWeight) or (layer := _one(weight, transposed=False)) is None:
        return None
    y: Tensor = layer(input)
    return y if bias is None else y + bias


def _matmul(input: Any, other: Any = None, **rest: Any) -> Tensor | None:
    if rest or isinstance(input, ReadWeight):
        return None
    if (layer := _one(other, transposed=True)) is not None:
        y: Tensor = layer(input)
        return y
    each = other.stacked and other.transposed and input.ndim == 3
    if not each or len(input) != len(other.layers):
        return None
    return torch.stack([layer(x) for layer, x in zip(other.layers, input, strict=True)])


def _grouped(input: Any, weight: Any, offs: Tensor | None = None, **rest: Any) -> Tensor | None:
    """Rows of x (n, i) up to offs[0] pass through the first expert, up to offs[1] through the
    second, and so on; those that are left over give zeros."""
    fits = isinstance(weight, ReadWeight) and weight.stacked and weight.transposed
    if not fits or offs is None or any(value is not None for value in rest.values()):
        return None
    ends = offs.tolist()
    pieces = [
        layer(input[start:end])
        for layer, start, end in zip(weight.layers, [0, *ends[:-1]], ends, strict=True)
        if end > start
    ]
    left = input.new_zeros(len(input) - ends[-1], weight.shape[-1])
    return torch.cat([*pieces, left]) if len(left) or not pieces else torch.cat(pieces)


def _embedding(
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    layer = _one(weight, transposed=True)
    if layer is None or max_norm is not None or scale_grad_by_freq or sparse:
        return None
    rows: Tensor = layer.looked_up(input, padding_idx)
    return rows


def _picked(weight: ReadWeight, index: Any) -> ReadWeight | None:
    number = isinstance(index, int) or (
        isinstance(index, Tensor) and index.ndim == 0 and not index.is_floating_point()
    )
    if not (weight.stacked and number and not isinstance(index, bool)):
        return None
    return ReadWeight([weight.layers[int(index)]], transposed=weight.transposed)


def _exchanged(weight: ReadWeight, dim0: int = 0, dim1: int = 1) -> ReadWeight | None:
    last = {weight.ndim - 2, weight.ndim - 1}
    if weight.kernel is None and {dim0 % weight.ndim, dim1 % weight.ndim} == last:
        return weight.flipped()
    return None


def _viewed(weight: ReadWeight, *shape: Any, **named: Any) -> ReadWeight | None:
    wanted = shape[0] if shape and isinstance(shape[0], tuple | list) else shape
    if named:
        return None
    same = len(wanted) == weight.ndim and all(
        a in (-1, b) for a, b in zip(wanted, weight.shape, strict=True)
    )
    return weight if same else None


_FAST: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "__matmul__", "bmm"), _matmul),
    **dict.fromkeys(("_grouped_mm", "grouped_mm_fallback"), _grouped),
    "embedding": _embedding,
    "__getitem__": _picked,
    "transpose": _exchanged,
    "mT": lambda weight: _exchanged(weight, -2, -1),
    **dict.fromkeys(("T", "t"), _exchanged),  # of three axes, T reverses all
    **dict.fromkeys(("view", "reshape"), _viewed),
}
