"""The layers that a choice means: patterns over module paths, and those that can be adapted.

A choice that matches nothing is an error, entry by entry: a misspelt target must never train a
smaller adapter than was asked for.
"""

import difflib
import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from variants.site import holds_matrix, matrix


def matches(path: str, pattern: str) -> bool:
    """True if a module path is named by `pattern`.

    A pattern with *, ? or [ is a glob over the whole path; any other is a suffix at a dot, as in
    peft: "query" and "self.query" name encoder.layer.0.attention.self.query.
    """
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(path, pattern)
    return path == pattern or path.endswith("." + pattern)


def nearest(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for the known word nearest to `word`, or nothing."""
    close = difflib.get_close_matches(word, sorted(set(known)), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def layer_index(path: str) -> int | None:
    """The first number among the path's components: its depth in the stack, None outside it."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(found[1]) if found else None


def block_part(path: str) -> str | None:
    """The part of a transformer's block that a linear layer belongs to, by its path: attention or
    mlp. None outside the blocks, and in their state-space mixers."""
    parts = path.lower().split(".")
    if layer_index(path) is None:
        return None
    if any("att" in part for part in parts):
        return "attention"
    return None if {"mixer", "mamba"} & set(parts) else "mlp"


def is_inside(path: str, modules: Sequence[str]) -> bool:
    """True if `path` is one of `modules` or below one."""
    return any(path == module or path.startswith(module + ".") for module in modules)


def match_modules(modules: Mapping[str, nn.Module], patterns: Sequence[str]) -> list[str]:
    found: list[str] = []
    for pattern in patterns:
        paths = [path for path in modules if matches(path, pattern)]
        if not paths:
            raise ValueError(f"no module is named {pattern!r}.{nearest(pattern, names(modules))}")
        found += [path for path in paths if path not in found]
    return found


def names(paths: Iterable[str]) -> set[str]:
    """The names that a user may have meant: whole paths, and their last components but numbers."""
    paths = list(paths)
    return {*paths, *(path.rpartition(".")[2] for path in paths)} - set(map(str, range(1000)))


def choose(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    targets: str | Sequence[str],
    layers: str | Sequence[int],
    trained: Sequence[str],
    passed: Collection[str] | None = None,
) -> list[str]:
    """Paths of the layers that `inject`'s targets and layers choose. Raises ValueError as it does.

    Args:
        trained: paths of modules that are trained as they are.
        passed: paths of the linear layers that the task goes through; None for all.
    """
    embeddings = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    output = getattr(model, "get_output_embeddings", lambda: None)()

    def reason_against(path: str) -> str | None:
        module = modules[path]
        parent = modules.get(path.rpartition(".")[0], model)
        if not holds_matrix(module):
            kind = type(module).__name__
            return f"is a {kind}; only linear layers can be adapted, so name those in it"
        if not matrix(module).is_floating_point():
            return (
                f"is a quantised {type(module).__name__}; load the base unquantised and let the "
                "variant's store quantise it"
            )
        if isinstance(parent, nn.MultiheadAttention):
            return (
                "belongs to nn.MultiheadAttention, which reads the weight and never calls the "
                "layer; use an attention made of nn.Linear layers"
            )
        if id(module.get_parameter("weight")) in embeddings:
            return "shares its weight with an embedding"
        if is_inside(path, trained):
            return "is trained as it is (train_modules or the head)"
        if passed is not None and path not in passed:
            return "takes no part in what this model makes of a text, so it would never learn"
        if not computes_linear(module):
            return (
                f"is a {type(module).__name__}, which does not compute x W^T + b; name other layers"
            )
        return None

    inner = [
        path
        for path, module in modules.items()
        if holds_matrix(module) and module is not output and not reason_against(path)
    ]
    if targets == "all-linear":
        chosen = inner
        if not chosen:
            kinds = sorted({type(m).__name__ for m in modules.values() if not list(m.children())})
            raise ValueError(
                f"all-linear found no linear layer; the model is made of {', '.join(kinds)}."
            )
    else:
        entries = [targets] if isinstance(targets, str) else targets
        if not (_is_list(entries) and all(isinstance(entry, str) for entry in entries)):
            raise ValueError(
                f"targets is {targets!r}; it must be all-linear, attention, mlp, or names and "
                "globs of layers."
            )
        if not entries:
            raise ValueError("targets is empty; give layer names, globs or 'all-linear'.")
        named: set[str] = set()
        for entry in entries:
            paths = [path for path in modules if matches(path, entry)]
            linear = [path for path in paths if not reason_against(path)]
            linear = linear or [path for path in inner if block_part(path) == entry]
            if not linear and paths:
                raise ValueError(
                    f"target {entry!r} cannot be adapted: {paths[0]} {reason_against(paths[0])}."
                )
            if not linear:
                known = [path for path, m in modules.items() if holds_matrix(m)]
                known += [*filter(None, map(block_part, inner))]
                raise ValueError(
                    f"target {entry!r} matches no layer of the model."
                    f"{nearest(entry, [*names(known), 'all-linear'])}"
                )
            named.update(linear)
        chosen = [path for path in modules if path in named]
    wanted = _layer_indices(modules, layers)
    if wanted is None:
        return chosen
    kept = [path for path in chosen if layer_index(path) in wanted]
    missing = wanted - {layer_index(path) for path in kept}
    if missing:
        raise ValueError(f"targets {targets} match nothing in layer {min(missing)}.")
    return kept


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


def _layer_indices(
    modules: Mapping[str, nn.Module], layers: str | Sequence[int]
) -> set[int] | None:
    """The chosen depths, or None for all, including what lies outside the stack."""
    if layers == "all":
        return None
    depth = 1 + max(
        (index for path in modules if (index := layer_index(path)) is not None), default=-1
    )
    found = re.fullmatch(r"last:(\d+)", layers) if isinstance(layers, str) else None
    if not found and not (_is_list(layers) and all(type(index) is int for index in layers)):
        raise ValueError(f"layers is {layers!r}; it must be all, last:n or a list of indices.")
    if found:
        wanted = set(range(depth - int(found[1]), depth)) or {-1}
    else:
        wanted = {index + depth if index < 0 else index for index in map(int, layers)} or {-1}
    if not wanted <= set(range(depth)):
        raise ValueError(f"layers is {layers}; this model's are 0 to {depth - 1}.")
    return wanted


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
