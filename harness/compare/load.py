"""Read finished runs, and refuse to put side by side what was not held alike."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.control import held_config


@dataclass(frozen=True)
class Run:
    """One run's folder: its result.json and its resolved config."""

    path: Path
    result: Mapping[str, Any]
    config: Mapping[str, Any]


def load_runs(folder: Path) -> list[Run]:
    """Every run below `folder` that has a result, by variant and seed.

    Raises ValueError if there is none, or if complete runs differ in what must be held constant.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}.")
    runs = []
    for path in sorted(folder.rglob("result.json")):
        marker = path.with_name("run.json")
        if not marker.is_file():
            raise ValueError(f"{path} was not written by train.py: run.json is missing beside it.")
        config = json.loads(marker.read_text())["config"]
        runs.append(Run(path.parent, json.loads(path.read_text()), config))
    if not runs:
        raise ValueError(f"{folder} holds no finished run.")
    check_held(runs)
    return sorted(runs, key=lambda run: (run.result["variant"], run.result["seed"]))


def check_held(runs: Sequence[Run]) -> None:
    """Raise ValueError if control hashes differ, naming the keys that do."""
    if len({run.result["control_hash"] for run in runs}) == 1:
        return
    first = runs[0]
    other = next(r for r in runs if r.result["control_hash"] != first.result["control_hash"])

    def flat(run: Run) -> dict[str, Any]:
        found = {"fingerprints": run.result.get("fingerprints"), **held_config(run.config)}
        return dict(_leaves(found))

    ours, theirs = flat(first), flat(other)
    differing = [
        f"{key}: {ours.get(key)!r} and {theirs.get(key)!r}"
        for key in sorted({*ours, *theirs})
        if ours.get(key) != theirs.get(key)
    ]
    raise ValueError(
        f"{first.path.name} and {other.path.name} were not held alike and do not belong in one "
        f"table; {'; '.join(differing) or 'their software wrote different hashes'}."
    )


def _leaves(node: Any, prefix: str = ""):
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node
