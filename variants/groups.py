"""From the roles of parameters to the groups of an optimiser.

Names never decide: a layer says which role each of its parameters plays, and every other trainable
parameter is a bias, an embedding or part of a head.
"""

from collections.abc import Mapping

import torch
from torch import nn

from variants.base import AdapterLinear
from variants.inject import layer_index, matches, nearest


def by_role(
    model: nn.Module,
    *,
    lr: float,
    ratios: Mapping[str, float] | None = None,
    embedding_lr: float | None = None,
    weight_decay: float | Mapping[str, float] = 0.0,
    layer_decay: float = 1.0,
    module_rates: Mapping[str, float] | None = None,
    norm_rates: float = 0.0,
) -> list[dict]:
    """One optimiser group for each role, rate and decay.

    LoRA+ (Hayou et al. 2024, arXiv:2402.12354, section 4) is ratios={"B": 16.0}: B, the output
    side and zero at the start, learns 16 times as fast as A. Roles are what the layers' `roles()`
    say (A, B, m, ...), and `head`, `embedding` and `bias` for what is trained outside of them.

    Args:
        lr: the rate of every role without a ratio.
        ratios: role -> multiple of `lr`. A role that nothing plays is an error.
        embedding_lr: absolute rate of trained embeddings; None gives them `lr`.
        weight_decay: for matrices (vectors, such as biases and magnitudes, get none), or
            role -> decay, exact for each role named and 0 for the others.
        layer_decay: a layer n below the top of the stack learns at layer_decay**n times its rate
            (embeddings: below the lowest); heads and what lies outside the stack are at the top.
        module_rates: role, or name or glob of modules -> absolute rate, which no ratio, depth or
            norm changes. The last entry that matches wins.
        norm_rates: f > 0 multiplies each rate by 1 + f ||W||_F, W being the adapted layer's base
            weight (outside of layers, the parameter itself); a circulating recipe, from no paper.

    Returns dicts with params, lr, weight_decay, name (the role), modules (paths) for torch.optim.
    Every trainable parameter is in exactly one group. Raises ValueError if nothing is trainable, or
    a role or module is named that does not exist.
    """
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
    for pattern in module_rates or {}:
        if pattern not in roles and not any(matches(path, pattern) for path, *_ in rows):
            known = {*roles, *(path.rpartition(".")[2] for path, *_ in rows)}
            raise ValueError(
                f"module_rates names {pattern!r}, which is no role and no trained module."
                f"{nearest(pattern, known)}"
            )
    top = max(
        [index for path, _ in model.named_modules() if (index := layer_index(path)) is not None],
        default=-1,
    )
    groups: dict[tuple, dict] = {}
    for path, role, parameter, norm in rows:
        rate = lr * (ratios or {}).get(role, 1.0)
        if role == "embedding" and embedding_lr is not None:
            rate = embedding_lr
        if layer_decay != 1.0:
            depth = layer_index(path)
            if role == "embedding":
                below = top + 1
            else:  # a head may be numbered inside
                below = 0 if depth is None or role == "head" else top - depth
            rate *= layer_decay**below
        rate *= 1.0 + norm_rates * norm() if norm_rates else 1.0
        for pattern, absolute in (module_rates or {}).items():
            if pattern == role or matches(path, pattern):
                rate = absolute
        if isinstance(weight_decay, Mapping):
            decay = weight_decay.get(role, 0.0)
        else:
            decay = weight_decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault(
            (role, rate, decay),
            {"params": [], "lr": rate, "weight_decay": decay, "name": role, "modules": []},
        )
        group["params"].append(parameter)
        group["modules"].append(path)
    return list(groups.values())


def _trainable(model: nn.Module):
    """(module path, role, parameter, () -> norm) of each trainable parameter once."""
    seen: set[int] = set()
    layers = {path: m for path, m in model.named_modules() if isinstance(m, AdapterLinear)}
    for path, layer in layers.items():
        for role, parameter in layer.roles().items():
            assert id(parameter) not in seen, f"{path} names a parameter of another role again"
            seen.add(id(parameter))
            yield path, role, parameter, lambda layer=layer: _base_norm(layer)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        path, _, last = name.rpartition(".")
        assert path not in layers, f"{name} is trainable but {path}.roles() does not name it"
        seen.add(id(parameter))
        owner = model.get_submodule(path)
        frozen_beside = any(not p.requires_grad for p in owner.parameters(recurse=False))
        if id(parameter) in embeddings:
            role = "embedding"
        elif last == "bias" and frozen_beside:
            role = "bias"
        else:
            role = "head"
        yield path, role, parameter, lambda p=parameter: float(p.detach().norm())


@torch.no_grad()
def _base_norm(layer: AdapterLinear) -> float:
    trained = layer.roles().get("W")
    W = layer.store.dequantize(torch.float32) if trained is None else trained
    return float(W.norm())


def describe_groups(groups: list[dict]) -> str:
    """The groups as a table: role, tensors, parameters, rate and decay."""
    lines = [f"{'role':<12}{'tensors':>8}{'parameters':>12}{'rate':>11}{'decay':>8}"]
    for group in groups:
        count = sum(parameter.numel() for parameter in group["params"])
        lines.append(
            f"{group['name']:<12}{len(group['params']):>8}{count:>12,}"
            f"{group['lr']:>11.3g}{group['weight_decay']:>8.3g}"
        )
    return "\n".join(lines)
