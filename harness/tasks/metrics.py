"""Metrics: what a result says of those that its task has, and how they are written.

A result states for each metric which direction is better and what guessing scores, so that who
compares runs need not know the task. How a number is written goes by the metric's name: `*_nats` is
in nats, perplexity has no unit, and all else is a fraction, printed in percent, with differences in
points of percent.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Metric:
    """The facts about a metric that need no run.

    Args:
        higher_is_better: or lower.
        chance: the score of guessing, which is also a diverged run's.
        per_item: it is the mean of `correct` over the predictions that have it.
    """

    higher_is_better: bool
    chance: float
    per_item: bool = False

    @property
    def sign(self) -> int:
        """1 where higher is better, else -1: the sign of a better score's difference."""
        return 1 if self.higher_is_better else -1

    def bounds(self, name: str) -> tuple[float, float]:
        """The least and the largest score that the metric of this name can have: a perplexity is 1
        or more, a share of what is right at most 1; errors and losses have no upper bound."""
        share = unit(name).name == "%" and self.higher_is_better
        return (1.0 if name == "perplexity" else 0.0), (1.0 if share else math.inf)


class Unit(NamedTuple):
    """The form in which scores and their differences are written."""

    name: str
    of_difference: str
    factor: float
    digits: int


def classification(classes: int | None) -> dict[str, Metric]:
    """The metrics of a classifier: guessing is uniform over the classes."""
    share, nats = (1 / classes, math.log(classes)) if classes else (math.nan, math.nan)
    return {
        "accuracy": Metric(higher_is_better=True, chance=share, per_item=True),
        "macro_f1": Metric(higher_is_better=True, chance=share),
        "loss_nats": Metric(higher_is_better=False, chance=nats),
    }


def language_modelling(vocabulary: int | None) -> dict[str, Metric]:
    """The metrics of every language model: guessing is uniform over the vocabulary; while that is
    not known (None), its scores are NaN."""
    size = math.nan if vocabulary is None else float(vocabulary)
    return {
        "loss_nats": Metric(higher_is_better=False, chance=math.log(size)),
        "perplexity": Metric(higher_is_better=False, chance=size),
    }


def metrics_of(result: Mapping[str, Any]) -> dict[str, Metric]:
    """The metrics of a run; a result that does not say them was written when all tasks were
    classification."""
    stated = result.get("metrics")
    if stated is None:
        return classification(result.get("classes"))
    return {name: Metric(**fields) for name, fields in stated.items()}


def unit(metric: str) -> Unit:
    if metric.endswith("_nats"):
        return Unit("nats", "nats", 1.0, 4)
    return Unit("", "", 1.0, 2) if metric == "perplexity" else Unit("%", "points", 100.0, 2)


def title(metric: str) -> str:
    """macro F1, loss, phoneme error rate"""
    spelled = {"macro_f1": "macro F1"}
    return spelled.get(metric, metric.removesuffix("_nats").replace("_", " "))


def with_unit(text: str, unit_name: str) -> str:
    """accuracy (%), loss (nats), perplexity"""
    return f"{text} ({unit_name})" if unit_name else text
