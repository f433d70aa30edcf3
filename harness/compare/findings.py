"""The conclusions of a comparison: intervals, arms, differences, and what was held."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.compare.study import Choice, Study


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval over n units; bounds are None where the spread is
    not known, as below n = 2."""

    estimate: float
    low: float | None
    high: float | None
    n: int

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Low and high; None without them."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def holds_zero(self) -> bool:
        return self.bounds is not None and self.bounds[0] <= 0 <= self.bounds[1]


@dataclass(frozen=True, kw_only=True)
class TuningPoint:
    """One cell of the tuning grid. `scores` holds the validation score by seed, a diverged run's
    being that of chance."""

    tuned: Mapping[str, Any]
    scores: Sequence[float]
    diverged: int

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.scores)


@dataclass(frozen=True, kw_only=True)
class Tuning(Choice):
    """The search for an arm's rate, and what it chose: phase 2 ran with these values.

    Args:
        points: in order of the first tuned key's value.
        band: lowest and highest rate whose mean score is within 1 % of the best (linear
            interpolation in log rate between points), None if nothing was tuned over a rate.
    """

    points: Sequence[TuningPoint]
    band: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Medians over an arm's runs; bytes, seconds. None where it was not measured."""

    trainable: float | None
    trainable_final: float | None
    adapter_bytes: float | None
    base_bytes: float | None
    step_s: float | None
    peak_bytes: float | None
    tokens_per_s: float | None
    train_s: float | None


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm's outcome on test.

    Args:
        scores: seed -> test score; a diverged run's is that of chance.
        equal_time: mean score at the training time of the fastest of reference and primary arms,
            from the validation curves; None where they do not reach it.
        failed: runs that failed for another reason than divergence: excluded, and counted.
        forgetting: loss_nats, the increase of the loss on a held-out text, and kl_nats, the KL from
            the base on it; empty where no run measured it.
        scale: the effective scale s; None if there is none; "by layer" if layers differ.
    """

    name: str
    score: Interval
    metrics: Mapping[str, Interval]
    scores: Mapping[int, float]
    equal_time: Interval | None
    forgetting: Mapping[str, Interval]
    diverged: int
    failed: int
    scale: float | str | None
    rate: float | None
    costs: Costs
    tuning: Tuning | None

    @property
    def bracketed(self) -> bool:
        """True if its best setting is inside its grid; True if nothing was tuned."""
        return self.tuning is None or self.tuning.bracketed


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm minus the reference, paired by seed.

    Args:
        difference: mean with paired t interval; positive means a higher metric. Without bounds
            if all are equal.
        simultaneous: the interval that holds for all primary comparisons at once; None for an
            anchor.
        p, p_holm: exact sign-flip test; None for an anchor, or with too few seeds for the family.
        bootstrap: seeds x items, None without per-item predictions.
        detectable: the smallest difference that n seeds show with 80 % power at alpha 0.05, from
            the standard deviation seen; None where that is 0 or not known.
        correlation: of the two arms' scores over seeds; None where it is not defined.
    """

    arm: str
    reference: str
    primary: bool
    difference: Interval
    simultaneous: Interval | None
    p: float | None
    p_holm: float | None
    bootstrap: Interval | None
    detectable: float | None
    correlation: float | None
    differences: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class Response:
    """The score over the values of one swept number, all else equal.

    Args:
        others: the values of the other swept keys, the same in all arms.
        arms: in the order of `values`, which rise.
        best: place of the best mean, the lowest of equal ones.
        behind: for each place its score minus the best one's, paired by seed, with the interval
            that holds for all of them at once; None for the best itself and without a common seed.
        smallest: place of the smallest value whose score cannot be told from the best one's: its
            interval holds 0, or its spread is not known. None below 2 common seeds.
    """

    key: str
    others: Mapping[str, Any]
    values: Sequence[float]
    arms: Sequence[str]
    best: int
    behind: Sequence[Interval | None]
    smallest: int | None


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The keys held, free and tuned, and the environment of the runs. Values are printable."""

    held: Mapping[str, Any]
    free: Mapping[str, str]
    tuned: Sequence[str]
    fingerprints: Mapping[str, str]
    base_unchanged: bool
    software: Mapping[str, str]
    hardware: Mapping[str, str]
    runs: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Everything that the table, the page and the report say.

    Args:
        noise: arms that are the reference again, to show the noise (A/A).
        responses: of each swept number, one for each combination of the other swept keys.
    """

    study: Study
    arms: Sequence[Arm]
    comparisons: Sequence[Comparison]
    certificate: Certificate
    noise: Sequence[str]
    conclusions: Sequence[str]
    warnings: Sequence[str]
    responses: Sequence[Response] = ()
