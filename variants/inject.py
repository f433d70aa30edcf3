"""Choose layers by pattern, swap them for adapted ones, freeze the rest.

The only code that walks a model. A choice that matches nothing is an error, entry by entry: a
misspelt target must never train a smaller adapter than was asked for.
"""

import difflib
import fnmatch
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from variants.base import AdapterLinear, Variant, check_penalty

# Arguments of a layer that `inject` fills in.
_GIVEN = ("store", "bias", "path", "seed", "compute_dtype")


def matches(path: str, pattern: str) -> bool:
    """Whether a module path is named by `pattern`.

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


def is_inside(path: str, modules: Sequence[str]) -> bool:
    """Whether `path` is one of `modules` or below one."""
    return any(path == module or path.startswith(module + ".") for module in modules)


def inject(
    model: nn.Module,
    variant: Variant,
    *,
    seed: int,
    targets: str | Sequence[str] = "all-linear",
    layers: str | Sequence[int] = "all",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    head: Sequence[str] = (),
    train_modules: Sequence[str] = (),
    compute_dtype: torch.dtype | None = None,
) -> dict[str, AdapterLinear]:
    """Replace the chosen linear layers of `model` in place; freeze everything but what is trained.

    Args:
        seed: with each module's path, all that the initial adapters depend on.
        targets: "all-linear" (every nn.Linear but the output layer, `head` and `train_modules`),
            or names and globs of layers, see `matches`.
        layers: "all", indices, or "last:n", by the first number in a module's path.
        rank_pattern, alpha_pattern: {name or glob: rank or alpha} for some of the chosen layers;
            the last entry that matches wins.
        head: names or globs of freshly initialised modules, trained as they are in float32. Each is
            marked with `is_head = True`, which gives its parameters the role `head`.
        train_modules: names or globs of further modules trained likewise, in the role `module`. In
            a model of lower precision, what enters one is cast to float32 and what leaves it back.
        compute_dtype: see `AdapterLinear`.

    Returns the adapted layers by path, in the model's order. Raises ValueError for a choice that
    matches nothing or cannot be adapted, or an option that the variant would ignore, leaving the
    model as it was.
    """
    accepted = accepted_options(variant.adapter, _GIVEN)
    for option in getattr(variant.adapter, "keywords", {}):
        if accepted is not None and option not in accepted:
            raise ValueError(
                f"variant {variant.name!r} would ignore the option {option}."
                f"{nearest(option, accepted)}"
            )
    modules = {path: module for path, module in model.named_modules() if path}
    if any(isinstance(module, AdapterLinear) for module in modules.values()):
        raise ValueError("this model has adapters already; load the base again to inject others.")
    heads = _match_modules(modules, head)
    trained = [*heads, *_match_modules(modules, train_modules)]
    chosen = _choose(model, modules, targets, layers, trained)
    options = _options(chosen, "rank", rank_pattern, variant)
    for path, alpha in _options(chosen, "alpha", alpha_pattern, variant).items():
        options.setdefault(path, {}).update(alpha)

    adapted: dict[str, AdapterLinear] = {}
    for path in chosen:  # build all before swapping any: an error leaves the model whole
        linear = modules[path]
        assert isinstance(linear, nn.Linear)
        adapted[path] = variant.adapter(
            variant.store(_weight(linear)),
            linear.bias,
            path=path,
            seed=seed,
            compute_dtype=compute_dtype,
            **options.get(path, {}),
        ).to("cpu" if hasattr(linear, "read") else linear.weight.device)
    biases = _biases(model, adapted, variant.bias)
    check_penalty(variant, adapted)
    restricted = targets != "all-linear" or layers != "all"
    if restricted and variant.bias != "adapted" and not any(a.roles() for a in adapted.values()):
        raise ValueError(
            f"targets and layers choose nothing that variant {variant.name!r} trains; "
            "leave them out."
        )

    model.requires_grad_(False)
    swapped = {id(modules[path]): layer for path, layer in adapted.items()}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # a layer used in two places is swapped in both
            if child is not None and id(child) in swapped:
                setattr(parent, name, swapped[id(child)].train(child.training))
    for bias in biases:
        bias.data = bias.data.float()
        bias.requires_grad_(True)
    _train_whole(model, [modules[path] for path in trained])
    for path in heads:
        modules[path].is_head = True
    return adapted


def _weight(linear: nn.Linear) -> torch.Tensor:
    """The weight (o, i); a layer that keeps it elsewhere has `read`, and is read only now."""
    read = getattr(linear, "read", None)
    return linear.weight.detach() if read is None else read()


def _train_whole(model: nn.Module, trained: Sequence[nn.Module]) -> None:
    """Make modules trainable as they are, in float32. The rest of a model of lower precision meets
    them in its own dtype, and so it does a layer that shares a weight with one of them, as a tied
    output layer does with the embedding."""
    inside = {id(part) for module in trained for part in module.modules() if part is not module}
    outermost = [module for module in trained if id(module) not in inside]
    low = {id(p): p.dtype for p in model.parameters() if p.is_floating_point() and p.itemsize < 4}
    for module in trained:
        module.to(torch.float32).requires_grad_(True)
    own = {id(parameter) for module in trained for parameter in module.parameters()}
    sharing = [
        module
        for module in model.modules()
        if id(module) not in inside and own & set(map(id, module._parameters.values()))
    ]
    for module in {id(m): m for m in (*outermost, *sharing)}.values():
        dtypes = [low[id(p)] for p in module.parameters() if id(p) in low]
        if dtypes:
            module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
            module.register_forward_hook(functools.partial(_cast_output, dtype=dtypes[0]))


def _cast_inputs(module: nn.Module, args: tuple, kwargs: dict) -> tuple[Any, Any]:
    return _cast(args, torch.float32), _cast(kwargs, torch.float32)


def _cast_output(module: nn.Module, args: tuple, output: Any, *, dtype: torch.dtype) -> Any:
    return _cast(output, dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The floating tensors of nested tuples, lists and mappings in `dtype`."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return type(value)({key: _cast(item, dtype) for key, item in value.items()})
    if type(value) in (tuple, list):
        return type(value)(_cast(item, dtype) for item in value)
    return value


def _match_modules(modules: Mapping[str, nn.Module], patterns: Sequence[str]) -> list[str]:
    found: list[str] = []
    for pattern in patterns:
        paths = [path for path in modules if matches(path, pattern)]
        if not paths:
            raise ValueError(f"no module is named {pattern!r}.{nearest(pattern, _names(modules))}")
        found += [path for path in paths if path not in found]
    return found


def _names(paths: Iterable[str]) -> set[str]:
    """What a user may have meant: whole paths, and their last components but for the numbers."""
    paths = list(paths)
    return {*paths, *(path.rpartition(".")[2] for path in paths)} - set(map(str, range(1000)))


def _choose(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    targets: str | Sequence[str],
    layers: str | Sequence[int],
    trained: Sequence[str],
) -> list[str]:
    embeddings = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    output = getattr(model, "get_output_embeddings", lambda: None)()

    def reason_against(path: str) -> str | None:
        module = modules[path]
        parent = modules.get(path.rpartition(".")[0], model)
        if not isinstance(module, nn.Linear):
            kind = type(module).__name__
            if kind == "Conv1D":
                return (
                    "is a transformers Conv1D, which keeps its weight transposed; convert it "
                    "to nn.Linear first"
                )
            return f"is a {kind}; only nn.Linear can be adapted, so name the linear layers in it"
        if not module.weight.is_floating_point():
            return (
                f"is a quantised {type(module).__name__}; load the base unquantised and let the "
                "variant's store quantise it"
            )
        if isinstance(parent, nn.MultiheadAttention):
            return (
                "belongs to nn.MultiheadAttention, which reads the weight and never calls the "
                "layer; use an attention made of nn.Linear layers"
            )
        if id(module.weight) in embeddings:
            return "shares its weight with an embedding"
        if is_inside(path, trained):
            return "is trained as it is (train_modules or the head)"
        return None

    if targets == "all-linear":
        chosen = [
            path
            for path, module in modules.items()
            if isinstance(module, nn.Linear) and module is not output and not reason_against(path)
        ]
        if not chosen:
            kinds = sorted({type(m).__name__ for m in modules.values() if not list(m.children())})
            raise ValueError(
                "all-linear found no nn.Linear to adapt; the model is made of "
                f"{', '.join(kinds)} (a Conv1D must be converted to nn.Linear first)."
            )
    else:
        entries = [targets] if isinstance(targets, str) else targets
        if not (_is_list(entries) and all(isinstance(entry, str) for entry in entries)):
            raise ValueError(
                f"targets is {targets!r}; it must be all-linear, or names and globs of layers."
            )
        if not entries:
            raise ValueError("targets is empty; give layer names, globs or 'all-linear'.")
        named: set[str] = set()
        for entry in entries:
            paths = [path for path in modules if matches(path, entry)]
            linear = [path for path in paths if not reason_against(path)]
            if not linear and paths:
                raise ValueError(
                    f"target {entry!r} cannot be adapted: {paths[0]} {reason_against(paths[0])}."
                )
            if not linear:
                known = [path for path, m in modules.items() if isinstance(m, nn.Linear)]
                raise ValueError(
                    f"target {entry!r} matches no layer of the model."
                    f"{nearest(entry, [*_names(known), 'all-linear'])}"
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


def _options(
    chosen: Sequence[str], key: str, pattern: Mapping[str, float] | None, variant: Variant
) -> dict[str, dict[str, float]]:
    """Per path, the value of `key` that a rank_pattern or alpha_pattern gives it."""
    options: dict[str, dict[str, float]] = {}
    accepted = accepted_options(variant.adapter, _GIVEN)
    if pattern and accepted is not None and key not in accepted:
        raise ValueError(f"{key}_pattern is given, but variant {variant.name!r} has no {key}.")
    for name, value in (pattern or {}).items():
        paths = [path for path in chosen if matches(path, name)]
        if not paths:
            raise ValueError(
                f"{key}_pattern names {name!r}, which is no adapted layer."
                f"{nearest(name, _names(chosen))}"
            )
        options.update({path: {key: value} for path in paths})
    return options


def accepted_options(call: Callable[..., Any], given: Iterable[str] = ()) -> set[str] | None:
    """The keyword arguments of a function, class or partial but for those `given` by its caller,
    following a class's **kwargs to its bases; None if it takes any."""
    target = getattr(call, "func", call)
    found: set[str] = set()
    for owner in target.__mro__ if inspect.isclass(target) else [target]:
        try:
            parameters = inspect.signature(owner).parameters.values()
        except ValueError:  # a builtin that does not say
            return None
        found |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return found - set(given)
    return None


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _biases(
    model: nn.Module, adapted: Mapping[str, AdapterLinear], which: str
) -> list[nn.Parameter]:
    """The biases to train, those of adapted layers from the layers that will stand there."""
    if which not in ("none", "adapted", "all"):
        raise ValueError(f"bias is {which!r}; it must be none, adapted or all.")
    if which == "none":
        return []
    found = [layer.bias for layer in adapted.values() if layer.bias is not None]
    if which == "all":
        for name, parameter in model.named_parameters():
            path, _, last = name.rpartition(".")
            if last != "bias" or path in adapted:
                continue
            if torch.finfo(parameter.dtype).bits < 32:
                raise ValueError(
                    f"bias=all would train {name} in {parameter.dtype}: use bias=adapted or a "
                    "float32 base."
                )
            found.append(parameter)
    if not found:
        raise ValueError(f"bias={which} would train nothing: there is no bias to train.")
    return found
