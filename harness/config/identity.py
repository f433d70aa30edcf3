"""Identifies runs, and those that may be compared. No torch: sweeps import this.

The run key identifies a run, the control hash a comparison.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness.disk.digest import digest

# Keys that cannot change a result.
_IRRELEVANT = ("tracking", "outputs_dir", "run_dir", "force", "dry_run", "rate_test", "free",
               "strategy", "partial", "train.log_every", "train.checkpoint_every",
               "train.keep_checkpoints", "train.resume")  # fmt: skip
# Keys that may differ between the runs of one comparison: its subject, names of files whose
# contents are fingerprinted, and what is looked at when training has ended.
_FREE = ("variant", "seed", "task.files", "model.name", "model.revision", "init_from",
         "train.evaluate_test")  # fmt: skip

# Keys that came later, and the value that stands for what was done before: a run keeps its key.
_YOUNGER: Mapping[str, Any] = {"init_from": None, "train.on_nonfinite": "stop", "model.sizes": None,
            "model.new_tokens": [], "task.date": "2024-07-26", "task.control_tokens": "text",
            "model.revision": None, "model.attention": None,
            "schedule.warmup_steps": None, "groups.module_factors": {},
            "variant.groups.module_factors": {}}  # fmt: skip
# Modules whose contents a config names in `_target_`, and the first name of each: a run keeps its
# key, and what was recorded under that name is still built.
_MOVED = {"harness.loop.schedule": "harness.schedule", "harness.loop.paged": "harness.paged"}


# Of an adapter: each has one name, at the top, to which a variant's config refers.
OPTIONS = ("rank", "alpha", "dropout", "bias")


def without(config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """A copy of a nested mapping without the dotted `keys`."""
    copy = json.loads(json.dumps(config))
    for key in keys:
        *parents, last = key.split(".")
        node = copy
        for parent in parents:
            node = node.get(parent, {})
        node.pop(last, None)
    return copy


def changed(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested mapping with other values of some dotted keys."""
    copy = json.loads(json.dumps(config))
    for key, value in values.items():
        parent, _, last = key.rpartition(".")
        (at(copy, parent) if parent else copy)[last] = value
    return copy


def at(config: Any, key: str) -> Any:
    """The value of a dotted key of a nested mapping; {} where there is none."""
    for part in key.split("."):
        config = config.get(part, {}) if isinstance(config, Mapping) else {}
    return config


def has(config: Mapping[str, Any], key: str) -> bool:
    """Tell whether a nested mapping has a dotted key."""
    parent, _, last = key.rpartition(".")
    node = at(config, parent) if parent else config
    return isinstance(node, Mapping) and last in node


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a nested mapping."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def irrelevant_removed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved config without what cannot change a run's result, its `_target_`s under their
    first names."""
    rest = _renamed(without(config, _IRRELEVANT))
    younger = (key for key, value in _YOUNGER.items() if has(rest, key) and at(rest, key) == value)
    return without(rest, younger)


def _renamed(node: Any) -> Any:
    """A nested value with each `_target_` under the name that it had first."""
    if isinstance(node, list):
        return [_renamed(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    copy = {key: _renamed(value) for key, value in node.items()}
    if isinstance(target := copy.get("_target_"), str):
        module, _, name = target.rpartition(".")
        copy["_target_"] = f"{_MOVED.get(module, module)}.{name}"
    return copy


def present_name(target: Any) -> Any:
    """The name that a recorded `_target_` has now; anything else as it is."""
    module, _, name = target.rpartition(".") if isinstance(target, str) else ("", "", "")
    now = next((new for new, first in _MOVED.items() if first == module), None)
    return target if now is None else f"{now}.{name}"


def is_irrelevant(key: str) -> bool:
    """Tell whether a dotted key, or the group that it belongs to, cannot change a result."""
    return f"{key}.".startswith(tuple(f"{name}." for name in _IRRELEVANT))


def check_swept(keys: Iterable[str]) -> None:
    """Raise ValueError for a swept key that changes no result: its runs would all be one."""
    if key := next(filter(is_irrelevant, keys), None):
        raise ValueError(
            f"{key} is swept, and changes no result: all its runs are the same. Give it one value."
        )


def run_key(config: Mapping[str, Any]) -> str:
    """Identifies a run: the resolved config without what cannot change its result, and what its
    settings mean by now."""
    return digest({**irrelevant_removed(config), **_meaning(config)})


def _meaning(config: Mapping[str, Any]) -> dict[str, str]:
    """The meanings of settings that meant another thing once: runs of then have another key, so
    that nothing continues them and no table holds them. The others keep theirs."""
    several = at(config, "train.accumulation") not in (1, {})  # a mean of microsteps' means once
    half = at(config, "model.dtype") == "float16"  # its gradients were lost below 6e-8 once
    chats = at(config, "task.chat") not in (False, {})  # turns were tokenised one by one once
    return {
        **({"loss": "the mean over the step"} if several else {}),
        **({"gradient": "of the scaled loss"} if half else {}),
        **({"turns": "the whole conversation's tokens"} if chats else {}),
    }


def run_name(config: Mapping[str, Any]) -> str:
    """The folder of a run, from its resolved config, threads and device included. Raises ValueError
    if the variant has a name that no folder may have."""
    name = config["variant"]["name"]
    if not re.fullmatch(r"\w[\w.+-]*", str(name)):
        raise ValueError(
            f"variant.name is {name!r}; it names folders: letters, digits and any of _ . + - alone."
        )
    return f"{name}-s{config['seed']}-{run_key(config)[:8]}"


def held_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The run key's config without the free variables: what one comparison holds constant."""
    return without(irrelevant_removed(config), [*_FREE, *config.get("free", [])])


