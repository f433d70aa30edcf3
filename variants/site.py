"""A module that holds a matrix, and how it keeps it.

nn.Linear keeps W (o, i). transformers' Conv1D, of GPT-2 and its kin, computes the same x W^T + b
and keeps W^T (i, o).
"""

import copy

from torch import Tensor, nn


def keeps_transposed(module: nn.Module) -> bool:
    """True of a Conv1D, filled or not, which is known by its name: transformers is not imported
    here. Others of that name keep kernels of three axes."""
    axes = getattr(getattr(module, "weight", None), "ndim", 2)
    return type(module).__name__ == "Conv1D" and axes == 2


def holds_matrix(module: nn.Module) -> bool:
    """True of the modules that compute x W^T + b of a matrix of their own."""
    return isinstance(module, nn.Linear) or keeps_transposed(module)


def matrix(module: nn.Module) -> Tensor:
    """W (o, i), a view of the module's weight."""
    weight = module.get_parameter("weight")
    return weight.mT if keeps_transposed(module) else weight


def shell(module: nn.Module) -> nn.Module:
    """The module without its parameters, for `filled`."""
    empty = copy.copy(module)
    empty.__dict__["_parameters"] = dict.fromkeys(module._parameters)
    return empty


def filled(empty: nn.Module, W: Tensor, bias: Tensor | None) -> nn.Module:
    """A module as it was before `shell`, with another W (o, i) and bias (o,)."""
    module = shell(empty)
    module.weight = nn.Parameter(W.mT.contiguous() if keeps_transposed(empty) else W)
    if bias is not None:
        module.bias = nn.Parameter(bias)
    return module
