"""Adapt the chosen sites of a model (`variants.select`) and freeze the rest; and undo it."""

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from variants.layer import AdapterLinear, UnadaptedLinear
from variants.method import Variant, check_penalty
from variants.select import choose, is_named, match_modules, names, nearest
from variants.site import Site, give_back, is_bias, put, sites
from variants.store import DenseStore, WeightStore

# Arguments of a layer that `inject` fills in.
_GIVEN = ("store", "bias", "path", "seed", "compute_dtype", "weight")


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
    passed: Collection[str] | None = None,
) -> dict[str, AdapterLinear]:
    """Adapt the chosen matrices of `model` in place; freeze everything but what is trained.

    Args:
        seed: with each module's path, all that the initial adapters depend on.
        targets: "all-linear" (every matrix of the inner maps: linear layers, a mixture's experts,
            the projections of nn.MultiheadAttention; not the output layer, `head` and
            `train_modules`), or names and globs, see `matches`, of these, embeddings, convolutions,
            routers and the output layer; "attention", "mlp" and "experts" are the inner ones that
            stand in such a part of a block, whatever an architecture calls them. Of a layer
            narrower than the rank, all-linear lowers the rank and keeps s; a named one is refused.
        layers: "all", indices, or "last:n", by the first number in a module's path.
        rank_pattern, alpha_pattern: {name or glob: rank or alpha} for some of the chosen layers;
            the last entry that matches wins.
        head: names or globs of freshly initialised modules, trained as they are in float32. Each is
            marked with `is_head = True`, which gives its parameters the role `head`.
        train_modules: names or globs of further modules trained likewise, in the role `module`. In
            a model of lower precision, what enters one is cast to float32 and what leaves it back.
        compute_dtype: see `AdapterLinear`.
        passed: names of the parameters that the task goes through, the only ones to be adapted;
            None where that is not known.

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
    heads = match_modules(modules, head)
    trained = [*heads, *match_modules(modules, train_modules)]
    found = sites(model)
    chosen = [found[p] for p in choose(model, modules, found, targets, layers, trained, passed)]
    options = _options(chosen, "rank", rank_pattern, variant)
    for path, alpha in _options(chosen, "alpha", alpha_pattern, variant).items():
        options.setdefault(path, {}).update(alpha)
    lowered = _narrow(chosen, options, variant) if targets == "all-linear" else {}

    looks = "weight" in (accepted_options(variant.adapter) or ())  # at W before it is stored
    adapted: dict[str, AdapterLinear] = {}
    for site in chosen:  # build all before swapping any: an error leaves the model whole
        path, module = site.path, modules.get(site.owner, model)
        weight, store = None, _brought(module, path, variant)
        if store is None:
            weight = weight_of(module, site)
            store = variant.store(weight)
        layer = adapted[path] = variant.adapter(
            store,
            module.bias if site.kind == "linear" else None,
            path=path,
            seed=seed,
            compute_dtype=compute_dtype,
            **({"weight": weight} if looks else {}),
            **{**options.get(path, {}), **lowered.get(path, {})},
        ).to(next(store.parameters()).device)
        layer.site = site
    biases = _biases(model, chosen, adapted, variant.bias)
    check_penalty(variant, adapted)
    restricted = targets != "all-linear" or layers != "all"
    if restricted and variant.bias != "adapted" and not any(a.roles() for a in adapted.values()):
        raise ValueError(
            f"targets and layers choose nothing that variant {variant.name!r} trains; "
            "leave them out."
        )

    model.requires_grad_(False)
    _put_read(model, found, adapted)
    swapped = {id(modules[s.path]): adapted[s.path] for s in chosen if s.kind == "linear"}
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


def _narrow(
    chosen: Sequence[Site],
    options: Mapping[str, Mapping[str, float]],
    variant: Variant,
) -> dict[str, dict[str, Any]]:
    """Per path of a layer that is narrower than the rank which nobody gave it by name, the options
    with which it fits; none if all layers are, since then the rank is a mistake."""
    kind = getattr(variant.adapter, "func", None)
    if not (inspect.isclass(kind) and issubclass(kind, AdapterLinear)):
        return {}
    given = getattr(variant.adapter, "keywords", {})
    found = {}
    for site in chosen:
        own = options.get(site.path, {})
        if "rank" not in own:
            found[site.path] = kind.narrowed({**given, **own}, min(site.matrix_shape))
    return {} if len(found) == len(chosen) and all(found.values()) else found


def _brought(module: nn.Module, path: str, variant: Variant) -> WeightStore | None:
    """The store that a layer of a quantised base has already, which stands whatever its settings;
    None for a dense layer. Raises ValueError if the variant's store would quantise it again."""
    store: WeightStore | None = getattr(module, "store", None)
    kind = getattr(variant.store, "func", variant.store)
    if store is not None and kind not in (DenseStore, type(store)):
        raise ValueError(
            f"variant {variant.name!r} keeps its weights in {kind.__name__}, but the base keeps "
            f"{path} in {type(store).__name__} already; use a variant without a store of its own, "
            "or give the unquantised base."
        )
    return store