def control_hash(config: Mapping[str, Any], fingerprints: Mapping[str, str]) -> str:
    """Identifies a comparison: the held config and the sha256 of data, base and tokenizer. Runs
    with different hashes do not belong in one table."""
    return digest({"config": held_config(config), "fingerprints": dict(fingerprints)})


@dataclass(frozen=True)
class Identity:
    """Says which run this is and with which others it may be compared.

    Args:
        name: see `run_name`.
        run_key: see the function.
        fingerprints: of data, base, tokenizer, the base's function and the adapter it starts from.
        control_hash: see the function.
        definition: of the base's function, of which one fingerprint is a digest.
    """

    name: str
    run_key: str
    fingerprints: dict[str, str]
    control_hash: str
    definition: Mapping[str, Any]

    @property
    def run(self) -> dict[str, Any]:
        """The part that a checkpoint shares with its run."""
        return {"run_key": self.run_key, "fingerprints": self.fingerprints}


def identify(
    config: Mapping[str, Any], fingerprints: Mapping[str, str], definition: Mapping[str, Any]
) -> Identity:
    """The identity of a run with this config, on what has these fingerprints."""
    prints = dict(fingerprints)
    return Identity(
        run_name(config), run_key(config), prints, control_hash(config, prints), definition
    )


def check_free(config: Mapping[str, Any]) -> None:
    """Raise ValueError unless every key that an experiment declares free exists."""
    for key in config["free"]:
        if not has(config, key):
            raise ValueError(f"free names the key {key}, which does not exist.")


def ignored_options(overridden: Iterable[str], variant: Mapping[str, Any]) -> None:
    """Raise ValueError if an adapter option was set that the chosen variant never reads.

    Args:
        overridden: keys that the user set.
        variant: its config before interpolation.
    """
    if key := ignored_option(overridden, variant):
        raise ValueError(f"{key} is set, but variant {variant['name']!r} ignores it; leave it out.")


def ignored_option(overridden: Iterable[str], variant: Mapping[str, Any]) -> str | None:
    """The first of the keys that is an adapter option which the variant never reads."""
    unread = unread_options(variant)
    return next((key for key in overridden if key in unread), None)


def unread_options(variant: Mapping[str, Any]) -> list[str]:
    """The adapter options that no value of a variant's config, before interpolation, refers to."""
    read = [value for _, value in leaves(variant)]
    return [key for key in OPTIONS if f"${{{key}}}" not in read]
