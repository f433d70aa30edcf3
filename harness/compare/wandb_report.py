"""A study as a W&B report and as a saved workspace: its conclusions and its tables, around live
panels of its runs, grouped by arm.

Built with wandb-workspaces; neither needs a server. harness/compare/wandb_study.py sends them.
"""

import json
import warnings
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from harness import wandb_run
from harness.compare import table
from harness.compare.findings import Analysis
from harness.compare.look import INK, styles
from harness.compare.page import limits, scores_and_costs
from harness.tasks.metrics import title

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

NEUTRAL = "#7a838c"  # the reference's colour: W&B has no "colour of the text"
ENTITY = "me"  # of a specification that belongs to nobody yet
PROJECT = "lora-variants"  # where the runs do not say
TITLE_LENGTH = 128  # characters; W&B refuses more
COMPARISON = "comparison"  # job type of the one run that carries a study's figures
NORMS = {
    "norm/A": "norm of A",
    "norm/B": "norm of B",
    "norm/relative": "norm of the update over that of W",
}
MISSING = 'wandb-workspaces is missing; pip install -e ".[report]"'


def report_spec(analysis: Analysis, figures: Collection[str]) -> str | None:
    """The report as wandb-workspaces would send it, as JSON: the same text for the same analysis.
    None without wandb-workspaces."""
    if not installed():
        return None
    project = tracking_of(analysis).get("project") or PROJECT
    model = report(analysis, figures, entity=ENTITY, project=project)._to_model()
    spec = json.loads(model.model_dump_json(by_alias=True, exclude_none=True))
    return json.dumps(_with_stable_ids(spec), indent=1, ensure_ascii=False) + "\n"


def installed() -> bool:
    """Tell whether wandb-workspaces is there."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # its own use of pydantic
            import wandb_workspaces.reports.v2
            import wandb_workspaces.workspaces  # noqa: F401 (asked for)
    except ImportError:
        return False
    return True


def tracking_of(analysis: Analysis) -> dict[str, Any]:
    """The tracking settings of the study's last run."""
    return dict(analysis.study.runs[-1].config.get("tracking") or {})


def report(
    analysis: Analysis, figures: Collection[str], *, entity: str, project: str
) -> "wr.Report":
    """The report, in the order of the study's page.

    Args:
        figures: names of the figures, which the comparison's own run carries.
    """
    import wandb_workspaces.reports.v2 as wr

    study = analysis.study
    name = title(study.metric)
    scores, costs = scores_and_costs(table.main_table(analysis))
    panels = _panels(analysis)

    def text(heading: str, sentences: Iterable[str]) -> list[Any]:
        listed: list[Any] = list(sentences)
        return [wr.H2(heading), wr.UnorderedList(listed)] if listed else []

    def pictures(*sections: str) -> list[Any]:
        keys = [f"figures/{n}" for n in figures if n.startswith(sections)]
        return [_figures(analysis, keys)] if keys else []

    blocks: list[Any] = [
        wr.P(study.question),
        wr.TableOfContents(),
        *text("Verdict", analysis.conclusions),
        wr.P(
            f"The estimate: mean test {name} over seeds, on this split, at these rates, after "
            "this many steps, on this model."
        ),
        wr.MarkdownBlock(table.markdown_table(scores)),
        wr.P("Brackets: 95 % confidence intervals over n seeds; differences are paired by seed."),
        *pictures("forest"),
        wr.H2("The runs of the comparison"),
        wr.P("Mean and standard deviation over the seeds of an arm."),
        _grid(analysis, "compare", [*panels["Scores"], *panels["Learning"]]),
        wr.H2("Costs"),
        wr.MarkdownBlock(table.markdown_table(costs)),
        _grid(analysis, "compare", panels["Costs"]),
        *pictures("cost"),
    ]
    if (forgetting := table.forgetting_table(analysis)).rows:
        blocks += [wr.H2(forgetting.title), wr.MarkdownBlock(table.markdown_table(forgetting))]
        blocks += pictures("forgetting")
    if "Ranks and norms" in panels:
        ranks = _grid(analysis, "compare", panels["Ranks and norms"])
        blocks += [wr.H2("Ranks and norms"), ranks, *pictures("rank")]
    if "Tuning" in panels:
        blocks += [wr.H2("Tuning, on validation"), _grid(analysis, "tune", panels["Tuning"])]
        blocks += pictures("rate")
    blocks += text("To keep in mind", analysis.warnings)
    blocks += text("What it does not show", limits(analysis))
    held = ", ".join(f"{key} {value}" for key, value in analysis.certificate.software.items())
    made = [
        f"{len(study.runs)} runs: {len(study.arms)} arms, seeds {', '.join(map(str, study.seeds))}",
        f"commit {study.commit}" if study.commit else "outside a repository",
        *([held] if held else []),
    ]
    blocks += [*text("How it was made", made)]
    blocks += [wr.CodeBlock(study.command)] if study.command else []
    return wr.Report(
        entity=entity,
        project=project,
        title=study.name[:TITLE_LENGTH],
        description=study.question,
        blocks=blocks,
        width="fluid",
    )