def weight_of(module: nn.Module, site: Site) -> torch.Tensor:
    """W (o, i); a module that keeps it elsewhere has `read`, and is read only now."""
    read = getattr(module, "read", None)
    return site.matrix(module.get_parameter(site.name).detach() if read is None else read())


def _put_read(
    model: nn.Module, found: Mapping[str, Site], adapted: Mapping[str, AdapterLinear]
) -> None:
    """Put the layers of parameters that modules read into their places. The experts of a stack that
    are not chosen stay as they are, in layers of their own."""
    parameters: dict[str, list[Site]] = {}
    for site in found.values():
        if site.kind != "linear":
            parameters.setdefault(site.parameter, []).append(site)
    for stack in parameters.values():
        if not any(site.path in adapted for site in stack):
            continue
        module, layers = model.get_submodule(stack[0].owner), {}
        for site in stack:
            if site.path not in adapted:
                store = DenseStore(weight_of(module, site))
                layers[site.path] = UnadaptedLinear(store, None, path=site.path, seed=0)
                layers[site.path].site = site
        put(model, stack, {**adapted, **layers})


@torch.no_grad()
def extract(
    model: nn.Module,
    dtype: torch.dtype,
    rounded: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Undo `inject`, in place: ordinary modules hold W' and the adapted layers' biases in `dtype`.

    Args:
        rounded: what each W' (o, i) passes on its way, instead of a cast.
    """
    read: dict[str, tuple[Site, list[torch.Tensor]]] = {}
    layers = {path: m for path, m in model.named_modules() if isinstance(m, AdapterLinear)}
    for path, layer in layers.items():
        site = layer.site
        if site is None or site.kind == "linear":
            model.set_submodule(path, layer.export(dtype, rounded))
        else:
            W = layer.adapted_weight()
            W = W.to(dtype) if rounded is None else rounded(W)
            read.setdefault(site.parameter, (site, []))[1].append(site.kept(W))
    give_back(
        model,
        {
            name: (parts[0] if site.expert is None else torch.stack(parts)).reshape(site.shape)
            for name, (site, parts) in read.items()
        },
    )


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
            float32_island(module, dtypes[0])


def float32_island(module: nn.Module, outside: torch.dtype | None = None) -> None:
    """Puts a module into float32 and casts what enters it likewise; what leaves it is cast to
    `outside`, the dtype of the model around it, or stays in float32 if that is None."""
    module.float().register_forward_pre_hook(_cast_inputs, with_kwargs=True)
    if outside is not None:
        module.register_forward_hook(functools.partial(_cast_output, dtype=outside))


def _cast_inputs(module: nn.Module, args: tuple, kwargs: dict) -> tuple[Any, Any]:
    """In the dtype that the module has now: the whole model may have been cast since."""
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    return _cast(args, dtype), _cast(kwargs, dtype)


def _cast_output(module: nn.Module, args: tuple, output: Any, *, dtype: torch.dtype) -> Any:
    return _cast(output, dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The floating tensors of nested tuples, lists and mappings in `dtype`."""
    return tree_map_only(
        torch.Tensor,
        lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor,
        value,
    )


def _options(
    chosen: Sequence[Site], key: str, pattern: Mapping[str, float] | None, variant: Variant
) -> dict[str, dict[str, float]]:
    """Per path, the value of `key` that a rank_pattern or alpha_pattern gives it."""
    options: dict[str, dict[str, float]] = {}
    accepted = accepted_options(variant.adapter, _GIVEN)
    if pattern and accepted is not None and key not in accepted:
        raise ValueError(f"{key}_pattern is given, but variant {variant.name!r} has no {key}.")
    for name, value in (pattern or {}).items():
        paths = [site.path for site in chosen if is_named(site, name)]
        if not paths:
            raise ValueError(
                f"{key}_pattern names {name!r}, which is no adapted layer."
                f"{nearest(name, names(site.path for site in chosen))}"
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


def _biases(
    model: nn.Module,
    chosen: Sequence[Site],
    adapted: Mapping[str, AdapterLinear],
    which: str,
) -> list[nn.Parameter]:
    """The biases to train, those of adapted layers from the layers that will stand there."""
    if which not in ("none", "adapted", "all"):
        raise ValueError(f"bias is {which!r}; it must be none, adapted or all.")
    if which == "none":
        return []
    found = [layer.bias for layer in adapted.values() if layer.bias is not None]
    beside = {site.bias for site in chosen if site.kind != "linear"}
    for name, parameter in model.named_parameters():
        path, _, last = name.rpartition(".")
        if not is_bias(last) or path in adapted or (which == "adapted" and name not in beside):
            continue
        if torch.finfo(parameter.dtype).bits < 32:
            other = "none" if name in beside else "adapted"
            raise ValueError(
                f"bias={which} would train {name} in {parameter.dtype}: use bias={other} or a "
                "float32 base."
            )
        found.append(parameter)
    if not found:
        raise ValueError(f"bias={which} would train nothing: there is no bias to train.")
    return found
