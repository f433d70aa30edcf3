"""The page of a study: what it holds, read by a parser; how it looks, asked of a real browser."""

import dataclasses
import re
from collections import Counter
from html.parser import HTMLParser
from xml.etree import ElementTree

import chromium
import matplotlib
import numpy as np
import pytest
from made_study import made_study

from harness.compare.analyse import analyse
from harness.compare.findings import Analysis
from harness.compare.look import (
    COLORS,
    INK,
    MARKERS,
    Drawing,
    Style,
    label_ends,
    shortened,
    styles,
    swatch,
)
from harness.compare.look import axes as empty_axes
from harness.compare.look import svg as svg_of
from harness.compare.page import page
from harness.compare.plots import figures
from harness.compare.study import Run, Study

SECTIONS = ["found", "scores", "differences", "warnings", "tuning", "costs", "learning", "ranks",
            "norms", "certificate", "second", "limits", "made"]  # fmt: skip
NAMES = {"dora": "<b>dora & $co$</b>", "qlora": "an_arm_of_a_name_that_goes_on_and_on"}


def analysed(study: Study) -> Analysis:
    return analyse(study, np.random.default_rng(0))


def renamed(study: Study, names: dict[str, str]) -> Study:
    def new(name: str) -> str:
        return names.get(name, name)

    return dataclasses.replace(
        study,
        arms={new(name): overrides for name, overrides in study.arms.items()},
        reference=new(study.reference),
        primary=[new(name) for name in study.primary],
        chosen={new(name): choice for name, choice in study.chosen.items()},
        runs=[dataclasses.replace(run, arm=new(run.arm)) for run in study.runs],
        expected=None,
    )


