"""From the roles of parameters to the groups of an optimiser.

Names never decide: a layer says which role each of its parameters plays, and every other trainable
parameter is an embedding, the bias of a frozen weight, part of a fresh head (a module whose
`is_head` is True, which `inject` sets) or of another module trained as it is.
"""

from collections.abc import Mapping

from torch import nn

from variants.layer import AdapterLinear
from variants.select import layer_index, matches, nearest
from variants.settings import check_positive, check_type
from variants.site import Expert, is_bias

# What is trained outside of adapted layers; module_rates may name these whether they occur or not,
# so that one config serves models with a fresh head and without.
OUTSIDE = ("head", "embedding", "bias", "module")


def by_role(
    model: nn.Module,
    *,
    lr: float,
    ratios: Mapping[str, float] | None = None,
    embedding_lr: float | None = None,
    weight_decay: float | Mapping[str, float] = 0.0,
    layer_decay: float = 1.0,
    module_rates: Mapping[str, float] | None = None,
    module_factors: Mapping[str, float] | None = None,
    norm_rates: float = 0.0,
) -> list[dict]:
    """One optimiser group for each role, rate and decay.

    LoRA+ (Hayou et al. 2024, arXiv:2402.12354, section 4) is ratios={"B": 16.0}: B, the output
    side and zero at the start, learns 16 times as fast as A. Roles are what the layers' `roles()`
    say (A, B, m, ...), and `head`, `embedding`, `bias` and `module` for what is trained outside of
    them.

    Args:
        lr: the rate of every role without a ratio.
        ratios: role -> multiple of `lr`. A role that nothing plays is an error.
        embedding_lr: rate of trained embeddings, and of all that adapts one (as in LoRA+'s own
            code), instead of `lr`; None gives them `lr`.
        weight_decay: for matrices (vectors, such as magnitudes, and biases, also those of experts,
            get none), or role -> decay, exact for each role named and 0 for the others.
        layer_decay: a layer n below the top of the stack learns at layer_decay**n times its rate
            (embeddings: below the lowest); heads and what lies outside the stack are at the top.
        module_rates: role, or name or glob of modules -> absolute rate, which no ratio, depth or
            norm changes. The last entry that matches wins. An entry that matches nothing is an
            error, but for the roles in OUTSIDE.
        module_factors: the same names -> multiple of what their rate would be without, so that it
            follows `lr`. An entry of module_rates for the same parameter wins.
        norm_rates: f > 0 multiplies each rate by 1 + f ||W||_F, W being the adapted layer's base
            weight (outside of layers, the parameter itself); a circulating recipe, from no paper.

    Returns dicts with params, lr, weight_decay, name (the role), modules (paths) and absolute
    (whether the rate does not follow `lr`: module_rates or embedding_lr gave it) for torch.optim.
    Every trainable parameter is in exactly one group. Raises ValueError if nothing is trainable, a
    role or module is named that does not exist, or a rate or decay is out of range.
    """
    by_module = {"module_rates": module_rates or {}, "module_factors": module_factors or {}}
    _check_rates(lr, ratios, embedding_lr, weight_decay, layer_decay, by_module, norm_rates)
    rows = list(_trainable(model))
    if not rows:
        raise ValueError("nothing is trainable: no adapter, bias or head was left unfrozen.")
    roles = {role for _, role, _, _ in rows}
    for option, named in (("ratios", ratios), ("weight_decay", weight_decay)):
        for role in named if isinstance(named, Mapping) else ():
            if role not in roles:
                raise ValueError(
                    f"{option} names the role {role!r}, which nothing here plays; the roles are "
                    f"{', '.join(sorted(roles))}.{nearest(role, roles)}"
                )
    looked_up = {
        path
        for path, m in model.named_modules()
        if isinstance(m, AdapterLinear) and m.site is not None and m.site.kind == "embedding"
    }
    if embedding_lr is not None and "embedding" not in roles and not looked_up:
        raise ValueError(
            f"embedding_lr is {embedding_lr}, but no embedding is trained; leave it out."
        )
    for option, pattern in ((key, name) for key, named in by_module.items() for name in named):
        if pattern not in {*roles, *OUTSIDE} and not any(
            matches(path, pattern) for path, *_ in rows
        ):
            known = {*roles, *OUTSIDE, *(path.rpartition(".")[2] for path, *_ in rows)}
            raise ValueError(
                f"{option} names {pattern!r}, which is no role and no trained module."
                f"{nearest(pattern, known)}"
            )
    top = max(
        [index for path, _ in model.named_modules() if (index := layer_index(path)) is not None],
        default=-1,
    )
    groups: dict[tuple, dict] = {}
    for path, role, parameter, norm in rows:
        rate, absolute = lr * (ratios or {}).get(role, 1.0), False
        embeds = role == "embedding" or path in looked_up
        if embeds and embedding_lr is not None:
            rate, absolute = embedding_lr, True
        if layer_decay != 1.0:
            depth = layer_index(path)
            outermost = depth is None or role == "head"  # a head may be numbered inside
            below = top + 1 if embeds else 0 if outermost else top - (depth or 0)
            rate *= layer_decay**below
        rate *= 1.0 + norm_rates * norm() if norm_rates else 1.0
        here = {
            option: [value for name, value in named.items() if name == role or matches(path, name)]
            for option, named in by_module.items()
        }
        if here["module_factors"]:
            rate *= here["module_factors"][-1]
        if here["module_rates"]:
            rate, absolute = here["module_rates"][-1], True
        if isinstance(weight_decay, Mapping):
            decay = weight_decay.get(role, 0.0)
        else:
            decay = weight_decay if parameter.ndim > 1 and role != "bias" else 0.0
        group = groups.setdefault(
            (role, rate, decay, absolute),
            {
                "params": [],
                "lr": rate,
                "weight_decay": decay,
                "name": role,
                "modules": [],
                "absolute": absolute,
            },
        )
        group["params"].append(parameter)
        group["modules"].append(path)
    return list(groups.values())


