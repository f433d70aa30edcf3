"""Checks command-line overrides before Hydra composes them, to name the nearest match.

Imported at every start and by shell completion: no torch, and Hydra only to compose.
"""

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.spelling import did_you_mean

# Mappings that a user fills: Hydra takes new keys in them only when they are added with ++.
OPEN_MAPPINGS = (
    "rank_pattern",
    "alpha_pattern",
    "groups.module_rates",
    "variant.groups.ratios",
)


def dotted_keys(node: Any, prefix: str = "") -> list[str]:
    """Every key of a nested mapping, dotted, those of inner mappings too."""
    keys = []
    for key, value in node.items() if isinstance(node, Mapping) else ():
        keys += [f"{prefix}{key}", *dotted_keys(value, f"{prefix}{key}.")]
    return keys


def is_open(key: str) -> bool:
    """Whether `key` is a mapping that a user fills, or in one."""
    return any(key == mapping or key.startswith(mapping + ".") for mapping in OPEN_MAPPINGS)


def check_command_line(arguments: Sequence[str], conf: Path) -> list[str]:
    """The arguments for Hydra, checked against the configs in the folder `conf`; see
    `check_overrides`. What Hydra itself refuses is left to it."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    if any(argument in ("-sc", "--shell-completion") for argument in arguments):
        return [*arguments]
    groups = {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in conf.iterdir()
        if folder.is_dir()
    }

    def keys_of(choices: Sequence[str]) -> set[str]:
        with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
            return set(dotted_keys(compose("config", list(choices))))

    try:
        return check_overrides(arguments, groups, keys_of)
    except HydraException:
        return [*arguments]


def check_overrides(
    arguments: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    keys_of: Callable[[Sequence[str]], set[str]],
) -> list[str]:
    """The arguments for Hydra, with ++ where a key may be new.

    Raises ValueError for an unknown group option or key, with the nearest match, and for a key that
    one of several swept variants lacks.

    Args:
        arguments: of the command line; flags, hydra.* and +additions are Hydra's own business.
        groups: config group -> its options.
        keys_of: group choices ("variant=dora") -> every dotted key of the composed config.
    """
    pairs = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if "=" in argument and re.match(r"[A-Za-z_]", argument):
            pairs.append(argument.split("=", 1))
        elif not argument.startswith(("-", "+", "~")) and not before.startswith("-"):
            raise ValueError(f"{argument!r} is no override; write key=value.")
    choices: dict[str, list[str]] = {}
    for key, value in pairs:
        if is_open(key) and value.replace(" ", "") == "{}":
            raise ValueError(
                f"{key}={{}} would empty nothing: Hydra merges mappings; set its keys."
            )
        if key in groups and value != "null":
            choices[key] = names = _chosen(value, groups[key])
            for name in names:
                if name not in groups[key]:
                    listed = ", ".join(groups[key]) or "none yet"
                    raise ValueError(
                        f"there is no {key}={name}; there are {listed}."
                        f"{did_you_mean(name, groups[key])}"
                    )
    others = [
        key
        for key, _ in pairs
        if not (key in groups or is_open(key) or key.startswith(("hydra.", "hydra/")))
    ]
    for_hydra = [
        f"++{argument}" if is_open(argument.partition("=")[0]) else argument
        for argument in arguments
    ]
    if not others:
        return for_hydra
    variants = choices.pop("variant", None) or [""]
    rest = [f"{key}={names[0]}" for key, names in choices.items() if names]
    known = {name: keys_of([*rest, *([f"variant={name}"] if name else [])]) for name in variants}
    everywhere = set().union(*known.values(), groups)
    for key in others:
        if key not in everywhere:
            raise ValueError(f"there is no key {key}.{did_you_mean(key, everywhere)}")
        lacking = [name for name in variants if key not in known[name]]
        if lacking:
            raise ValueError(
                f"variant={lacking[0]} has no key {key}; sweep the variants that have it apart."
            )
    return for_hydra


def _chosen(value: str, options: Sequence[str]) -> list[str]:
    """The options that an override's value names: a, or a,b or glob(pattern); [] if it is another
    expression of Hydra's."""
    if glob := re.fullmatch(r"glob\(([^(),=]+)\)", value):
        return fnmatch.filter(options, glob[1].strip("'\""))
    return value.split(",") if re.fullmatch(r"[\w,-]+", value) else []
