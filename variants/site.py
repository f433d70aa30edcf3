"""The places of a model that hold a matrix W (o, i), and how each keeps and uses it.

Most are modules that compute x W^T + b: nn.Linear, and transformers' Conv1D of GPT-2 and its kin,
which keeps W^T (i, o). An adapted layer takes such a module's place. Other modules read a parameter
in code of their own, and keep it: the stacked experts of a mixture, (n, o, i) or (n, i, o), of
which every expert is a matrix and a layer of its own; nn.MultiheadAttention's projections;
embeddings (i, o), whose input are indices; the kernels (o, i, ...) of convolutions; routers. Their
attribute gives `variants.reading`'s stand-in for W', as a parametrization of torch would.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from variants.reading import ReadWeight

Kind = Literal["linear", "expert", "attention", "embedding", "kernel", "other"]

_READ_ELSEWHERE = (nn.RNNBase, nn.ParameterList)  # whose parameters no attribute gives
# Experts without `is_transposed` that keep W^T, by class and parameter.
_TRANSPOSED = {"Llama4TextExperts": ("gate_up_proj", "down_proj"), "DbrxExpertGLU": ("w2",)}


@dataclass(frozen=True)
class Site:
    """One matrix W (o, i) of a model.

    Args:
        path: where its layer stands in the adapted model: a module's path, `parameter` where the
            module stays, and with the expert's number for the module's experts.
        parameter: the name of the parameter that holds it, in the unwrapped model.
        kind: `linear` where the layer takes the module's place.
        shape: of the parameter.
        transposed: whether it is kept as (i, o).
        expert: its place in a stack, None if it is a parameter of its own.
        experts: how many there are in the stack.
        shell: the module without its parameters, of a Conv1D.
    """

    path: str
    parameter: str
    kind: Kind
    shape: torch.Size
    transposed: bool = False
    expert: int | None = None
    experts: int = 1
    shell: nn.Module | None = field(default=None, repr=False)

    @property
    def owner(self) -> str:
        """The path of the module that keeps the parameter."""
        return self.parameter.rpartition(".")[0]

    @property
    def name(self) -> str:
        """The parameter's name in its module."""
        return self.parameter.rpartition(".")[2]

    @property
    def bias(self) -> str:
        """The name that the parameter with its bias has in the unwrapped model, if there is one; of
        a stack, that of all."""
        if self.kind == "attention":
            return f"{self.owner}.in_proj_bias".removeprefix(".")
        stem = self.parameter.removesuffix("weight")
        return f"{stem}bias" if stem != self.parameter else f"{stem}_bias"

    @property
    def inner(self) -> bool:
        """True of the network's inner maps, all of which `all-linear` means."""
        return self.kind in ("linear", "expert", "attention")

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(o, i), from the shape of the parameter alone."""
        o, i = self.matrix(torch.empty(self.shape, device="meta")).shape
        return o, i

    def of_expert(self, number: int) -> "Site":
        """The site of another expert of the same stack."""
        path = f"{self.owner}.{number}.{self.name}".removeprefix(".")
        return replace(self, path=path, expert=number)

    def matrix(self, kept: Tensor) -> Tensor:
        """W (o, i), a view of the parameter."""
        if self.expert is not None:
            kept = kept.view(self.experts, -1, self.shape[-1])[self.expert]
        kept = kept.flatten(1)
        return kept.mT if self.transposed else kept

    def kept(self, W: Tensor) -> Tensor:
        """W (o, i) as the parameter keeps it; of an expert, its part."""
        W = W.mT if self.transposed else W
        return W.reshape(self.shape) if self.kind == "kernel" else W.contiguous()


def keeps_transposed(module: nn.Module) -> bool:
    """True of a Conv1D, filled or not, which is known by its name: transformers is not imported
    here. Others of that name keep kernels of three axes."""
    axes = getattr(getattr(module, "weight", None), "ndim", 2)
    return type(module).__name__ == "Conv1D" and axes == 2


def is_bias(name: str) -> bool:
    """True of the name that a parameter has in its module, if it is added to a product."""
    return name == "bias" or name.endswith("_bias")


def holds_matrix(module: nn.Module) -> bool:
    """True of the modules that compute x W^T + b of a matrix of their own."""
    return isinstance(module, nn.Linear) or keeps_transposed(module)


def matrix(module: nn.Module) -> Tensor:
    """W (o, i), a view of the module's weight."""
    weight = module.get_parameter("weight")
    return weight.mT if keeps_transposed(module) else weight


