"""The contents of the files of a run, as far as they are read, as schemas.

    run.json            Marker         environment.json    Environment
    result.json         Result         metrics.jsonl       Logged
    predictions.jsonl   Prediction     native.json         About

The functions below hold values of one file against each other.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Required

from pydantic import Field
from typing_extensions import TypedDict

from harness.config.identity import run_key
from harness.disk.read import check, read_json, shortened
from harness.tasks.metrics import metrics_of

Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


# ---- one run ------------------------------------------------------------------------------------


class Scores(TypedDict, total=False):
    """By metric; which ones, a result's own `metrics` say."""

    n: Count
    generated: Count


class _Named(TypedDict):
    name: str


class Config(TypedDict):
    """A resolved config; that of an adapter is held against more, see harness.config.settings."""

    free: list[str]
    seed: int
    variant: _Named
    train: NotRequired[dict[str, Any]]
    task: NotRequired[dict[str, Any]]
    model: NotRequired[dict[str, Any]]
    tracking: NotRequired[dict[str, Any] | None]


class Marked(TypedDict, total=False):
    """The part of run.json that says which run a folder is of."""

    run_key: str
    run_id: str
    fingerprints: dict[str, str]


class Marker(Marked):
    config: Config


class Environment(TypedDict, total=False):
    packages: dict[str, str]
    commit: str | None
    uncommitted_changes: bool | None


class _Fingerprint(TypedDict):
    before: str
    after: str


class _Metric(TypedDict):
    higher_is_better: bool
    chance: Number | None
    per_item: bool


class _Forgetting(TypedDict):
    loss_nats_before: Number | None
    loss_nats_after: Number | None
    kl_nats: Number | None


class Ranks(TypedDict):
    step: Count
    ranks: list[Count]


class Result(TypedDict, total=False):
    """A result as launchers know it: what is there is of its kind."""

    status: Required[Literal["complete", "failed"]]
    variant: str
    seed: int
    lr: Number
    run_key: str
    control_hash: str
    fingerprints: dict[str, str]
    steps: Count
    task: str
    base: str
    primary_metric: str
    metrics: dict[str, _Metric]
    classes: Count | None
    notes: list[str]
    failure: str
    reason: str
    effective_scale: Number | dict[str, Number] | None
    rank_history: list[Ranks]
    active_rank: dict[str, Count]
    base_fingerprint: _Fingerprint
    forgetting: _Forgetting
    skipped_steps: Count
    adapter_bytes: Count
    merged_max_abs_diff: Number | None
    validation: Scores | None
    test: Scores | None


class _Parameters(TypedDict):
    trainable: Count
    trainable_final: Count
    total: NotRequired[Count]


class _Time(TypedDict):
    train_s: Share | None
    step_median_s: Share | None
    tokens_per_s: Share | None


class _Memory(TypedDict):
    train_peak_bytes: Count | None
    base_bytes: Count
    estimated_peak_bytes: NotRequired[Count | None]


class _Data(TypedDict):
    data: str


class _Written(TypedDict):
    """The part of every result of train.py that reports are made of."""

    variant: str
    seed: int
    lr: Number
    run_key: str
    control_hash: str
    fingerprints: _Data


class _Failed(_Written):
    reason: str


class _Complete(_Written):
    """The same of a run that was trained to its end."""

    steps: Count
    parameters: _Parameters
    time: _Time
    memory: _Memory
    validation: Scores
    test: Scores | None


class Logged(TypedDict):
    step: Count


class Prediction(TypedDict):
    split: str
    correct: NotRequired[bool]


# ---- an adapter ---------------------------------------------------------------------------------


class _Training(TypedDict):
    compute_dtype: Literal["float32", "bfloat16"]
    device: str
    eval_batch_size: Positive
    threads: Annotated[int, Field(ge=1, le=1024)] | None  # a process may not have any number
    compile: bool


class _Texts(TypedDict, total=False):
    """A task's settings that are read without the task."""

    max_tokens: Positive | None
    max_new_tokens: Positive
    chat: bool | None
    prompt_template: str
    stop: list[str]


class Recorded(TypedDict):
    """The config in an adapter's file, but for the parts that `harness.config.build` builds and
    checks: model, variant and task."""

    seed: int
    targets: str | list[str]
    layers: str | list[int]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, Number]
    bias: str
    dropout: NotRequired[Number]
    train_modules: list[str]
    train: _Training
    task: NotRequired[_Texts]


class _Base(TypedDict):
    base: str
    tokenizer: str


class About(TypedDict):
    """native.json."""

    format: int
    base: str
    fingerprints: _Base
    labels: Annotated[list[str], Field(min_length=1)] | None
    config: Recorded
    tensors_sha256: str
    sha256: str


# ---- values against each other ------------------------------------------------------------------


def read_result(path: Path) -> dict[str, Any]:
    """A result.json. Raises ValueError, naming the file and the key, if it is none or damaged."""
    result = read_json(path, dict[str, Any])
    check(Result, result, str(path))
    check_scores(result, str(path))
    return result


def check_written(result: Mapping[str, Any], where: str) -> None:
    """Raise ValueError, beginning with `where`, unless a result has all that train.py writes."""
    check(Result, result, where)
    check(_Complete if result["status"] == "complete" else _Failed, result, where)
    check_scores(result, where)


def check_scores(result: Mapping[str, Any], where: str) -> None:
    """Raise ValueError, beginning with `where`, unless a complete result has a score of every
    metric that it states, in the range that the metric can have."""
    metrics = metrics_of(result) if result["status"] == "complete" else {}
    for split in ("validation", "test"):
        if (scores := result.get(split)) is None:
            continue
        for name, metric in metrics.items():
            if name not in scores:
                raise ValueError(f"{where} lacks {split}.{name}.")
            key, (least, most) = f"{where}: {split}.{name}", metric.bounds(name)
            score = check(Number | None, scores[name], key)
            if score is not None and not least <= score <= most:
                raise ValueError(
                    f"{key} is {shortened(score)}; it must be from {least:g} to {most:g}."
                )


def check_same_run(result: Mapping[str, Any], config: Mapping[str, Any], where: str) -> None:
    """Raise ValueError, beginning with `where`, if a result is not that of the config with it."""
    ours = (run_key(config), config["seed"], config["variant"]["name"])
    if (result["run_key"], result["seed"], result["variant"]) != ours:
        raise ValueError(
            f"{where}: its result is not that of its config: run key, seed or variant differ."
        )


def check_finite(result: Mapping[str, Any], split: str, metric: str, where: str) -> None:
    """Raise ValueError, beginning with `where`, if a complete result's score is no number."""
    value = result[split][metric]
    if value is None or not math.isfinite(value):
        raise ValueError(
            f"{where}: the {metric} of {result['variant']} seed {result['seed']} on {split} is not "
            "a finite number, so it cannot be compared; run it again."
        )