def _check_rates(lr, ratios, embedding_lr, weight_decay, layer_decay, by_module, norm_rates):
    """Raise ValueError naming the first rate or decay of `by_role` that is out of range."""
    check_positive("lr", lr)
    if embedding_lr is not None:
        check_positive("embedding_lr", embedding_lr)
    for option, rates in (("ratios", ratios), *by_module.items()):
        if rates is not None and not isinstance(rates, Mapping):
            check_type(option, rates, dict | None)
        for name, rate in (rates or {}).items():
            check_positive(f"{option}.{name}", rate)
    if isinstance(weight_decay, Mapping):
        for role, decay in weight_decay.items():
            check_positive(f"weight_decay.{role}", decay, or_zero=True)
    else:
        check_positive("weight_decay", weight_decay, or_zero=True)
    check_positive("layer_decay", layer_decay)
    check_positive("norm_rates", norm_rates, or_zero=True)


def _trainable(model: nn.Module):
    """(module path, role, parameter, () -> norm) of each trainable parameter once."""
    seen: set[int] = set()
    layers = {path: m for path, m in model.named_modules() if isinstance(m, AdapterLinear)}
    for path, layer in layers.items():
        for role, parameter in layer.roles().items():
            assert id(parameter) not in seen, f"{path} names a parameter of another role again"
            seen.add(id(parameter))
            yield (
                path,
                role,
                parameter,
                lambda layer=layer: float(layer.base_weight().detach().norm()),
            )
    heads = {
        id(parameter)
        for module in model.modules()
        if getattr(module, "is_head", False)
        for parameter in module.parameters()
    }
    embeddings = {
        id(m._parameters.get("weight")) for m in model.modules() if isinstance(m, nn.Embedding)
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        path, _, last = name.rpartition(".")
        assert path not in layers, f"{name} is trainable but {path}.roles() does not name it"
        seen.add(id(parameter))
        owner = model.get_submodule(path)
        frozen_beside = any(not p.requires_grad for p in owner.parameters(recurse=False)) or any(
            isinstance(child, AdapterLinear | Expert) for child in owner.children()
        )
        if id(parameter) in embeddings or isinstance(owner, nn.Embedding):
            role = "embedding"
        elif is_bias(last) and frozen_beside:
            role = "bias"
        else:
            role = "head" if id(parameter) in heads else "module"
        yield path, role, parameter, lambda p=parameter: float(p.detach().norm())
