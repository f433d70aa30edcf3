"""Numbers as a reader wants them, and the tables: one line an arm, a tuning point, a run.

Fractions are printed in percent and their differences in points of percent, losses in nats; see
harness/tasks/metrics.py. The CSV has the plain numbers instead.
"""

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.compare import swept
from harness.compare.arms import short
from harness.compare.findings import Analysis, Arm, Comparison, Costs, Interval
from harness.compare.study import Run
from harness.tasks.metrics import title, unit, with_unit
from harness.words import count, size

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Table:
    """A title, the names of the columns, and rows of cells, all printable."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    @classmethod
    def of(cls, title: str, rows: Iterable[Mapping[str, str]]) -> "Table":
        """The table of rows that are mappings, column -> cell, all with the same columns."""
        found = list(rows)
        return cls(title, list(found[0]) if found else [], [list(row.values()) for row in found])


# ---- numbers ------------------------------------------------------------------------------------


def score(value: float | None, metric: str) -> str:
    """82.34 % or 0.3883 nats."""
    return "" if value is None else f"{plain_score(value, metric)} {unit(metric).name}".rstrip()


def plain_score(value: float, metric: str) -> str:
    """The same without its unit."""
    of = unit(metric)
    return f"{of.factor * value:.{of.digits}f}"


def difference(value: float, metric: str) -> str:
    """+0.45 (points) or -0.0032 (nats), with a sign unless it rounds to 0."""
    of = unit(metric)
    text = f"{of.factor * value:+.{of.digits}f}"
    return text.replace("-", MINUS) if float(text) else text[1:]


def magnitude(value: float | None, metric: str) -> str:
    """0.45 points or 0.0032 nats: of a difference, without its sign."""
    if value is None:
        return ""
    return f"{plain_score(abs(value), metric)} {unit(metric).of_difference}".rstrip()


def at_most(value: float, metric: str) -> str:
    """The same rounded up, for a bound."""
    steps = unit(metric).factor * 10 ** unit(metric).digits
    return magnitude(math.ceil(round(steps * abs(value), 6)) / steps, metric)


def score_interval(interval: Interval | None, metric: str) -> str:
    """82.34 [81.90, 82.78]"""
    if interval is None:
        return ""
    text = plain_score(interval.estimate, metric)
    if interval.bounds is None:
        return text
    bounds = ", ".join(plain_score(bound, metric) for bound in interval.bounds)
    return f"{text} [{bounds}]".replace("-", MINUS)


def difference_interval(interval: Interval | None, metric: str) -> str:
    """+0.45 [-0.10, +1.00]"""
    if interval is None:
        return ""
    return f"{difference(interval.estimate, metric)} {bounds(interval, metric)}".rstrip()


def bounds(interval: Interval | None, metric: str) -> str:
    """[-0.10, +1.00] of a difference; nothing without bounds."""
    if interval is None or interval.bounds is None:
        return ""
    return f"[{', '.join(difference(bound, metric) for bound in interval.bounds)}]"


def known(value: float | None, show: Callable[[float], str]) -> str:
    """Nothing for None."""
    return "" if value is None else show(value)


def p_value(value: float | None) -> str:
    return known(value, lambda p: f"{p:.2g}" if p < 0.1 else f"{p:.2f}")


def rate(value: float | None) -> str:
    return known(value, "{:.3g}".format)


def scale(value: float | str | None) -> str:
    return value if isinstance(value, str) else known(value, "{:g}".format)


def setting(values: Mapping[str, Any]) -> str:
    """variant.lr=0.002"""
    short = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in values.values())
    return " ".join(f"{key}={value}" for key, value in zip(values, short, strict=True))


def seconds(value: float | None) -> str:
    return known(value, lambda s: f"{1000 * s:.0f} ms" if s < 1 else f"{s:.2f} s")


# ---- tables -------------------------------------------------------------------------------------


def main_table(analysis: Analysis) -> Table:
    """One line an arm, in the order of the study."""
    study, metric = analysis.study, analysis.study.metric
    comparisons = {comparison.arm: comparison for comparison in analysis.comparisons}
    family = len(study.primary)
    versus = with_unit(f"minus {study.reference}", unit(metric).of_difference)

    def row(arm: Arm, c: Comparison | None, costs: Costs) -> dict[str, str]:
        together = c.simultaneous if c and family > 1 else None
        return {
            "arm": arm.name + marks(arm),
            test_of(metric): score_interval(arm.score, metric) if arm.score.n else "failed",
            "n": str(arm.score.n),
            versus: difference_interval(c.difference if c else None, metric),
            f"all {family} at once": difference_interval(together, metric),
            "p": p_value(c.p if c else None),
            "p (Holm)": p_value(c.p_holm if c else None),
            "s": scale(arm.scale),
            "rate": rate(arm.rate),
            "trained": known(costs.trainable, count),
            "in use at the end": known(costs.trainable_final, count),
            "adapter": known(costs.adapter_bytes, size),
            "base": known(costs.base_bytes, size),
            "step": seconds(costs.step_s),
            "peak": known(costs.peak_bytes, size),
            "tokens/s": known(costs.tokens_per_s, "{:.0f}".format),
        }

    rows = (row(arm, comparisons.get(arm.name), arm.costs) for arm in analysis.arms)
    return without_empty(Table.of("Scores and costs", rows))


def test_of(metric: str) -> str:
    """test accuracy (%)"""
    return with_unit(f"test {title(metric)}", unit(metric).name)


def marks(arm: Arm) -> str:
    marks = [f"{arm.diverged} diverged"] if arm.diverged else []
    marks += [f"{arm.failed} failed"] if arm.failed else []
    marks += ["not bracketed"] if arm.tuning and not arm.tuning.bracketed else []
    return f" ({', '.join(marks)})" if marks else ""


def second_table(analysis: Analysis) -> Table:
    """The second view: other metrics, the bootstrap, what could have been seen."""
    metric = analysis.study.metric
    comparisons = {comparison.arm: comparison for comparison in analysis.comparisons}
    others = [name for name in analysis.study.metrics if name != metric]

    def row(arm: Arm, c: Comparison | None) -> dict[str, str]:
        scores = {f"test {title(m)}": score_interval(arm.metrics.get(m), m) for m in others}
        return {
            "arm": arm.name,
            **scores,
            "bootstrap over seeds and items": difference_interval(
                c.bootstrap if c else None, metric
            ),
            "smallest difference that could be seen": magnitude(
                c.detectable if c else None, metric
            ),
            "pair correlation": _correlation(c.correlation if c else None),
            "validation at equal time": score_interval(arm.equal_time, metric),
        }

    rows = (row(arm, comparisons.get(arm.name)) for arm in analysis.arms)
    return without_empty(Table.of("Second views", rows))


def _correlation(value: float | None) -> str:
    return known(value, "{:+.2f}".format).replace("-", MINUS)


def grid_table(analysis: Analysis) -> Table:
    """The scores of two swept keys: a line for each value of the first, a column for each of the
    second."""
    found, metric = swept.grid(analysis.study), analysis.study.metric
    if found is None:
        return Table("Grid", [], [])
    down, across, at = found
    first, second = analysis.study.varied_keys
    scores = {arm.name: score_interval(arm.score, metric) for arm in analysis.arms if arm.score.n}
    rows = [
        [short(row), *(scores.get(at.get((short(row), short(cell)), ""), "") for cell in across)]
        for row in down
    ]
    return Table("Grid", [first, *(f"{second}={short(cell)}" for cell in across)], rows)


def units(analysis: Analysis) -> str:
    """Accuracy and macro F1 in %, loss in nats"""
    named: dict[str, list[str]] = {}
    for metric in analysis.study.metrics:
        if unit(metric).name:
            named.setdefault(unit(metric).name, []).append(title(metric))
    text = ", ".join(
        f"{' and '.join(names)} in {name}" for name, names in sorted(named.items())
    )  # "%" sorts before letters
    return text[:1].upper() + text[1:]


def forgetting_table(analysis: Analysis) -> Table:
    """Learning against forgetting, one line an arm that measured it."""
    metric = analysis.study.metric
    rows = (
        {
            "arm": arm.name,
            test_of(metric): score_interval(arm.score, metric),
            "held-out loss, after minus before (nats)": difference_interval(
                arm.forgetting["loss_nats"], "loss_nats"
            ),
            "KL from the base (nats)": score_interval(arm.forgetting["kl_nats"], "kl_nats"),
            "n": str(arm.forgetting["kl_nats"].n),
        }
        for arm in analysis.arms
        if arm.forgetting
    )
    return Table.of("Learning and forgetting", rows)


def tuning_table(analysis: Analysis) -> Table:
    """One line a tuned point: its mean score on validation over the tuning seeds."""
    metric, rows = analysis.study.metric, []
    for arm in analysis.arms:
        for point in arm.tuning.points if arm.tuning else ():
            assert arm.tuning is not None
            rows.append(
                [
                    arm.name,
                    setting(point.tuned),
                    plain_score(point.mean, metric),
                    str(len(point.scores)),
                    str(point.diverged or ""),
                    arm.tuning.rule if dict(point.tuned) == dict(arm.tuning.chosen) else "",
                ]
            )
        if arm.tuning and all(p.tuned != arm.tuning.chosen for p in arm.tuning.points):
            name, chosen = arm.name, setting(arm.tuning.chosen)
            rows.append([name, chosen, "", "", "", f"{arm.tuning.rule}, between points"])
    columns = ["arm", "tuned", f"validation {title(metric)}", "n", "diverged", "chosen by"]
    return Table("Tuning", columns, rows)


def run_table(analysis: Analysis) -> Table:
    """One line a run, failed ones included."""
    metric, name = analysis.study.metric, title(analysis.study.metric)

    def row(run: Run) -> dict[str, str]:
        result, done, tested = run.result, run.complete, run.complete and run.phase == "compare"
        return {
            "arm": run.arm,
            "phase": run.phase,
            "seed": str(run.seed),
            "rate": rate(result["lr"]),
            "status": "complete" if done else "diverged" if run.diverged else "failed",
            f"validation {name}": plain_score(result["validation"][metric], metric) if done else "",
            f"test {name}": plain_score(result["test"][metric], metric) if tested else "",
            "run key": str(result["run_key"])[:8],
        }

    return Table.of("Runs", map(row, analysis.study.runs))


def tables(analysis: Analysis) -> list[Table]:
    """The tables that have a row."""
    made = (main_table, grid_table, second_table, forgetting_table, tuning_table, run_table)
    return [table for make in made if (table := make(analysis)).rows]


def without_empty(table: Table) -> Table:
    """The table without columns that say nothing, such as p where nothing is compared."""
    kept = [i for i, name in enumerate(table.columns)
            if name == "trained" or any(row[i] for row in table.rows)]  # fmt: skip
    rows = [[row[i] for i in kept] for row in table.rows]
    return Table(table.title, [table.columns[i] for i in kept], rows)


def aligned(lines: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Lines of cells for a terminal, each column as wide as its widest cell.

    Args:
        left: the columns that begin at the left; the others, of numbers, end at the right.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if at in left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


# ---- text ---------------------------------------------------------------------------------------


def markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    return line(table.columns) + "|" + "---|" * len(table.columns) + "\n" + "".join(
        line(row) for row in table.rows
    )  # fmt: skip


def markdown(analysis: Analysis) -> str:
    """table.md: question, conclusions, warnings, every table."""
    return _text(analysis, tables(analysis))


def summary(analysis: Analysis) -> str:
    """The same with the main table alone, for a terminal."""
    return _text(analysis, tables(analysis)[:1])


def _text(analysis: Analysis, shown: Sequence[Table]) -> str:
    study = analysis.study
    parts = [f"# {study.name}\n", *([study.question + "\n"] if study.question else [])]
    for heading, sentences in (
        ("Conclusions", analysis.conclusions),
        ("To be kept in mind", analysis.warnings),
    ):
        if sentences:
            parts.append(f"## {heading}\n")
            parts.append("".join(f"- {sentence}\n" for sentence in sentences))
    for table in shown:
        parts += [f"## {table.title}\n", markdown_table(table)]
    if any(arm.score.n > 1 for arm in analysis.arms):
        parts.append("Brackets: 95 % confidence interval over n seeds; differences are paired.\n")
    return "\n".join(parts)


def pooled_text(
    analyses: Sequence[Analysis], effects: Mapping[str, Interval], left_out: Mapping[str, str]
) -> str:
    """Effects over several studies as Markdown, labelled as being about these alone.

    Args:
        left_out: arm -> why it has no effect.
    """
    first = analyses[0].study
    name = f"minus {first.reference}, test {title(first.metric)}"
    column = with_unit(name, unit(first.metric).of_difference)
    rows = [[arm, difference_interval(effect, first.metric), str(effect.n)]
            for arm, effect in effects.items()]  # fmt: skip
    names = ", ".join(analysis.study.name for analysis in analyses)
    return (
        f"# Over {len(analyses)} studies: for these tasks only\n\n"
        + markdown_table(Table("", ["arm", column, "n"], rows))
        + f"\nPer seed the mean over {names} of the paired difference; brackets: 95 % confidence "
        "interval over n seeds. It says nothing about other tasks or models.\n"
        + "".join(f"\n{arm} is left out: {why}.\n" for arm, why in left_out.items())
    )


def csv_text(analysis: Analysis) -> str:
    """table.csv: the main table as plain numbers (fractions, nats, bytes, seconds)."""
    comparisons = {comparison.arm: comparison for comparison in analysis.comparisons}
    rows = []
    for arm in analysis.arms:
        c = comparisons.get(arm.name)
        row: dict[str, Any] = {"arm": arm.name, "metric": analysis.study.metric, "n": arm.score.n}
        versus = ("difference", "simultaneous", "bootstrap")
        intervals = {"score": arm.score, **{name: getattr(c, name, None) for name in versus}}
        for name, interval in {**intervals, "equal_time": arm.equal_time}.items():
            seen = interval if interval and interval.n else None
            for end, suffix in (("estimate", ""), ("low", "_low"), ("high", "_high")):
                row[name + suffix] = getattr(seen, end, None)
        row |= {key: getattr(c, key, None) for key in ("p", "p_holm", "detectable", "correlation")}
        row |= {key: getattr(arm, key) for key in ("scale", "rate", "diverged", "failed")}
        row["bracketed"] = arm.tuning.bracketed if arm.tuning else None
        rows.append(row | dataclasses.asdict(arm.costs))
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _inert(cell) for name, cell in row.items()} for row in rows)
    return file.getvalue()


def _inert(cell: Any) -> Any:
    """A cell as a spreadsheet shows it: a text that it would take for a formula is quoted."""
    if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{cell}"
    return "" if cell is None else cell
