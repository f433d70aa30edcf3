"""The sites that a choice means: patterns over paths, and those that can be adapted.

A choice that matches nothing is an error, entry by entry: a misspelt target must never train a
smaller adapter than was asked for.
"""

import difflib
import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from variants.site import Site, holds_matrix


def matches(path: str, pattern: str) -> bool:
    """True if a module path is named by `pattern`.

    A pattern with *, ? or [ is a glob over the whole path; any other is a suffix at a dot, as in
    peft: "query" and "self.query" name encoder.layer.0.attention.self.query. The `.weight` of a
    module that reads its own need not be said.
    """
    module = path.removesuffix(".weight")
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(module, pattern)
    return any(f".{name}".endswith(f".{pattern}") for name in (path, module))


def nearest(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for the known word nearest to `word`, or nothing."""
    close = difflib.get_close_matches(word, sorted(set(known)), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def layer_index(path: str) -> int | None:
    """The first number among the path's components: its depth in the stack, None outside it."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(found[1]) if found else None


PARTS = ("attention", "mlp", "experts")  # of a transformer's block, as `targets` may name them


def in_part(path: str, part: str) -> bool:
    """True if the matrix at `path` stands in that part of a transformer's block, whatever the
    architecture calls it. The experts of a mixture are part of its mlp, and those that every token
    passes through are none of its experts. A state-space mixer is in no part."""
    names = path.lower().split(".")
    if layer_index(path) is None:
        return False
    if part == "experts":
        return any(name.endswith("experts") and "shared" not in name for name in names)
    attention = any("att" in name for name in names)
    if part == "attention":
        return attention
    return part == "mlp" and not attention and not {"mixer", "mamba"} & set(names)


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


def is_named(site: Site, entry: str) -> bool:
    """True if an entry of `targets` or of a pattern names the site: its path, the module whose
    matrix it is, or the stack that it is one of."""
    names = [site.path]
    if site.kind != "other":
        names.append(site.owner)
    if site.expert is not None:
        names.append(site.parameter)
    return any(matches(name, entry) for name in names)


def choose(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    sites: Mapping[str, Site],
    targets: str | Sequence[str],
    layers: str | Sequence[int],
    trained: Sequence[str],
    passed: Collection[str] | None = None,
) -> list[str]:
    """Paths of the sites that `inject`'s targets and layers choose. Raises ValueError as it does.

    Args:
        trained: paths of modules that are trained as they are.
        passed: names of the parameters that the task goes through; None for all.
    """
    embeddings = {
        id(m._parameters.get("weight")) for m in modules.values() if isinstance(m, nn.Embedding)
    }
    output = getattr(model, "get_output_embeddings", lambda: None)()

    def reason_against(site: Site) -> str | None:
        module = modules.get(site.owner, model)
        if not module.get_parameter(site.name).is_floating_point():
            return (
                f"is a quantised {type(module).__name__}; load the base unquantised and let the "
                "variant's store quantise it"
            )
        if is_inside(site.owner, trained):
            return "is trained as it is (train_modules or the head)"
        if passed is not None and site.parameter not in passed:
            return "takes no part in what this model makes of a text, so it would never learn"
        return None

    def is_inner(site: Site) -> bool:
        module = modules.get(site.owner, model)
        tied = id(module._parameters[site.name]) in embeddings
        return site.inner and module is not output and not tied and not reason_against(site)

    inner = [path for path, site in sites.items() if is_inner(site)]
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
                f"targets is {targets!r}; it must be all-linear, {', '.join(PARTS)}, or names and "
                "globs of layers."
            )
        if not entries:
            raise ValueError("targets is empty; give layer names, globs or 'all-linear'.")
        wanted: set[str] = set()
        for entry in entries:
            named = [path for path, site in sites.items() if is_named(site, entry)]
            fit = [path for path in named if not reason_against(sites[path])]
            fit = fit or [path for path in inner if in_part(path, entry)]
            if not fit and named:
                raise ValueError(
                    f"target {entry!r} cannot be adapted: {named[0]} "
                    f"{reason_against(sites[named[0]])}."
                )
            if not fit and (other := [path for path in modules if matches(path, entry)]):
                kind = type(modules[other[0]]).__name__
                raise ValueError(
                    f"target {entry!r} cannot be adapted: {other[0]} is a {kind}, which holds no "
                    "matrix; name those in it."
                )
            if not fit:
                known = [path for path, m in modules.items() if holds_matrix(m)]
                known += [name for site in sites.values() for name in (site.path, site.owner)]
                known += [part for part in PARTS if any(in_part(path, part) for path in inner)]
                raise ValueError(
                    f"target {entry!r} matches no layer of the model."
                    f"{nearest(entry, [*names(known), 'all-linear'])}"
                )
            wanted.update(fit)
        chosen = [path for path in sites if path in wanted]
    indices = _layer_indices(modules, layers)
    if indices is None:
        return chosen
    kept = [path for path in chosen if layer_index(path) in indices]
    missing = indices - {layer_index(path) for path in kept}
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


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
