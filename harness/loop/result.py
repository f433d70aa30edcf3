"""The contents of the files of a run, as far as they are read, as schemas.

run.json            Marker         environment.json    Environment
result.json         Result         metrics.jsonl       Logged
predictions.jsonl   Prediction
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, Required

from typing_extensions import TypedDict

from harness.config.identity import run_key
from harness.disk.kinds import Count, Number, Share
from harness.disk.read import check, parse_json, read_json, shortened
from harness.tasks.metrics import metrics_of

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


class _Session(TypedDict):
    """A part of a run that another environment computed."""

    after_step: Count
    differs: NotRequired[list[str]]


class _Known(TypedDict, total=False):
    """Everything of a result that is read, where it is there."""

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
    overflowed_steps: Count
    loss_scale: Number
    adapter_bytes: Count
    merged_max_abs_diff: Number | None
    validation: Scores | None
    test: Scores | None
    sessions: list[_Session]


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


def read_row(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None if it is none, or not whole."""
    try:
        return check(Logged, parse_json(line, "a line"), "a line")
    except ValueError:
        return None


class Prediction(TypedDict):
    split: str
    correct: NotRequired[bool]


# ---- the result ---------------------------------------------------------------------------------


class Result(Mapping[str, Any]):
    """The result of one run, as result.json has it: checked once, and never changed.

    `from_json` is the only way to one.
    """

    def __init__(self, values: Mapping[str, Any]):
        self._values = dict(values)

    @classmethod
    def from_json(cls, values: Any, where: str) -> "Result":
        """The result of JSON values.

        Raises ValueError, beginning with `where`, unless they have all that train.py writes: of a
        complete run, a score of every metric that it states, in the range that the metric can have.
        """
        check(_Known, values, where)
        complete = values["status"] == "complete"
        check(_Complete if complete else _Failed, values, where)
        metrics = metrics_of(values) if complete else {}
        for split in ("validation", "test"):
            if (scores := values.get(split)) is None:
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
        return cls(values)

    @classmethod
    def read(cls, path: Path) -> "Result":
        """The result in a file. Raises ValueError, naming it and the key, if it is damaged."""
        return cls.from_json(read_json(path, dict[str, Any]), str(path))

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def check_same_run(self, config: Mapping[str, Any], where: str) -> None:
        """Raise ValueError, beginning with `where`, if it is not the result of this config."""
        ours = (run_key(config), config["seed"], config["variant"]["name"])
        if (self["run_key"], self["seed"], self["variant"]) != ours:
            raise ValueError(
                f"{where}: its result is not that of its config: run key, seed or variant differ."
            )

    def check_finite(self, split: str, metric: str, where: str) -> None:
        """Raise ValueError, beginning with `where`, if a complete run's score is no number."""
        value = self[split][metric]
        if value is None or not math.isfinite(value):
            raise ValueError(
                f"{where}: the {metric} of {self['variant']} seed {self['seed']} on {split} is not "
                "a finite number, so it cannot be compared; run it again."
            )
