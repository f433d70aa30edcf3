"""W' for a model's code that reads `layer.weight` instead of calling the layer.

Some read it for its dtype or device (T5's feed-forward, Mamba), some multiply with it themselves
(Mamba's dt_proj), and torch's TransformerEncoder does either. All get the right answer here: shape,
dtype and device cost nothing, and the first operation computes W' from the definition, so that
gradients reach what is trained.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

# Questions that the outside of a weight answers.
_OUTSIDE = {
    *(getattr(torch.Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "layout",
      "is_cuda", "is_meta", "is_quantized", "requires_grad")),
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.element_size,
    torch.Tensor.is_floating_point, torch.Tensor.is_complex,
}  # fmt: skip


_DATA = getattr(torch.Tensor, "data").__get__  # noqa: B009 (torch's stub calls it a tensor)


class ReadWeight(torch.Tensor):
    """The adapted weight (o, i) of `layer` in the base's dtype, computed when it is used.

    An operation on it raises ValueError where the answer would not be the layer's: a write, which
    would be lost, and training with dropout, which acts on the layer's input alone.
    """

    layer: Any  # an AdapterLinear, which imports this

    @staticmethod
    def __new__(cls, layer: Any) -> "ReadWeight":
        parameter = next(layer.parameters())
        weight: ReadWeight = torch.Tensor._make_wrapper_subclass(
            cls,
            (layer.out_features, layer.in_features),
            dtype=layer.dtype,
            device=parameter.device,
        )
        weight.layer = layer
        return weight

    def dense(self) -> Tensor:
        """W' (o, i), differentiable in what is trained."""
        layer = self.layer
        if layer.mask() is not None:
            raise ValueError(
                f"dropout is {layer.dropout}, but this model's code reads the weight of "
                f"{layer.path} instead of calling the layer, so that its input would not be "
                "dropped; set dropout=0, or leave that layer out of targets."
            )
        merged = layer.merged_weight
        weight = layer.definition(layer.base_weight()) if merged is None else merged
        return weight.to(layer.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _OUTSIDE:
                return func(*args, **(kwargs or {}))
        if func == _DATA:  # each look at it is another object
            return args[0]  # or a write to it would be lost
        name, first = getattr(func, "__name__", ""), [*args, *(kwargs or {}).values()][0]
        if isinstance(first, cls) and (
            name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
        ):
            raise ValueError(
                f"this model's code writes the weight of {first.layer.path} in place, which an "
                "adapter over a frozen weight does not allow; leave that layer out of targets."
            )
        args, kwargs = _dense((args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks the classmethod
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = _dense((args, kwargs or {}))  # from code below Python's functions
        return func(*args, **kwargs)


def _dense(value: Any) -> Any:
    """The value with each ReadWeight in it, however nested, computed."""
    return tree_map_only(ReadWeight, lambda weight: weight.dense(), value)
