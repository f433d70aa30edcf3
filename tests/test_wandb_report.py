"""A study's W&B report: built without a server, saved by the real client to a loopback one."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from made_study import folder, made_study
from wandb_backend import API_KEY, WandbBackend

from harness.compare.analyse import analyse
from harness.compare.types import Analysis
from harness.compare.wandb_report import report_spec, save_report

pytestmark = pytest.mark.usefixtures("own_wandb")


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse(made_study(seeds=3, items=40), np.random.default_rng(0))


def tracked(analysis: Analysis, **tracking) -> Analysis:
    """The same, with every run tracked so."""
    runs = [
        dataclasses.replace(run, config={**run.config, "tracking": tracking})
        for run in analysis.study.runs
    ]
    return dataclasses.replace(analysis, study=dataclasses.replace(analysis.study, runs=runs))


def texts(node) -> str:
    """Every text in the blocks of a specification."""
    if isinstance(node, dict):
        own = [node[key] for key in ("text", "content") if isinstance(node.get(key), str)]
        return "\n".join(own + [texts(value) for value in node.values()])
    return "\n".join(map(texts, node)) if isinstance(node, list) else ""


# ---- the specification ---------------------------------------------------------------------------


def test_the_specification_says_what_the_study_says(analysis):
    pytest.importorskip("wandb_workspaces")
    spec = json.loads(report_spec(analysis))
    assert spec["displayName"] == analysis.study.name
    said = texts(spec["spec"]["blocks"])
    for sentence in (analysis.study.question, *analysis.conclusions, *analysis.warnings):
        assert sentence in said
    for arm in analysis.arms:
        assert f"| {arm.name}" in said
    assert analysis.study.command in said


def test_each_arm_is_a_run_set_of_its_own_runs(analysis):
    pytest.importorskip("wandb_workspaces")
    blocks = json.loads(report_spec(analysis))["spec"]["blocks"]
    grids = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    for grid, phase in zip(grids, ("compare", "tune"), strict=True):
        assert [run_set["name"] for run_set in grid["runSets"]] == list(analysis.study.arms)
        for run_set in grid["runSets"]:
            named = {f["key"]["name"]: f["value"] for f in run_set["filters"]["filters"]}
            runs = [r for r in analysis.study.runs if (r.arm, r.phase) == (run_set["name"], phase)]
            assert named == {"group": "made", "displayName": [folder(run) for run in runs]}
        assert len(set(grid["customRunColors"].values())) == len(analysis.arms)
    panels = grids[0]["panelBankSectionConfig"]["panels"]
    lines = [p["config"]["metrics"] for p in panels if p["viewType"] == "Run History Line Plot"]
    assert lines == [["eval/accuracy"], ["train/loss_nats"]]


def test_the_specification_is_the_same_text_again(analysis):
    """The client draws random names, for a report that is built again too."""
    interface = pytest.importorskip("wandb_workspaces.reports.v2")
    assert interface.LinePlot()._id != interface.LinePlot()._id
    assert report_spec(analysis) == report_spec(analysis)


def test_without_the_extra_one_line_says_so(analysis, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("wandb_workspaces")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert report_spec(analysis) is None
    assert capsys.readouterr().err == "no W&B report: pip install wandb-workspaces\n"


# ---- saving --------------------------------------------------------------------------------------


def test_saved_once_however_often(analysis, monkeypatch, capfd):
    pytest.importorskip("wandb_workspaces")
    online = tracked(analysis, mode="online", project="lora-variants", entity=None)
    with WandbBackend.serve() as backend:
        for name, value in backend.environment.items():
            monkeypatch.setenv(name, value)
        first = save_report(online)
        assert first is not None, capfd.readouterr().err
        (view,) = backend.views.values()
        assert first.startswith(backend.url)
        assert first.endswith(f"/me/lora-variants/reports/made--{view['id']}")
        assert view["entityName"] == "me"
        assert view["projectName"] == "lora-variants"
        assert view["displayName"] == "made"
        said = texts(json.loads(view["spec"])["blocks"])
        assert all(sentence in said for sentence in analysis.conclusions)

        changed = dataclasses.replace(online, conclusions=["It was the other way round."])
        assert save_report(changed) == first
        (view,) = backend.views.values()
        assert "It was the other way round." in view["spec"]
        assert not backend.unexpected


@pytest.mark.parametrize(
    ("tracking", "environment"),
    [
        ({}, {}),
        ({"mode": "offline", "project": "lora-variants"}, {}),
        ({"mode": "online", "project": "lora-variants"}, {"WANDB_MODE": "offline"}),
        ({"mode": "online", "project": "lora-variants"}, {"WANDB_MODE": "disabled"}),
    ],
)
def test_a_study_that_is_not_online_sends_nothing(
    analysis, tracking, environment, monkeypatch, capfd
):
    with WandbBackend.serve() as backend:
        for name, value in (backend.environment | environment).items():
            monkeypatch.setenv(name, value)
        assert save_report(tracked(analysis, **tracking)) is None
        assert backend.requests == 0
    assert capfd.readouterr() == ("", "")


def test_no_key_and_no_server_are_one_line_each(analysis, monkeypatch, capfd):
    pytest.importorskip("wandb_workspaces")
    online = tracked(analysis, mode="online", project="lora-variants", entity="me")
    assert save_report(online) is None
    assert "no API key" in capfd.readouterr().err
    with WandbBackend.serve() as backend:
        gone = backend.url
    monkeypatch.setenv("WANDB_BASE_URL", gone)
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    assert save_report(tracked(analysis, mode="online", project="p", timeout_s=1)) is None
    assert capfd.readouterr().err.count("Warning: the W&B report was not saved") == 1
