"""The question of a comparison and the runs that answer it; study.yaml, written and read."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NotRequired

import yaml
from typing_extensions import TypedDict

from harness.disk.kinds import Count, Number
from harness.disk.read import check, read_yaml, schema_of
from harness.loop.result import Result
from harness.tasks.metrics import Metric, metrics_of
from harness.words import did_you_mean

Phase = Literal["tune", "compare"]


def is_rate(key: str) -> bool:
    """True if a tuned key is a learning rate."""
    return key.rpartition(".")[2] == "lr"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished run: a line of runs.jsonl, from which everything else is made.

    Args:
        arm: the name that a study gives to one way of fine-tuning.
        tuned: the values of the tuned keys, {"variant.lr": 0.002}.
        result, config, environment: the run folder's files.
        curve: rows of metrics.jsonl with train/loss_nats, eval/* and the means over layers of
            norm/A, norm/B, norm/relative, as far as a row has them; `step` in each.
        correct: per judged test item in the task's order, "1" or "0"; None if none was judged, the
            run failed or it never looked at test.
    """

    arm: str
    phase: Phase
    seed: int
    tuned: Mapping[str, Any]
    result: Result
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    curve: Sequence[Mapping[str, Any]]
    correct: str | None

    @property
    def complete(self) -> bool:
        return self.result["status"] == "complete"

    @property
    def diverged(self) -> bool:
        """True if its loss became infinite or NaN: an outcome, and scored by chance."""
        return self.result.get("failure") == "NonFiniteLoss"

    def score(self, metric: str, split: str = "test") -> float | None:
        """The score; that of chance if it diverged; None if it failed for another reason."""
        if self.complete:
            return float(self.result[split][metric])
        return metrics_of(self.result)[metric].chance if self.diverged else None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The choice of one arm's tuning.

    Args:
        chosen: tuned key -> value.
        rule: "quadratic" or "argmax".
        bracketed: False if the best point is still at an edge: no conclusion about this arm.
        grown: points added at an edge.
        gap: by how much the best point's mean score is better than the runner-up's.
    """

    chosen: Mapping[str, Any]
    rule: str
    bracketed: bool
    grown: int
    gap: float


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question, and every run that answers it.

    Args:
        arms: names in the order of the study, each with its overrides.
        reference: the arm that the others are compared with.
        reference_named: False if it was chosen when the runs were there: nothing is tested.
        primary: the arms of the Holm family; the rest are anchors, without p.
        metric: of result["test"] and result["validation"].
        match: rank, parameters or none.
        matched: with match=parameters, arm -> {rank, trainable, gap_frac}: the rank that was found
            for it, the parameters it then trains in adapters, and by what share that is below the
            reference's.
        tune: tuned key -> {"multipliers": [...]} or {"values": [...]}; empty without tuning.
        chosen: arm -> the fields of its `Choice` in the tuning phase;
            empty without tuning.
        expected: (arm, phase, seed, tuned) of every run that the study consists of; None for a
            plain multirun.
        varied: arm -> the values of the keys that were swept; empty where arms were named.
        notes: what was left out, as sentences.
    """

    name: str
    question: str
    command: str
    commit: str | None
    arms: Mapping[str, Sequence[str]]
    reference: str
    primary: Sequence[str]
    reference_named: bool = True
    metric: str = "accuracy"
    match: str = "none"
    matched: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    free: Sequence[str] = ()
    tune: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    tuning_seeds: Sequence[int] = ()
    seeds: Sequence[int] = ()
    chosen: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    expected: Sequence[Mapping[str, Any]] | None = None
    varied: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: Sequence[str] = field(default_factory=list)
    runs: Sequence[Run] = ()

    @property
    def varied_keys(self) -> list[str]:
        """The keys that were swept, as far as arms are told apart by them."""
        return list(dict.fromkeys(key for values in self.varied.values() for key in values))

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The metrics of the task, as its runs state them."""
        return metrics_of(self.runs[0].result)

    @property
    def higher_is_better(self) -> bool:
        return self.metrics[self.metric].higher_is_better

    @property
    def sign(self) -> int:
        """1 where a higher score is better, else -1."""
        return self.metrics[self.metric].sign

    def runs_of(self, arm: str, phase: str) -> list[Run]:
        return [run for run in self.runs if run.arm == arm and run.phase == phase]


# ---- study.yaml ----------------------------------------------------------------------------------

_STUDY_FIELDS = {field.name: field for field in dataclasses.fields(Study) if field.name != "runs"}


class _Expected(TypedDict):
    arm: str
    phase: Literal["tune", "compare"]
    seed: int
    tuned: dict[str, Any]
    run: str | None


class _Matched(TypedDict):
    rank: int
    trainable: int
    gap_frac: Number


_File = schema_of(
    Study,
    matched=NotRequired[dict[str, _Matched]],
    chosen=NotRequired[dict[str, schema_of(Choice, grown=Count, gap=Number)]],  # type: ignore[misc]
    expected=NotRequired[list[_Expected] | None],
    runs=NotRequired[Any],  # in files of their own
)


def study_text(study: Study) -> str:
    """study.yaml: everything about a study but its runs."""
    fields = json.loads(json.dumps({name: getattr(study, name) for name in _STUDY_FIELDS}))
    fields = {k: v for k, v in fields.items() if v or k not in ("varied", "notes")}
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=100)


def read_study(path: Path) -> Study:
    """Read study.yaml, a study without its runs. Raises ValueError if the file is not one."""
    fields = read_yaml(path, dict[str, Any])
    for name in fields:
        if name not in _STUDY_FIELDS:
            raise ValueError(
                f"{path} holds the unknown key {name}.{did_you_mean(name, _STUDY_FIELDS)}"
            )
    check(_File, fields, str(path))
    for run in (expected["run"] for expected in fields.get("expected") or ()):
        if run is not None and (Path(run).is_absolute() or ".." in Path(run).parts):
            raise ValueError(f"{path}: the run {run} is outside of the study's folder.")
    return Study(**fields)
