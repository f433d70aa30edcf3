"""A study's W&B report and workspace, built without a server."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from made_study import made_study

from harness.compare import plots
from harness.compare.__main__ import main
from harness.compare.analyse import analyse
from harness.compare.findings import Analysis
from harness.compare.page import limits
from harness.compare.wandb_report import report_spec, workspace

pytestmark = pytest.mark.usefixtures("own_wandb")
WORKSPACE = {"entity": "me", "project": "lora-variants", "name": "nw-abc-v", "view_id": ""}


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse(made_study(seeds=3, items=40), np.random.default_rng(0))


@pytest.fixture(scope="module")
def figures(analysis) -> list[str]:
    return list(plots.figures(analysis))


@pytest.fixture(scope="module")
def blocks(analysis, figures) -> list[dict]:
    pytest.importorskip("wandb_workspaces")
    return json.loads(report_spec(analysis, figures))["spec"]["blocks"]


def texts(node) -> str:
    """Every text in the blocks of a specification."""
    if isinstance(node, dict):
        own = [node[key] for key in ("text", "content") if isinstance(node.get(key), str)]
        return "\n".join(own + [texts(value) for value in node.values()])
    return "\n".join(map(texts, node)) if isinstance(node, list) else ""


def grids(blocks) -> list[dict]:
    return [block["metadata"] for block in blocks if block["type"] == "panel-grid"]


def panels(grid) -> list[dict]:
    return grid["panelBankSectionConfig"]["panels"]


def test_the_report_says_what_the_study_says(analysis, blocks):
    said = texts(blocks)
    sentences = [analysis.study.question, *analysis.conclusions, *analysis.warnings]
    for sentence in (*sentences, *limits(analysis)):
        assert sentence in said
    for arm in analysis.arms:
        assert said.count(f"| {arm.name}") >= 2  # its scores and its costs
    assert analysis.study.command in said
    assert analysis.study.commit in said


def test_its_sections_are_those_that_were_promised(blocks):
    headings = [texts(block).strip() for block in blocks if block["type"] == "heading"]
    assert headings == [
        "Verdict",
        "The runs of the comparison",
        "Costs",
        "Ranks and norms",
        "Tuning, on validation",
        "To keep in mind",
        "What it does not show",
        "How it was made",
    ]


def test_a_phase_is_one_run_set_grouped_by_arm_in_the_arms_colours(analysis, blocks):
    found = {}
    for grid in grids(blocks):
        (run_set,) = grid["runSets"]
        named = {f["key"]["name"]: f["value"] for f in run_set["filters"]["filters"]}
        assert named == {"group": "made", "jobType": run_set["name"]}
        found.setdefault(run_set["name"], []).append(grid)
    assert set(found) == {"compare", "tune", "comparison"}
    for grid in found["compare"] + found["tune"]:
        (run_set,) = grid["runSets"]
        assert run_set["grouping"] == [{"section": "config", "name": "arm.value"}]
        keys = {f"{run_set['id']}-config:arm.value:{arm}" for arm in analysis.study.arms}
        assert set(grid["customRunColors"]) == keys
        assert len(set(grid["customRunColors"].values())) == len(analysis.arms)


def test_it_has_learning_curves_costs_ranks_and_the_forest(blocks, figures):
    shown = [panel for grid in grids(blocks) for panel in panels(grid)]
    lines = [p["config"]["metrics"] for p in shown if p["viewType"] == "Run History Line Plot"]
    assert lines == [["eval/accuracy"], ["train/loss_nats"], ["rank/mean"],
                     ["norm/A"], ["norm/B"], ["norm/relative"]]  # fmt: skip
    scattered = [p["config"]["xAxis"] for p in shown if p["viewType"] == "Scatter Plot"]
    assert scattered == [
        "summary:parameters/trainable",
        "summary:time/train_s",
        "summary:memory/train_peak_bytes",
        "config:tuned_lr.value",
    ]
    media = [p["config"]["mediaKeys"] for p in shown if p["viewType"] == "Media Browser"]
    assert media[0] == ["figures/forest"]
    of = ("forest", "cost", "rank", "rate")
    assert [key for keys in media for key in keys] == [
        f"figures/{n}" for s in of for n in figures if n.startswith(s)
    ]


def test_what_no_run_has_is_no_empty_panel(analysis, figures):
    pytest.importorskip("wandb_workspaces")
    runs = [
        dataclasses.replace(
            run,
            result={**run.result, "rank_history": [{"step": 0, "ranks": []}]},
            curve=[{k: v for k, v in row.items() if "norm" not in k} for row in run.curve],
        )
        for run in analysis.study.runs
    ]
    bare = dataclasses.replace(analysis, study=dataclasses.replace(analysis.study, runs=runs))
    spec = report_spec(bare, figures)
    assert "rank/mean" not in spec
    assert "norm/" not in spec


def test_the_workspace_is_grouped_by_arm(analysis):
    pytest.importorskip("wandb_workspaces")
    spec = workspace(analysis, **WORKSPACE)._to_model().spec.model_dump(by_alias=True)["section"]
    (run_set,) = spec["runSets"]
    assert run_set["grouping"] == [{"section": "config", "name": "arm.value"}]
    assert [f["value"] for f in run_set["filters"]["filters"]] == ["made", "compare"]
    assert len(spec["customRunColors"]) == len(analysis.arms)
    names = [section["name"] for section in spec["panelBankConfig"]["sections"]]
    assert names == ["Scores", "Learning", "Costs", "Ranks and norms"]
    (parallel,) = [
        panel
        for section in spec["panelBankConfig"]["sections"]
        for panel in section["panels"]
        if panel["viewType"] == "Parallel Coordinates Plot"
    ]
    assert [column["accessor"] for column in parallel["config"]["columns"]] == [
        "config:arm.value",
        "config:seed.value",
        "config:tuned_lr.value",
        "summary:validation/accuracy",
        "summary:test/accuracy",
    ]


def test_the_specification_is_the_same_text_again(analysis, figures):
    """The client draws random names, for a report that is built again too."""
    interface = pytest.importorskip("wandb_workspaces.reports.v2")
    assert interface.LinePlot()._id != interface.LinePlot()._id
    assert report_spec(analysis, figures) == report_spec(analysis, figures)


def test_without_the_extra_one_sentence_says_so(analysis, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith("wandb_workspaces")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert report_spec(analysis, []) is None
    with pytest.raises(SystemExit) as ended:
        main(["results/2026-11-21_first_runs", "--wandb"])
    assert ended.value.code == ('error: wandb-workspaces is missing; pip install -e ".[report]"')
