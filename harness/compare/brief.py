"""The end of a multirun: a table for a terminal, and the command for the page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.compare import table
from harness.compare.analyse import analysed
from harness.compare.findings import Analysis, Arm
from harness.compare.load import load_study
from harness.compare.sentences import responses_text
from harness.compare.study import Study
from harness.compare.wandb_study import at_end, command
from harness.tasks.metrics import unit, with_unit


def conclude(folder: Path, name: str, tracking: Mapping[str, Any]) -> None:
    """The end of a multirun: its table, and its report in W&B or the command for it. A sentence
    instead where there is no table to make.

    Args:
        tracking: the settings of its runs.
    """
    try:
        study = load_study(folder, named=name, quick=True)
        print(f"\n{brief(study, folder, name)}")
    except (ValueError, OSError) as error:
        print(f"\nno table: {error}")
        return
    if len(study.runs) > 1:
        at_end(folder, tracking, lambda: analysed(load_study(folder, named=name)), named=name)


def brief(study: Study, folder: Path, name: str) -> str:
    """The table of a multirun in its folder, and the command for the page."""
    found = text(analysed(study))
    out = ["--multirun", name, "--out", f"results/{name}"]
    return f"{found}\npage: {command(folder, *out)}" if study.varied else found


def text(analysis: Analysis) -> str:
    """Arms with n, mean, interval and paired difference; then what was left out."""
    study, metric = analysis.study, analysis.study.metric
    comparisons = {comparison.arm: comparison for comparison in analysis.comparisons}
    versus = with_unit(f"minus {study.reference}, paired", unit(metric).of_difference)

    def row(arm: Arm) -> dict[str, str]:
        c = comparisons.get(arm.name)
        mean, _, bounds = table.score_interval(arm.score, metric).partition(" ")
        return {
            "arm": arm.name + table.marks(arm),
            "n": str(arm.score.n),
            table.test_of(metric): mean if arm.score.n else "failed",
            "95 % interval": bounds,
            versus: table.difference_interval(c.difference if c else None, metric),
        }

    found = table.without_empty(table.Table.of("", map(row, analysis.arms)))
    lines = table.aligned([found.columns, *found.rows], left=(0, 3))
    said = [*responses_text(study, analysis.responses), *study.notes]
    about = study.question if study.varied else ""
    return "\n".join([*([about, ""] if about else []), *lines, *([""] if said else []), *said])
