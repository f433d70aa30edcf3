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
    levels = dict.fromkeys((stats.ALPHA, stats.ALPHA / family))
    noise = "standard deviation of the paired differences"

    def row(c: Comparison) -> dict[str, str]:
        values = list(c.differences.values())
        sd = stats.standard_deviation(values)
        of_sd = Interval(sd, *stats.deviation_interval(values), len(values))
        return {
            "arm": c.arm,
            "n": str(c.difference.n),
            with_unit(noise, unit(metric).of_difference): table.score_interval(of_sd, metric),
            **{
                table.magnitude(d, metric): ", ".join(
                    str(stats.seeds_needed(d, sd, level)) for level in levels
                )
                for d in wanted
            },
        }

    in_family = f", and at 0.05 / {family} for the family of {family}" if family > 1 else ""
    return (
        f"# {study.name}: seeds that a difference from {study.reference} needs\n\n"
        + table.markdown_table(table.Table.of("", map(row, known)))
        + f"\nSeeds for 80 % power of the paired t test at alpha 0.05{in_family}. An "
        f"exact sign-flip p that Holm can pass needs {stats.fewest_seeds(family)} at least. "
        "Brackets: 95 % confidence interval of the standard deviation.\n"
    )
