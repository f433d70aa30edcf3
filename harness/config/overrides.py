"""Checks command-line overrides before Hydra composes them, to name the nearest match.

Imported at every start and by shell completion: no torch, and Hydra only to compose.
"""

import fnmatch
import functools
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.config.identity import OPTIONS, at
from harness.config.secrets import refuse_secrets
from harness.words import did_you_mean

# Mappings that a user fills: Hydra takes new keys in them only when they are added with ++.
OPEN_MAPPINGS = (
    "rank_pattern",
    "alpha_pattern",
    "groups.module_rates",
    "groups.module_factors",
    "variant.groups.ratios",
)
PLUGINS = ("launcher", "sweeper")  # Hydra's groups hydra/... that a user chooses from
_PLUGIN_SETTING = re.compile(rf"hydra\.({'|'.join(PLUGINS)})\.\w+")  # what is in it is its own

# Text whatever is typed, since a folder may be called 2024; and those that are paths from the home
# folder where they begin with ~. Other paths are expanded where they are read.
TEXTS = (
    "outputs_dir", "run_dir", "init_from", "model.name", "hydra.sweeper.archive", "task.files.*",
    "task.held_out_text", "task.dataset", "task.config", "task.revision", "task.splits.*",
)  # fmt: skip
FROM_HOME = ("outputs_dir", "run_dir", "init_from", "hydra.sweeper.archive", "task.dataset")
_NUMBER = re.compile(r"[-+]?([\d_]+\.?[\d_]*|\.[\d_]+)(e[-+]?\d+)?|[-+]?(inf|nan)", re.IGNORECASE)

FLAGS = (  # Hydra's, which may be cut short
    "help", "hydra-help", "version", "cfg", "resolve", "package", "run", "multirun",
    "shell-completion", "config-path", "config-name", "config-dir", "experimental-rerun", "info",
)  # fmt: skip

# How Hydra builds what a config describes: the business of the files in conf/.
BUILDING = ("_partial_", "_convert_", "_recursive_", "_args_")


def dotted_keys(node: Any, prefix: str = "") -> list[str]:
    """Every key of a nested mapping, dotted, those of inner mappings too."""
    keys = []
    for key, value in node.items() if isinstance(node, Mapping) else ():
        keys += [f"{prefix}{key}", *dotted_keys(value, f"{prefix}{key}.")]
    return keys


def is_open(key: str) -> bool:
    """True if `key` is a mapping that a user fills, or in one."""
    return any(key == mapping or key.startswith(mapping + ".") for mapping in OPEN_MAPPINGS)


def with_plus(override: str) -> str:
    """An override with ++ if Hydra would else refuse its key as new."""
    return f"++{override}" if is_open(override.partition("=")[0]) else override


def as_text(argument: str) -> str:
    """An override as Hydra reads it: it takes no ~ but between quotation marks, and a number for a
    number where text is meant."""
    key, equals, value = argument.partition("=")
    name = key.lstrip("+")
    if not equals or not re.match(r"[A-Za-z_]", name):
        return argument

    def quoted(part: str) -> str:
        within = part[:1] in ("'", '"') and part[-1:] == part[:1]
        bare, mark = (part[1:-1], part[0]) if within else (part, "'")
        if bare.startswith("~"):
            home = os.path.expanduser(bare) if name in FROM_HOME else bare
            return f"{mark}{home}{mark}"
        return f"'{part}'" if is_text and _NUMBER.fullmatch(part) else part

    is_text = any(fnmatch.fnmatchcase(name, pattern) for pattern in TEXTS)
    parts = [value] if value[:1] in ("'", '"', "[", "{") else value.split(",")
    return f"{key}={','.join(map(quoted, parts))}"


def flags_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with -m in front: Hydra reads overrides on one side of a flag alone."""
    flags = ("-m", "--multirun")
    return sorted(arguments, key=lambda argument: argument not in flags)


def from_home(config: dict[str, Any]) -> dict[str, Any]:
    """The config itself, after setting its paths that begin with ~, in an overlay say, to those
    that they mean."""
    for key in set(FROM_HOME) & set(config):
        if isinstance(path := config[key], str):
            config[key] = os.path.expanduser(path)
    return config


def text_override(key: str, text: str) -> str:
    """The override that sets a key to this very text, whatever is in it."""
    from hydra.core.override_parser.types import Quote, QuotedString

    literal = text.replace("${", "\\${")
    return f"{key}={QuotedString(text=literal, quote=Quote.single).with_quotes()}"


def check_command_line(arguments: Sequence[str], conf: Path) -> list[str]:
    """The arguments for Hydra, checked against the configs in the folder `conf`; see
    `check_overrides`. What Hydra itself refuses is left to it."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    if any(argument in ("-sc", "--shell-completion") for argument in arguments):
        return [*arguments]
    arguments = [as_text(argument) for argument in arguments]
    groups = {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in conf.iterdir()
        if folder.is_dir()
    }

    def keys_of(choices: Sequence[str]) -> set[str]:
        with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
            config = compose("config", list(choices), return_hydra_config=True)
            ours = {key: value for key, value in config.items() if key != "hydra"}
            plugins = {"hydra": {name: dict.fromkeys(config.hydra[name]) for name in PLUGINS}}
            return {*dotted_keys(ours), *dotted_keys(plugins)}

    for group in (f"hydra/{name}" for name in PLUGINS):
        if any(argument.startswith(f"{group}=") for argument in arguments):
            with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
                groups[group] = GlobalHydra.instance().config_loader().get_group_options(group)
    try:
        checked = check_overrides(arguments, groups, keys_of)
    except HydraException:
        return [*arguments]
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if key.endswith("._target_") and not key.startswith("hydra."):
            _check_target(key, value, conf)
    return checked