@torch.no_grad()
def computes_linear(module: nn.Module) -> bool:
    """True if the module is x W^T + b, and W a parameter of its own: routers and grouped layers
    are subclasses of nn.Linear too, and a weight may be computed anew for each call."""
    if "weight" not in module._parameters:
        return False
    if type(module).forward is nn.Linear.forward or hasattr(module, "read"):
        return True
    weight = matrix(module)
    x = torch.arange(2 * weight.shape[1], device=weight.device).sin()
    x = rearrange(x, "(n i) -> 1 n i", n=2)
    x = torch.cat([x, 100 * x]).to(weight.dtype)  # what is nearly linear near 0 is not far off
    try:
        y = module(x)
    except Exception:  # it wants another input
        return False
    expected = F.linear(x, weight, getattr(module, "bias", None))
    if not isinstance(y, torch.Tensor) or y.shape != expected.shape or y.is_meta:
        return isinstance(y, torch.Tensor) and y.shape == expected.shape
    largest = float(expected.abs().max())
    return torch.allclose(y.float(), expected.float(), rtol=1e-2, atol=1e-2 * largest)


def sites(model: nn.Module) -> dict[str, Site]:
    """Every place of the model that can be adapted, by path, in the model's order."""
    found = (
        site
        for path, module in model.named_modules()
        if not isinstance(module, _READ_ELSEWHERE)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim > 1
        for site in _of_parameter(path, module, name, parameter)
    )
    return {site.path: site for site in found}


def _of_parameter(path: str, module: nn.Module, name: str, kept: Tensor) -> Iterator[Site]:
    full, shape = f"{path}.{name}".removeprefix("."), kept.shape
    linear = holds_matrix(module) and name == "weight"
    if linear and (
        not kept.is_floating_point() or computes_linear(module)
    ):  # `choose` refuses codes
        empty = shell(module) if keeps_transposed(module) else None
        yield Site(path, full, "linear", shape, empty is not None, shell=empty)
    elif not kept.is_floating_point():
        return
    elif count := _experts(module, kept):
        transposed = getattr(module, "is_transposed", None)
        if transposed is None:
            transposed = name in _TRANSPOSED.get(type(module).__name__, ())
        for n in range(count):
            inside = f"{path}.{n}.{name}".removeprefix(".")
            yield Site(inside, full, "expert", shape, transposed, expert=n, experts=count)
    elif isinstance(module, nn.Embedding):
        yield Site(full, full, "embedding", shape, transposed=True)
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        yield Site(full, full, "kernel", shape)
    elif kept.ndim == 2:
        attention = isinstance(module, nn.MultiheadAttention)
        yield Site(full, full, "attention" if attention else "other", shape)


def _experts(module: nn.Module, kept: Tensor) -> int:
    """The number of matrices that a mixture's parameter stacks, 0 if it stacks none: on a leading
    axis, or as DBRX does one below the other."""
    count = getattr(module, "num_experts", None)
    if type(count) is int and kept.ndim == 3 and len(kept) == count:
        return count
    count = getattr(module, "moe_num_experts", None)
    return count if type(count) is int and kept.ndim == 2 and len(kept) % count == 0 else 0


# ---- the layer at its place ----------------------------------------------------------------------


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


class Expert(nn.Module):
    """The adapted layers of one expert of a stack, under their parameters' names."""


def put(model: nn.Module, found: Sequence[Site], layers: Mapping[str, Any]) -> None:
    """Give the layers of one parameter to the module that reads it, as its children, and a stand-in
    for W' the parameter's place.

    Args:
        found: the sites of that parameter, of a stack all.
        layers: an AdapterLinear for each of them, by path.
    """
    first = found[0]
    module, name = model.get_submodule(first.owner), first.name
    stacked, transposed = first.expert is not None, first.transposed
    del module._parameters[name]
    for site in found:
        layer = layers[site.path].train(module.training)
        holder: Any = module
        if stacked:
            holder = module._modules.setdefault(str(site.expert), Expert())
        holder._modules[name] = layer

    def read(self: Any) -> Tensor:
        if not stacked:
            weight: Tensor = self._modules[name].weight
            return weight
        own = [self._modules[str(site.expert)]._modules[name] for site in found]
        if torch.compiler.is_compiling():
            return torch.stack([layer.weight for layer in own])
        return ReadWeight(own, stacked=True, transposed=transposed)

    # A class of the instance's own, as torch.nn.utils.parametrize makes one.
    kind = type(module)
    module.__class__ = type(
        kind.__name__, (kind,), {name: property(read), "__module__": kind.__module__}
    )


def give_back(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Undo every `put`, by name, with other tensors for the parameters."""
    owners: dict[str, dict[str, Tensor]] = {}
    for full, tensor in parameters.items():
        owner, _, name = full.rpartition(".")
        owners.setdefault(owner, {})[name] = tensor
    for owner, named in owners.items():
        module = model.get_submodule(owner)
        for name, holder in list(module._modules.items()):
            if name in named or isinstance(holder, Expert):
                del module._modules[name]
        for _ in named:
            module.__class__ = type(module).__mro__[1]
        for name, tensor in named.items():
            module.register_parameter(name, nn.Parameter(tensor))
