"""The layout of a run in Weights & Biases: which rows, config keys and summary its own tables,
grouping and charts are made from.

`arm`, `study`, `seed` and `tuned_lr` are flat config keys, so that "group by arm" and parallel
coordinates need no search; scores and costs are flat summary keys (`test/accuracy`,
`time/train_s`); a value that each layer has is charted as its mean over the layers. All of it is in
the run's folder unchanged.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from harness.config.identity import Identity
from harness.disk.digest import digest
from harness.tasks.metrics import metrics_of

SIZES = ("n", "generated")  # of a split: the same in every row, so no chart
# Of a result: in the config, by layer, or of no use in a table of runs.
_NOT_SUMMARY = (
    "variant", "seed", "lr", "steps", "task", "primary_metric", "metrics", "classes", "rows",
    "base", "notes", "run_key", "control_hash", "environment_hash", "fingerprints",
    "base_fingerprint", "active_rank", "rank_history", "generation",
)  # fmt: skip


def config_of(config: Mapping[str, Any], *, study: str, arm: str, **about: Any) -> dict[str, Any]:
    """The resolved config, `about`, and the flat keys of a comparison."""
    flat = {"study": study, "arm": arm, "tuned_lr": config["variant"]["lr"]}
    return {**config, **about, **flat}


def training(
    config: Mapping[str, Any],
    identity: Identity,
    environment: Mapping[str, Any],
    study: str,
    tags: Sequence[str],
) -> dict[str, Any]:
    """The arguments of `NoTracker.open` that say which run of train.py it is."""
    about = {"control_hash": identity.control_hash, "run_key": identity.run_key}
    arm = config["variant"]["name"]
    seen = config_of(config, study=study, arm=arm, environment=environment, **about)
    return {"group": study, "job_type": "train", "tags": tags, "config": seen}


def row_of(logged: Mapping[str, Any]) -> dict[str, Any]:
    """A row of metrics.jsonl for charts: norm/B/<layer> of all layers becomes their mean."""
    row: dict[str, Any] = {}
    by_layer: dict[str, list[float]] = defaultdict(list)
    for key, value in logged.items():
        name, layer = _split(key)
        if value is None or name.rpartition("/")[2] in SIZES:
            continue
        if layer:
            by_layer[name].append(value)
        else:
            row[key] = value
    return row | {name: statistics.fmean(values) for name, values in by_layer.items()}


def layers_of(
    logged: Mapping[str, Any] | None, active_rank: Mapping[str, int]
) -> list[dict[str, Any]]:
    """The layers as rows of a table: path, rank in use and the values that the last row of
    metrics.jsonl has of each; none if it has no such value."""
    layers: dict[str, dict[str, Any]] = {}
    for key, value in (logged or {}).items():
        name, layer = _split(key)
        if layer:
            ranked = {"layer": layer, "rank": active_rank.get(layer)}
            layers.setdefault(layer, ranked)[name] = value
    return list(layers.values())


def summary_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result's numbers as flat keys (test/accuracy), its status, and `result_sha256`, by which
    the run is known wherever its result is kept."""
    summary: dict[str, Any] = {}
    for key, value in result.items():
        if key in _NOT_SUMMARY or value is None:
            continue
        if isinstance(value, Mapping):
            numbers = {name: v for name, v in value.items() if isinstance(v, int | float)}
            summary |= {f"{key}/{name}": v for name, v in numbers.items()}
        elif isinstance(value, int | float | str):
            summary[key] = value
    if ranks := list((result.get("active_rank") or {}).values()):
        summary["rank/final"] = statistics.fmean(ranks)
    return summary | {"result_sha256": digest(result)}


def score_keys(result: Mapping[str, Any], split: str) -> list[str]:
    """The summary keys of a split's scores, the primary metric first."""
    metrics = list(metrics_of(result))
    primary = result.get("primary_metric", metrics[0])
    return [f"{split}/{name}" for name in sorted(metrics, key=lambda name: name != primary)]


def _split(key: str) -> tuple[str, str]:
    """(norm/B, path) of norm/B/path; the layer is empty in other keys."""
    first, _, rest = key.partition("/")
    second, _, layer = rest.partition("/")
    return (f"{first}/{second}" if rest else first), layer
