"""The number of seeds that a difference needs at the noise of a study."""

from harness.compare import stats, table
from harness.compare.findings import Analysis, Comparison, Interval
from harness.tasks.metrics import unit, with_unit

FRACTIONS = (0.0025, 0.005, 0.01, 0.02)
OTHERS = (0.005, 0.01, 0.02, 0.05)  # nats


def text(analysis: Analysis, difference: float | None = None) -> str:
    """A table: arm, standard deviation of its paired differences, seeds per difference.

    Args:
        difference: in the metric's unit; None for a few of them.

    Raises ValueError if no arm has two different differences from the reference, or for a
    difference out of range.
    """
    study, metric = analysis.study, analysis.study.metric
    fraction = unit(metric).name == "%"
    if difference is not None and not (difference > 0 and (difference < 1 or not fraction)):
        allowed = "between 0 and 1 (0.01 is one point)" if fraction else "above 0"
        raise ValueError(f"--difference is {difference:g}; it must be {allowed}.")
    known = [c for c in analysis.comparisons if c.detectable is not None]
    if not known:
        raise ValueError(
            f"{study.name} has no arm whose differences from {study.reference} vary over two "
            "seeds or more, so its noise is not known."
        )
    wanted = (difference,) if difference else FRACTIONS if fraction else OTHERS
    family = max(1, len(study.primary))
    noise = "standard deviation of the paired differences"
    columns = ["arm", "n", with_unit(noise, unit(metric).of_difference),
               *(table.magnitude(d, metric) for d in wanted)]  # fmt: skip
    rows = [[c.arm, str(c.difference.n), _noise(c, metric), *(_seeds(c, d, family) for d in wanted)]
            for c in known]  # fmt: skip
    return (
        f"# {study.name}: seeds that a difference from {study.reference} needs\n\n"
        + table.markdown_table(table.Table("", columns, rows))
        + f"\nSeeds for 80 % power of the paired t test at alpha 0.05{_in_family(family)}. An "
        f"exact sign-flip p that Holm can pass needs {stats.fewest_seeds(family)} at least. "
        "Brackets: 95 % confidence interval of the standard deviation.\n"
    )


def _in_family(family: int) -> str:
    return f", and at 0.05 / {family} for the family of {family}" if family > 1 else ""


def _noise(c: Comparison, metric: str) -> str:
    values = list(c.differences.values())
    low, high = stats.deviation_interval(values)
    sd = Interval(stats.standard_deviation(values), low, high, len(values))
    return table.score_interval(sd, metric)


def _seeds(c: Comparison, difference: float, family: int) -> str:
    sd = stats.standard_deviation(list(c.differences.values()))
    alone = stats.seeds_needed(difference, sd)
    together = stats.seeds_needed(difference, sd, stats.ALPHA / family)
    return f"{alone}" if family == 1 else f"{alone}, {together}"
