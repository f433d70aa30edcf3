"""The arms of a multirun: what was varied between its runs, and what each combination is called.

What a multirun swept is known from its record (compare/multirun.py); of runs without one it is
found from the keys in which they differ.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from harness.compare.study import Run
from harness.config.identity import held_config, leaves

MOST = 2  # axes that are found without being named
GROUPS = ("model", "task", "optimizer", "schedule")  # many keys of one choice


def name_of(values: Mapping[str, Any]) -> str:
    """{"variant": "dora", "rank": 16} -> "dora rank=16"."""
    return " ".join(
        str(value) if key == "variant" else f"{key}={short(value)}" for key, value in values.items()
    )


def short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value).replace(" ", "")


def natural(name: str) -> list[tuple[int, float, str]]:
    """Sorts rank=4 before rank=16."""
    parts = re.split(r"((?<=[=\s])-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)", name)
    return [
        (0, float(part), "") if index % 2 else (1, 0.0, part) for index, part in enumerate(parts)
    ]


def excused(keys: Iterable[str]) -> set[str]:
    """The fingerprints that may differ where these keys are varied."""
    groups = {key.partition(".")[0] for key in keys}
    base = {"base", "tokenizer", "function"} if "model" in groups else set()
    init_from = {"init_from"} & groups
    return base | init_from | ({"data"} if "task" in groups else set())


# ---- found from the runs -------------------------------------------------------------------------


def values_of(runs: Sequence[Run], free: Sequence[str]) -> list[dict[str, Any]]:
    """The values of what differs, for each run: the variant, the free keys, then keys of the
    variant that still differ under one such name.

    Args:
        free: keys, or groups of them, that the runs may differ in.
    """
    configs = [run.config for run in runs]
    found: list[dict[str, Any]] = [{} for _ in configs]
    if len({config["variant"]["name"] for config in configs}) > 1:
        found = [{"variant": config["variant"]["name"]} for config in configs]
    groups = [key for key in free if key in GROUPS]
    plain = sorted({*free} - {"seed", *groups})
    chosen = [dict(_below(config, plain)) for config in configs]
    for group in groups:
        for run, values in zip(runs, chosen, strict=True):
            values[group] = _choice(run, group)
    _add(found, chosen)
    own = [dict(leaves(config["variant"], "variant")) for config in configs]
    alike: dict[str, list[int]] = {}
    for index, values in enumerate(found):
        alike.setdefault(name_of(values), []).append(index)
    for same in alike.values():
        _add([found[index] for index in same], [own[index] for index in same])
    return found


def _add(found: Sequence[dict[str, Any]], settings: Sequence[Mapping[str, Any]]) -> None:
    """Give each of `found` the settings that are not the same in all."""
    keys = list(dict.fromkeys(key for setting in settings for key in setting))
    for key in keys:
        if len({json.dumps(setting.get(key)) for setting in settings}) > 1:
            for values, setting in zip(found, settings, strict=True):
                if key in setting:
                    values[key] = setting[key]


def _below(config: Mapping[str, Any], keys: Iterable[str]) -> Iterator[tuple[str, Any]]:
    flat = dict(leaves(config))
    for key in keys:
        yield from (
            (name, value)
            for name, value in flat.items()
            if (name == key or name.startswith(key + ".")) and not name.startswith("variant.")
        )


def _choice(run: Run, group: str) -> str:
    """A readable name for the choice of a group that a run was made with."""
    if group == "model":
        return str(run.result.get("base"))
    return str(run.config[group].get("_target_", run.config[group])).rpartition(".")[2]


def found_varied(runs: Sequence[Run], free: Sequence[str]) -> list[str] | None:
    """The held keys, or groups of keys, that runs without a record differ in, if they look like a
    multirun: at most MOST of them (keys that change together are one), and every combination of
    their values, and of the variants, is there. None if they do not; [] if nothing differs.
    """
    flat = [dict(leaves(held_config({**run.config, "free": list(free)}))) for run in runs]
    axes: dict[str, list[str]] = {}  # the runs' values, numbered as they come -> keys
    for key in dict.fromkeys(key for one in flat for key in one):
        texts = [json.dumps(one.get(key)) for one in flat]
        numbers = {text: n for n, text in enumerate(dict.fromkeys(texts))}
        if len(numbers) > 1:
            axes.setdefault(json.dumps([numbers[text] for text in texts]), []).append(key)
    if len(axes) > MOST:
        return None
    places = [json.loads(axis) for axis in axes]
    variants = [run.config["variant"]["name"] for run in runs]
    columns = [*places, variants]
    seen = set(zip(*columns, strict=True))
    if axes and len(seen) < len(set(itertools.product(*map(set, columns)))):
        return None
    keys: list[str] = []
    for axis in axes.values():
        (group, *others) = {key.partition(".")[0] for key in axis}
        keys += [group] if len(axis) > 1 and not others and group in GROUPS else axis
    return keys


def differing(runs: Sequence[Run], free: Sequence[str]) -> dict[str, list[str]]:
    """The held keys that runs differ in, the one with most values first, each with its values."""
    found: dict[str, list[str]] = {}
    for run in runs:
        for key, value in leaves(held_config({**run.config, "free": list(free)})):
            if (text := short(value)) not in found.setdefault(key, []):
                found[key].append(text)
    several = {key: texts for key, texts in found.items() if len(texts) > 1}
    order = sorted(several, key=lambda key: (-len(several[key]), key.startswith("task"), key))
    return {key: sorted(several[key], key=lambda text: natural(f"={text}")) for key in order}


def as_text(value: Any) -> str:
    """A value as text in an override."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
