"""An inspection as one HTML file with a study page's look: no network, no script."""

import html
import re
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from harness import compare
from harness.compare.curves import _short as short_names
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


class Figure(NamedTuple):
    """An inline SVG and its caption."""

    svg: Markup
    caption: str


def page(report: Report, figures: dict[str, str]) -> str:
    """The page's text, the same for the same report.

    Args:
        figures: name -> SVG text, of plots.figures(report).
    """
    macros, style = _look()
    templates = jinja2.ChoiceLoader(
        [jinja2.DictLoader({"macros": macros}), jinja2.FileSystemLoader(Path(__file__).parent)]
    )
    environment = jinja2.Environment(
        loader=templates,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found: dict[str, list[Figure]] = {section: [] for section in SECTIONS}
    for name, svg in figures.items():
        caption = re.search(r"<desc>(.*?)</desc>", svg, re.DOTALL)
        text = html.unescape(caption[1]) if caption else ""
        found[name.partition("_")[0]].append(Figure(Markup(svg), text))
    return environment.get_template("page.html.jinja").render(
        report=report,
        title=", ".join(run.name for run in report.runs),
        style=Markup(style),
        sections=SECTIONS,
        figures=found,
        runs=said.runs_table(report),
        kinds=[_short_names(said.kinds_table(report, run)) for run in report.runs],
        layers=[said.layers_table(report, run) for run in report.runs],
        similarity=said.pairs_table(report),
        facts=_facts(report),
    )


def _look() -> tuple[str, str]:
    """Macros and style sheet of a study's page, cut out of its template."""
    source = (Path(compare.__file__).parent / "page.html.jinja").read_text(encoding="utf-8")
    macros, _, rest = source.partition("<!DOCTYPE html>")
    return macros, rest.partition("<style>")[2].partition("</style>")[0]


def _short_names(table: Table) -> Table:
    """Each line's name as short as it can be told apart, for a telephone."""
    names = short_names([row[0] for row in table.rows])
    rows = [[name, *row[1:]] for name, row in zip(names, table.rows, strict=True)]
    return Table(table.title, table.columns, rows)


def _facts(report: Report) -> Table:
    """Which adapters these are."""
    rows = [
        [run.name, run.variant, str(run.seed), run.base, run.sha256[:16]] for run in report.runs
    ]
    return Table("Adapters", ["run", "variant", "seed", "base", "sha256"], rows)