def pairs_of(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """(key, value) of each override. Raises ValueError on a flag, or whatever is not key=value."""
    for argument in arguments:
        if "=" not in argument or argument.startswith("-"):
            raise ValueError(f"{argument!r} is not an override; write key=value.")
    return [(key, value) for key, _, value in (text.partition("=") for text in arguments)]


def refuse_several(arguments: Sequence[str], remedy: str) -> None:
    """Raise ValueError, with the `remedy`, for an override that gives several values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    for argument in arguments:
        try:
            several = OverridesParser.create().parse_override(argument).is_sweep_override()
        except HydraException:  # a flag, or what Hydra itself will refuse
            continue
        if several:
            raise ValueError(f"{argument} gives several values; {remedy}.")


def known_targets(key: str, conf: Path) -> set[str]:
    """The `_target_`s that files in the folder `conf` have at a dotted key, "variant.store"."""
    group, _, rest = f"{key}._target_".partition(".")
    files = [_content(file, file.stat().st_mtime_ns) for file in (conf / group).rglob("*.yaml")]
    return {target for file in files if isinstance(target := at(file, rest), str)}


@functools.cache
def _content(file: Path, changed_ns: int) -> Any:
    import yaml

    return yaml.safe_load(file.read_text())


def _check_target(key: str, value: str, conf: Path) -> None:
    """Raise ValueError for a `_target_` that no file in conf has at this key."""
    known = known_targets(key.removesuffix("._target_"), conf)
    for target in value.split(","):
        if target not in known:
            raise ValueError(
                f"{key} is {target!r}; a command line may choose what conf/"
                f"{key.partition('.')[0]} has: {', '.join(sorted(known))}."
                f"{did_you_mean(target, known)}"
            )


def check_overrides(
    arguments: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    keys_of: Callable[[Sequence[str]], set[str]],
) -> list[str]:
    """The arguments for Hydra, with ++ where a key may be new.

    Raises ValueError for an unknown group option or key, with the nearest match, for a key that
    one of several swept variants lacks, and for a secret.

    Args:
        arguments: of the command line; flags, and hydra.* but for the settings of launcher and
            sweeper are Hydra's own business.
        groups: config group -> its options.
        keys_of: group choices ("variant=dora") -> every dotted key of the composed config.
    """
    pairs, added = [], []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        key, _, value = argument.lstrip("+~").partition("=")
        refuse_secrets(key, value)
        if key.rpartition(".")[2] in BUILDING:
            raise ValueError(f"{key} is no setting: it says how conf/ is read; leave it out.")
        place, _, option = key.rpartition(".")
        if option in OPTIONS and place in ("variant", "variant.adapter"):
            raise ValueError(f"{key} is called {option}; write {option}={value}.")
        ours = not (is_open(key) or key.startswith(("hydra.", "hydra/")))
        if argument.startswith("+") and ours:
            added.append((key, argument.startswith("++")))
        if argument.startswith("~") and ours:
            raise ValueError(f"{argument} would take away what a run reads; set it instead.")
        flag = argument.removeprefix("--").partition("=")[0]
        if argument.startswith("--") and not any(known.startswith(flag) for known in FLAGS):
            raise ValueError(f"{argument} is no flag; a setting is written key=value.")
        if "=" in argument and re.match(r"[A-Za-z_]", argument):
            pairs.append(argument.split("=", 1))
        elif not argument.startswith(("-", "+", "~")) and not before.startswith("-"):
            raise ValueError(f"{argument!r} is not an override; write key=value.")
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
        key if plugin is None else plugin[0]
        for key, plugin in ((key, _PLUGIN_SETTING.match(key)) for key, _ in pairs)
        if plugin or not (key in groups or is_open(key) or key.startswith(("hydra.", "hydra/")))
    ]
    for_hydra = list(map(with_plus, arguments))
    if not (others or added):
        return for_hydra
    variants = choices.pop("variant", None) or [""]
    rest = [f"{key}={names[0]}" for key, names in choices.items() if names]
    known = {name: keys_of([*rest, *([f"variant={name}"] if name else [])]) for name in variants}
    everywhere = set().union(*known.values(), groups)
    for key in others:
        if key not in everywhere:
            raise ValueError(f"there is no key {key}.{_suggestion(key, everywhere)}")
        lacking = [name for name in variants if key not in known[name]]
        if lacking:
            raise ValueError(
                f"variant={lacking[0]} has no key {key}; sweep the variants that have it apart."
            )
    for key, replacing in added:
        if key in everywhere and not replacing:
            raise ValueError(f"there is a key {key} already; write it without +.")
        if key not in everywhere and key.partition(".")[0] not in groups:
            raise ValueError(f"there is no key {key}.{_suggestion(key, everywhere)}")
    return for_hydra


def _suggestion(key: str, known: Collection[str]) -> str:
    """The known keys that end alike, wherever they are; else the one most like it."""
    last = key.rpartition(".")[2]
    alike = sorted((name for name in known if name.rpartition(".")[2] == last), key=len)
    return f" Did you mean {' or '.join(alike[:3])}?" if alike else did_you_mean(key, known)


def _chosen(value: str, options: Sequence[str]) -> list[str]:
    """The options that an override's value names: a, or a,b or glob(pattern); [] if it is another
    expression of Hydra's."""
    if glob := re.fullmatch(r"glob\(([^(),=]+)\)", value):
        return fnmatch.filter(options, glob[1].strip("'\""))
    return value.split(",") if re.fullmatch(r"[\w,./-]+", value) else []