def workspace(
    analysis: Analysis, *, entity: str, project: str, name: str, view_id: str
) -> "ws.Workspace":
    """A saved view of the project: the runs of the comparison grouped by arm, and panels for them.

    Args:
        name, view_id: by which the server knows it; view_id is empty for a new one.
    """
    import wandb_workspaces.expr as expr
    import wandb_workspaces.workspaces as ws

    score = wandb_run.score_keys(analysis.study.runs[-1].result, "test")
    made = ws.Workspace(
        entity=entity,
        project=project,
        name=analysis.study.name[:TITLE_LENGTH],
        sections=[
            ws.Section(name=section, panels=panels, is_open=True)
            for section, panels in _panels(analysis).items()
            if section != "Tuning"  # the runs in this view are those of the comparison
        ],
        settings=ws.WorkspaceSettings(x_axis="step", max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=_of_phase(analysis, "compare"),
            groupby=[expr.Config("arm")],
            group_colors=dict(_colors(analysis)),
            pinned_columns=["run:displayName", "config:arm", "config:seed", "config:tuned_lr",
                            *(f"summary:{key}" for key in score)],
        ),
        auto_generate_panels=False,
    )  # fmt: skip
    object.__setattr__(made, "_internal_name", name)
    object.__setattr__(made, "_internal_id", view_id)
    object.__setattr__(made, "_internal_runset_id", f"runs-{name.strip('nwv-')}")
    return made


def _panels(analysis: Analysis) -> dict[str, list[Any]]:
    """Section -> its panels, of the report and of the workspace."""
    import wandb_workspaces.reports.v2 as wr

    study, metric = analysis.study, analysis.study.metric
    name = title(metric)
    test, validation = wr.SummaryMetric(f"test/{metric}"), wr.SummaryMetric(f"validation/{metric}")
    spread: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}

    def line(key: str, label: str, **more: Any) -> Any:
        return wr.LinePlot(title=label, x="step", y=[key], **spread, **more)

    def against(key: str, label: str, **more: Any) -> Any:
        found = wr.SummaryMetric(key)
        return wr.ScatterPlot(title=f"test {name} against {label}", x=found, y=test, **more)

    def parallel(*keys: Any) -> Any:
        columns = [wr.ParallelCoordinatesPlotColumn(key) for key in keys]
        return wr.ParallelCoordinatesPlot(columns=columns)

    arm = wr.Config("arm")
    tuned = [wr.Config("tuned_lr" if key == "variant.lr" else key) for key in study.tune]
    panels = {
        "Scores": [
            wr.BarPlot(title=f"test {name}", metrics=[test], **spread),
            parallel(arm, wr.Config("seed"), wr.Config("tuned_lr"), validation, test),
            wr.RunComparer(diff_only=True),
        ],
        "Learning": [
            line(f"eval/{metric}", f"validation {name}"),
            line("train/loss_nats", "training loss (nats)",
                 smoothing_type="average", smoothing_factor=5),
        ],
        "Costs": [
            against("parameters/trainable", "trainable parameters", log_x=True),
            against("time/train_s", "training time (s)"),
            against("memory/train_peak_bytes", "peak memory of training (bytes)"),
        ],
    }  # fmt: skip
    changing = any(len(run.result.get("rank_history") or ()) > 1 for run in study.runs)
    charted = {key for run in study.runs for point in run.curve for key in point}
    layers = [line("rank/mean", "mean rank in use, where it changes")] if changing else []
    layers += [
        line(key, f"{label}, mean over layers") for key, label in NORMS.items() if key in charted
    ]
    if layers:
        panels["Ranks and norms"] = layers
    if any(run.phase == "tune" for run in study.runs):
        panels["Tuning"] = [
            wr.ScatterPlot(title=f"validation {name}", x=tuned[0], y=validation, log_x=True),
            parallel(arm, *tuned, validation),
        ]
    return panels


def _figures(analysis: Analysis, keys: list[str]) -> "wr.PanelGrid":
    """The study's own figures, from the run that carries them."""
    import wandb_workspaces.reports.v2 as wr

    wide = wr.Layout(w=24, h=9 if len(keys) < 4 else 16)
    panel = wr.MediaBrowser(media_keys=keys, num_columns=min(3, len(keys)), layout=wide)
    return wr.PanelGrid(
        runsets=[wr.Runset(name=COMPARISON, filters=_of_phase(analysis, COMPARISON))],
        panels=[panel],
    )


def _grid(analysis: Analysis, phase: str, panels: list[Any]) -> "wr.PanelGrid":
    """Panels over the runs of a phase, grouped by arm, each arm in its colour."""
    import wandb_workspaces.reports.v2 as wr

    def group(arm: str) -> Any:
        return wr.RunsetGroup(phase, (wr.RunsetGroupKey(wr.Config("arm"), arm),))

    runs = wr.Runset(name=phase, filters=_of_phase(analysis, phase), groupby=["config.arm"])
    colors: dict[Any, Any] = {group(arm): color for arm, color in _colors(analysis).items()}
    return wr.PanelGrid(runsets=[runs], panels=panels, custom_run_colors=colors)


def _of_phase(analysis: Analysis, phase: str) -> Any:
    """The filter of the study's runs of a phase, by group and job type."""
    import wandb_workspaces.expr as expr

    group, job_type = expr.Metric("Group"), expr.Metric("JobType")
    return expr.And(group == analysis.study.name, job_type == phase)


def _colors(analysis: Analysis) -> dict[Any, str]:
    found = styles(analysis).items()
    return {arm: NEUTRAL if style.color == INK else style.color for arm, style in found}


def _with_stable_ids(spec: dict[str, Any]) -> dict[str, Any]:
    """The specification with random names of run sets and panels replaced by their places."""
    text = json.dumps(spec)
    grids = [b["metadata"] for b in spec["spec"]["blocks"] if b["type"] == "panel-grid"]
    for g, grid in enumerate(grids):
        for i, run_set in enumerate(grid["runSets"]):
            text = text.replace(f'"{run_set["id"]}', f'"runs-{g}-{i}')
        for i, panel in enumerate(grid["panelBankSectionConfig"]["panels"]):
            text = text.replace(f'"{panel["__id__"]}"', f'"panel-{g}-{i}"')
    return json.loads(text)
