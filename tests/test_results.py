"""The reports of results/ are made again from their runs, to the bit."""

import html
import re
from pathlib import Path

import pytest

from harness.compare import table
from harness.compare.analyse import analysed
from harness.compare.load import load_study
from harness.compare.report import files
from harness.compare.rows import row
from harness.compare.study import read_study, study_text

RESULTS = Path(__file__).parent.parent / "results"
STUDIES = sorted(path.parent for path in RESULTS.glob("*/page.html"))


@pytest.mark.parametrize("folder", STUDIES, ids=lambda path: path.name)
def test_its_readme_begins_with_its_command(folder):
    """Word for word, as the study records it."""
    block = re.search(r"```\n(.*?)\n```", (folder / "README.md").read_text(encoding="utf-8"), re.S)
    command = read_study(folder / "study.yaml").command
    assert block and block[1] == (command or block[1])  # one of 2026-11-21 was not recorded


@pytest.mark.parametrize("folder", STUDIES, ids=lambda path: path.name)
def test_its_readme_shows_its_figures(folder):
    """One to three of its own, each with its title for those who do not see it."""
    shown = re.findall(r"!\[(.*?)\]\((.*?)\)", (folder / "README.md").read_text(encoding="utf-8"))
    assert 1 <= len(shown) <= 3
    for title, name in shown:
        assert name.startswith("figures/")
        written = re.search(r"<title.*?>(.*?)</title>", (folder / name).read_text(encoding="utf-8"))
        assert written and html.unescape(written[1]) == title, name


@pytest.mark.parametrize("folder", STUDIES, ids=lambda path: path.name)
def test_a_published_table_is_made_again(folder):
    analysis = analysed(load_study(folder))
    made = {
        "runs.jsonl": "".join(row(run) + "\n" for run in analysis.study.runs),
        "study.yaml": study_text(analysis.study),
        "table.md": table.markdown(analysis),
        "table.csv": table.csv_text(analysis),
    }
    for name, text in made.items():
        assert text == (folder / name).read_text(encoding="utf-8"), name


# Together they have every kind of figure; the others are drawn under `slow`.
DRAWN = ("2026-11-22_variants_g2p", "2026-11-30_variant_rank")


@pytest.mark.parametrize(
    "folder",
    [
        pytest.param(folder, marks=[] if folder.name in DRAWN else pytest.mark.slow)
        for folder in STUDIES
    ],
    ids=lambda path: path.name,
)
def test_a_published_page_is_made_again(folder):
    made = files(analysed(load_study(folder)))
    made.pop("report_spec.json", None)  # wandb-workspaces is another version elsewhere
    generator = next(line for line in made["page.html"].splitlines() if "generator" in line)
    if generator in (folder / "page.html").read_text(encoding="utf-8"):  # the same matplotlib
        for name, text in made.items():
            assert text == (folder / name).read_text(encoding="utf-8"), name
