"""An inspection as one HTML page, with a study page's look."""

from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup, escape

from harness.compare.layout import by_section, render
from harness.compare.table import Table
from harness.inspect import report as said
from harness.inspect.report import Report

SECTIONS = {
    "spectrum": "Singular values",
    "rank": "Ranks",
    "size": "Size",
    "amplification": "Amplification",
    "direction": "Magnitude and direction",
    "intruders": "Intruder dimensions",
    "similarity": "Similarity of subspaces",
}


def page(report: Report, figures: Mapping[str, str]) -> str:
    """The page's text, the same for the same report.

    Args:
        figures: name -> SVG text, of plots.figures(report).
    """
    return render(
        Path(__file__).with_name("page.html.jinja"),
        ", ".join(run.name for run in report.runs),
        report=report,
        sections=SECTIONS,
        figures=by_section(figures, SECTIONS),
        runs=said.runs_table(report),
        kinds=[_kinds(said.kinds_table(report, run)) for run in report.runs],
        layers=[_breakable(said.layers_table(report, run)) for run in report.runs],
        similarity=said.pairs_table(report),
        facts=_facts(report),
    )


def _kinds(table: Table) -> Table:
    """The table with short names; the last line is of all layers."""
    *names, all_layers = (row[0] for row in table.rows)
    rows = [[name, *row[1:]] for name, row in
            zip([*said.short_kinds(names), all_layers], table.rows, strict=True)]  # fmt: skip
    return _breakable(Table(table.title, table.columns, rows))


def _breakable(table: Table) -> Table:
    """The table with names that a telephone may break after their dots."""
    rows = [[escape(row[0]).replace(".", Markup(".<wbr>")), *row[1:]] for row in table.rows]
    return Table(table.title, table.columns, rows)


def _facts(report: Report) -> Table:
    """The facts that identify these adapters."""
    rows = (
        {
            "run": run.name,
            "variant": run.variant,
            "seed": "?" if run.seed is None else str(run.seed),
            "base": run.base,
            "sha256": run.sha256[:16],
        }
        for run in report.runs
    )
    return Table.of("Adapters", rows)
