"""A study as one HTML page.

Numbers come from the analysis and are formatted by harness.compare.table, so that page, table and
conclusions agree.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from harness.compare import stats, table
from harness.compare.findings import Analysis, Arm
from harness.compare.layout import by_section, render
from harness.compare.look import styles, swatch
from harness.compare.study import Run
from harness.compare.table import Table
from harness.tasks.metrics import title

COSTS_FROM = "trained"  # the first column of the main table that is a cost
SECTIONS = ("forest", "varied", "rate", "cost", "forgetting", "learning", "rank", "norm")


def page(analysis: Analysis, figures: Mapping[str, str]) -> str:
    """The page's text, the same for the same analysis.

    Args:
        figures: name -> SVG text, of plots.figures(analysis); those missing are left out.
    """
    study = analysis.study
    scores, costs = scores_and_costs(table.main_table(analysis))
    return render(
        Path(__file__).with_name("page.html.jinja"),
        study.name,
        study=study,
        certificate=analysis.certificate,
        conclusions=analysis.conclusions,
        warnings=analysis.warnings,
        metric=title(study.metric),
        facts=_facts(analysis),
        scores=scores,
        costs=costs,
        second=table.second_table(analysis),
        units=table.units(analysis),
        grid_table=table.grid_table(analysis),
        varied=list(study.varied_keys),
        forgetting=table.forgetting_table(analysis),
        tuning=_tuning(analysis),
        points=table.tuning_table(analysis),
        limits=list(limits(analysis)),
        family=len(study.primary),
        fewest_seeds=stats.fewest_seeds(len(study.primary)) if study.primary else None,
        figures=by_section(figures, SECTIONS),
        swatches=[Markup(swatch(styles(analysis)[arm.name])) for arm in analysis.arms],
        resampled=any(one.bootstrap is not None for one in analysis.comparisons),
        paired=any(one.difference.n > 1 for one in analysis.comparisons),
    )


def scores_and_costs(whole: Table) -> tuple[Table, Table]:
    """The main table in two: a page is narrower than a file."""
    cut = list(whole.columns).index(COSTS_FROM)
    costs = [[row[0].partition(" (")[0], *row[cut:]] for row in whole.rows]
    return (
        Table("Scores", whole.columns[:cut], [row[:cut] for row in whole.rows]),
        Table("Costs", [whole.columns[0], *whole.columns[cut:]], costs),
    )


def _tuning(analysis: Analysis) -> Table:
    """One line an arm: what was chosen, how, and from how many runs."""
    metric = analysis.study.metric

    def row(arm: Arm) -> dict[str, str]:
        of = arm.tuning
        return {
            "arm": arm.name,
            "chosen": table.setting(of.chosen) if of else "",
            "by": of.rule if of else "",
            "runs": str(sum(len(point.scores) for point in of.points)) if of else "",
            "diverged": str(sum(point.diverged for point in of.points)) if of else "",
            "grown by": str(of.grown) if of else "",
            "best minus runner-up": table.magnitude(of.gap, metric) if of else "",
            "good band": " to ".join(map(table.rate, of.band)) if of and of.band else "",
            "bracketed": ("yes" if of.bracketed else "no") if of else "",
        }

    tuned = any(arm.tuning for arm in analysis.arms)
    return Table.of("Chosen", map(row, analysis.arms if tuned else ()))


def _facts(analysis: Analysis) -> dict[str, str]:
    """The task, base and steps of the runs in the comparison."""

    def values(get: Callable[[Run], Any]) -> str:
        found = [get(run) for run in analysis.study.runs if run.phase == "compare"]
        return ", ".join(dict.fromkeys(str(value) for value in found if value is not None))

    return {
        "model": values(lambda run: run.result.get("base")),
        "task": values(lambda run: run.result.get("task")),
        "test items": values(lambda run: _items(run.result.get("test", {}))),
        "steps": values(lambda run: run.result.get("steps")),
        "seeds": str(len(analysis.study.seeds) or max(arm.score.n for arm in analysis.arms)),
    }


def _items(test: Mapping[str, Any]) -> Any:
    """The number of items, and of answered ones where answers are scored."""
    if (answered := test.get("generated")) is not None:
        return f"{answered} answered of {test['n']}"
    return test.get("n")


def limits(analysis: Analysis) -> Iterator[str]:
    """The conclusions that a reader might draw, and should not."""
    facts, study = _facts(analysis), analysis.study
    yield (
        f"Anything about another model than {facts['model']} or another task than "
        f"{facts['task']}, or after more steps than {facts['steps']}: an order may turn with "
        "longer training."
    )
    yield (
        "Anything about another sample of training data: a seed changes the initial adapters and "
        "head, the order of the data and dropout, not the rows."
    )
    hidden = [
        c.detectable
        for c in analysis.comparisons
        if c.detectable is not None and c.arm not in analysis.noise
    ]
    if hidden:
        smallest, largest = (table.magnitude(x, study.metric) for x in (min(hidden), max(hidden)))
        span = smallest if smallest == largest else f"{smallest} to {largest}"
        yield (
            f"Small differences: what these seeds show with 80 % power begins at {span}, depending "
            "on the comparison. An interval that holds 0 is no proof of equality."
        )
    if study.tune:
        yield (
            "The best that an arm can do: its setting is the best of one grid, by few seeds, with "
            "the same budget for all; what was not tuned may suit one arm better than another."
        )
    if open_ended := [arm.name for arm in analysis.arms if not arm.bracketed]:
        yield f"Anything about {', '.join(open_ended)}: not bracketed by the grid."
    if anchors := [c.arm for c in analysis.comparisons if not c.primary]:
        yield (
            f"A tested difference for {', '.join(anchors)}: shown beside the others for "
            "orientation, with intervals and without p."
        )
    yield (
        "Speed or memory on other hardware: times are medians on the machine named above, with "
        "whatever else ran on it."
    )