class Page(HTMLParser):
    """A page that is read: tags with their attributes, and text by the section that it is in."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr", "wbr"})

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.section, self.text = "", Counter()
        self.headers: list[str] = []
        self.said: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "section":
            self.section = dict(attributes)["id"]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "th":
            self.headers.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> where another was open"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.said[self.section] = self.said.get(self.section, "") + data
        if "th" in self.open:
            self.headers[-1] = (self.headers[-1] + data).strip()

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in tags]


@pytest.fixture(scope="module")
def made() -> tuple[Analysis, dict[str, str], str]:
    """One study with everything in it, names that want escaping included."""
    analysis = analysed(renamed(made_study(seeds=8, items=60), NAMES))
    drawn = figures(analysis)
    return analysis, drawn, page(analysis, drawn)


@pytest.fixture(scope="module")
def small() -> tuple[Analysis, dict[str, str]]:
    """Two arms, scored by their loss."""
    study = made_study(arms=("lora", "dora"), anchors=(), seeds=3, items=20)
    analysis = analysed(dataclasses.replace(study, metric="loss_nats"))
    return analysis, figures(analysis)


# ---- figures -------------------------------------------------------------------------------------


def test_every_figure_that_has_data_is_drawn(made):
    analysis, drawn, _ = made
    kinds = Counter(re.sub(r"_\d+_.*", "", name) for name in drawn)
    assert kinds == {
        "forest": 1, "rate": len(analysis.arms), "cost_parameters": 1, "cost_time": 1,
        "cost_memory": 1, "learning_validation": 1, "learning_train": 1, "rank_trajectory": 1,
        "ranks": 1, "norm_A": 1, "norm_B": 1, "norm_relative": 1,
    }  # fmt: skip


def test_a_figure_is_a_file_of_its_own(made):
    for name, text in made[1].items():
        root = ElementTree.fromstring(text)
        title, caption = (
            root.find(f"{{http://www.w3.org/2000/svg}}{t}") for t in ("title", "desc")
        )
        assert title is not None and title.text
        assert caption is not None and re.search(r"\bn = \d", caption.text or ""), name
        assert INK not in text and "DejaVu" not in text
        assert not re.findall(r'(?:href|src)="(?!#)', text), name


def test_figures_are_the_same_bytes_whatever_is_set(small, monkeypatch):
    analysis, drawn = small
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "12345")
    theirs = {"font.size": 30, "xtick.major.size": 9, "axes.facecolor": "red", "svg.hashsalt": "x"}
    with matplotlib.rc_context(theirs):
        assert figures(analysis) == drawn


def test_the_forest_prints_the_numbers_that_it_draws(made):
    analysis, drawn, _ = made
    text = "".join(ElementTree.fromstring(drawn["forest"]).itertext())
    for one in analysis.comparisons:
        assert shortened(one.arm) in text
        d = one.difference
        printed = [f"{100 * value:+.2f}".replace("-", "\N{MINUS SIGN}")
                   for value in (d.estimate, d.low, d.high)]  # fmt: skip
        assert f"{printed[0]} [{printed[1]}, {printed[2]}], n = {d.n}" in text


def test_a_rate_curve_prints_its_band(made):
    analysis, drawn, _ = made
    for arm in analysis.arms:
        (text,) = (
            svg for svg in drawn.values() if f"of {arm_text(arm.name)} over its tuned" in svg
        )
        low, high = arm.tuning.band
        assert f"good from {low:.3g} to {high:.3g}: {np.log10(high / low):.1f} decades" in text
        assert ("not bracketed" in text) is not arm.tuning.bracketed


def arm_text(name: str) -> str:
    return name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def test_an_arm_has_one_look_everywhere(made):
    analysis, drawn, text = made
    look = styles(analysis)
    assert look[analysis.study.reference] == (INK, "o")
    assert len(set(look.values())) == len(analysis.arms)
    for name in ("forest", "cost_time", "learning_validation"):
        for arm in analysis.arms:
            if arm.name != analysis.study.reference:
                assert look[arm.name].color in drawn[name]
    assert all(text.count(swatch(style)) == 4 for style in look.values())  # tables


def test_the_cycles_of_colours_and_markers_are_prime_to_each_other():
    assert np.gcd(len(COLORS), len(MARKERS)) == 1


def test_labels_at_ends_keep_apart_and_in_order():
    _, ax = empty_axes(3.0)
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ends = zip("abcde", [1.0] * 5, [0.99, 0.98, 0.985, 0.0, 0.01], strict=True)
    label_ends(ax, ends, dict.fromkeys("abcde", Style(INK, "o")))
    heights = {text.get_text(): text.get_position()[1] for text in ax.texts}
    assert sorted(heights, key=heights.__getitem__) == ["d", "e", "b", "c", "a"]
    assert min(np.diff(sorted(heights.values()))) > 0.07
    assert min(heights.values()) >= 0 and max(heights.values()) <= 1


def undocumented(run: Run) -> Run:
    """A run whose norms and ranks nobody wrote down."""
    result = {k: v for k, v in run.result.items() if k not in ("active_rank", "rank_history")}
    curve = [{"step": row["step"], "train/loss_nats": float("nan")} for row in run.curve]
    return dataclasses.replace(run, result=result, curve=curve)


def test_labels_at_ends_are_level_with_their_lines_on_logarithmic_axes():
    _, ax = empty_axes(3.0)
    ax.set(xscale="log", yscale="log", xlim=(1, 100), ylim=(1e-4, 1.0))
    label_ends(ax, [("a", 100, 1e-1), ("b", 10, 1e-3)], dict.fromkeys("ab", Style(INK, "o")))
    assert {text.get_text(): text.get_position()[1] for text in ax.texts} == pytest.approx(
        {"a": 0.75, "b": 0.25}
    )
    assert [line.get_xdata()[0] for line in ax.lines[::2]] == pytest.approx([0.5, 1.0])


def test_what_was_not_drawn_leaves_no_group_behind():
    figure, ax = empty_axes(3.0)
    ax.plot([], [])
    ax.plot([1, 2], [1, 2])
    text = svg_of(Drawing("name", "title", "caption", figure))
    assert not re.findall(r"<g[^>]*/>", text)
    assert Counter(re.findall(r' id="([^"]*)"', text)).most_common(1)[0][1] == 1
    ElementTree.fromstring(text)


def test_a_figure_without_data_is_left_out():
    bare = made_study(arms=("lora", "dora"), anchors=(), seeds=1, tuning_seeds=0, items=20,
                      diverged=False)  # fmt: skip
    bare = dataclasses.replace(bare, runs=[undocumented(run) for run in bare.runs])
    analysis = analysed(bare)
    drawn = figures(analysis)
    assert list(drawn) == ["forest", "cost_parameters", "cost_time", "cost_memory"]
    parsed = Page(page(analysis, drawn))
    left_out = {"tuning", "learning", "ranks", "norms"}
    assert [s["id"] for s in parsed.all("section")] == [s for s in SECTIONS if s not in left_out]
    assert len(parsed.all("figure")) == 4


def test_one_arm_with_one_seed_is_a_page_too():
    lonely = analysed(made_study(arms=("lora",), seeds=1, tuning_seeds=0, items=20, diverged=False))
    text = page(lonely, figures(lonely))
    assert "needs two seeds of two arms" in Page(text).said["found"]


def test_a_loss_is_better_to_the_left(small):
    _, drawn = small
    assert "left is better" in drawn["forest"] and "nats" in drawn["forest"]
    assert "validation loss (nats)" in drawn["learning_validation"]


# ---- the page ------------------------------------------------------------------------------------


def test_sections_come_in_their_order(made):
    parsed = Page(made[2])
    assert [section["id"] for section in parsed.all("section")] == SECTIONS
    linked = [link["href"] for link in parsed.all("a")]
    assert linked == [f"#{section}" for section in SECTIONS]


def test_all_figures_are_in_once(made):
    _, drawn, text = made
    parsed = Page(text)
    assert len(parsed.all("figure")) == len(parsed.all("figcaption")) == len(drawn)
    for svg in drawn.values():
        assert text.count(svg) == 1
    ids = Counter(attributes["id"] for _, attributes in parsed.tags if attributes.get("id"))
    assert not [name for name, count in ids.items() if count > 1]


def test_every_arm_is_in_every_table(made):
    analysis, _, text = made
    headers = Counter(Page(text).headers)
    for arm in analysis.arms:
        assert sum(count for name, count in headers.items() if arm.name in name) >= 4


def test_conclusions_warnings_and_estimand_are_there_whole(made):
    analysis, _, text = made
    said = {section: " ".join(words.split()) for section, words in Page(text).said.items()}
    assert all(" ".join(sentence.split()) in said["found"] for sentence in analysis.conclusions)
    assert all(" ".join(sentence.split()) in said["warnings"] for sentence in analysis.warnings)
    assert (
        "mean test accuracy over seeds, on this split, at these rates, after this many steps, on "
        "this model" in said["found"]
    )
    assert analysis.study.command in said["made"]
    assert all(key in said["certificate"] for key in analysis.certificate.held)


def test_what_seeds_can_show_is_said_without_the_noise_and_the_unknown(small):
    """An arm that is the reference again, or whose differences are all equal, would begin at 0."""
    analysis, _ = small
    (one,) = analysis.comparisons
    again = dataclasses.replace(one, arm="again", detectable=1e-5)
    equal = dataclasses.replace(one, arm="equal", detectable=None)
    with_noise = dataclasses.replace(analysis, comparisons=[one, again, equal], noise=["again"])
    said = " ".join(Page(page(with_noise, {})).said["limits"].split())
    assert f"with 80 % power begins at {one.detectable:.4f} nats, depending" in said


def test_the_bootstrap_is_explained_where_there_is_one(made, small):
    assert "bootstrap" in Page(made[2]).said["second"]
    assert "bootstrap" not in Page(page(small[0], {})).said["second"]


def test_nothing_is_loaded_and_nothing_runs(made):
    parsed = Page(made[2])
    assert not parsed.all("script", "link", "iframe", "object", "embed", "img")
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}>"
            if name in ("src", "href", "xlink:href", "action"):
                assert value and value.startswith("#")
    assert "@import" not in made[2] and not re.findall(r"url\((?!#)", made[2])


def test_names_are_text(made):
    assert not Page(made[2]).all("b")
    assert "<b>" not in made[2]
    assert "&lt;b&gt;dora &amp; $co$&lt;/b&gt;" in made[2]


def test_tables_are_told_to_those_who_cannot_see_them(made):
    parsed = Page(made[2])
    assert {header["scope"] for header in parsed.all("th")} == {"col", "row"}
    ids = {attributes.get("id") for _, attributes in parsed.tags}
    described = [t["aria-labelledby"] for t in parsed.all("table")]
    assert described and set(described) <= ids
    drawn = [svg for svg in parsed.all("svg") if svg["class"] == "figure"]
    assert all(svg["role"] == "img" and svg["aria-labelledby"] in ids for svg in drawn)


def test_the_page_is_the_same_text_again(made):
    analysis, drawn, text = made
    assert page(analysis, drawn) == text


# ---- in a browser --------------------------------------------------------------------------------

LUMINANCE = """(() => {
  const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = css => css.match(/[\\d.]+/g).slice(0, 3).map(c => linear(Number(c)))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  return ["body", "svg.figure text", "figcaption", "td", "a"].map(selector => {
    const style = getComputedStyle(document.querySelector(selector));
    const ink = luminance(selector.includes("text") ? style.fill : style.color);
    const paper = luminance(getComputedStyle(document.body).backgroundColor);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  });
})()"""


@pytest.mark.skipif(chromium.path() is None, reason="needs Chromium")
def test_a_browser_shows_it(made, tmp_path):
    """Wide, on a telephone, dark: no error, nothing fetched, all figures there, no overflow."""
    _, drawn, text = made
    file = tmp_path / "page.html"
    file.write_text(text, encoding="utf-8")
    with chromium.Chromium.open(tmp_path / "profile") as browser:
        for width, dark in ((1200, False), (390, False), (1200, True)):
            browser.show(file, width=width, dark=dark)
            methods = Counter(method for method, _ in browser.events)
            assert not methods["Runtime.exceptionThrown"] + methods["Runtime.consoleAPICalled"]
            assert not methods["Log.entryAdded"], browser.events
            asked = {parameters["request"]["url"] for method, parameters in browser.events
                     if method == "Network.requestWillBeSent"}  # fmt: skip
            assert asked == {file.as_uri()}
            assert browser.value("document.documentElement.scrollWidth") <= width
            sizes = browser.value(
                "[...document.querySelectorAll('svg.figure')].map(svg => "
                "[svg.getBoundingClientRect().width, svg.getBoundingClientRect().height])"
            )
            assert len(sizes) == len(drawn)
            assert all(250 < w <= width and h > 80 for w, h in sizes)
            smallest = browser.value(
                "Math.min(...[...document.querySelectorAll('svg.figure text')].map(text => {"
                "  const { a, b } = text.getScreenCTM();"
                "  return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(a, b)"
                "}))"
            )
            assert smallest > 8
            assert all(contrast > 4.5 for contrast in browser.value(LUMINANCE))
        browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
