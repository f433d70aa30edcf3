"""A study as a W&B report: its conclusions and its table, above live panels of its runs.

Built with wandb-workspaces, an extra: without it there is no report and one line says so. The
specification needs no server; `save_report` sends the same to the one that the study's runs are on.
"""

import json
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

from harness.compare import table
from harness.compare.svg import INK, styles
from harness.compare.types import Analysis, Run
from harness.metrics import title
from harness.tracking import end_service_at_exit

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr

NEUTRAL = "#7a838c"  # the reference's colour: W&B has no "colour of the text"
ENTITY = "me"  # of a specification that belongs to nobody yet
TITLE_LENGTH = 128  # characters; W&B refuses more


def report_spec(analysis: Analysis) -> str | None:
    """The report as wandb-workspaces would send it, as JSON: the same text for the same analysis.

    None, and one line on stderr, without wandb-workspaces.
    """
    if not _installed():
        return None
    project = _tracking(analysis).get("project") or "lora-variants"
    model = _report(analysis, entity=ENTITY, project=project)._to_model()
    spec = json.loads(model.model_dump_json(by_alias=True, exclude_none=True))
    return json.dumps(_with_stable_ids(spec), indent=1, ensure_ascii=False) + "\n"


def save_report(analysis: Analysis) -> str | None:
    """Save the report on the server and return its address; an earlier one of the study's name and
    question is replaced.

    Only for a study whose runs were tracked online, and as the environment allows (WANDB_MODE, a
    key): None otherwise. What fails on the way is said in one line and stops nothing.
    """
    tracking = _tracking(analysis)
    if tracking.get("mode") != "online" or os.environ.get("WANDB_MODE", "online") != "online":
        return None
    if not _installed():
        return None
    import wandb

    try:
        wandb.setup(settings=wandb.Settings(silent=True))  # or login() prints
        end_service_at_exit()
        if not wandb.login(prompt=False, verify=False):
            raise wandb.Error("no API key: run `wandb login` or set WANDB_API_KEY")
        api = wandb.Api(timeout=round(tracking.get("timeout_s", 30)))
        entity = str(tracking.get("entity") or api.default_entity)
        report = _report(analysis, entity=entity, project=tracking["project"])
        with_runs = any(project.name == tracking["project"] for project in api.projects(entity))
        for old in api.reports(f"{entity}/{tracking['project']}") if with_runs else ():
            if (old.display_name, old.description) == (report.title, report.description):
                report.id = old.id
        report.save()
        return report.url
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"Warning: the W&B report was not saved ({reason}).", file=sys.stderr)
        return None


def _installed() -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # its own use of pydantic
            import wandb_workspaces.reports.v2  # noqa: F401 (asked for)
    except ImportError:
        print("no W&B report: pip install wandb-workspaces", file=sys.stderr)
        return False
    return True


def _tracking(analysis: Analysis) -> dict[str, Any]:
    """How the study's runs were tracked: the settings of the last one."""
    return dict(analysis.study.runs[-1].config.get("tracking") or {})


def _report(analysis: Analysis, *, entity: str, project: str) -> "wr.Report":
    import wandb_workspaces.reports.v2 as wr

    study, metric = analysis.study, analysis.study.metric
    name = title(metric)
    blocks: list[Any] = [wr.P(study.question), wr.H2("What was found")]
    blocks += [wr.UnorderedList(list(analysis.conclusions))] if analysis.conclusions else []
    blocks += [
        wr.P(
            f"What is estimated: mean test {name} over seeds, on this split, at these rates, after "
            "this many steps, on this model."
        ),
        wr.MarkdownBlock(table.markdown_table(table.main_table(analysis))),
        wr.P("Brackets: 95 % confidence intervals over n seeds; differences are paired by seed."),
    ]
    if analysis.warnings:
        blocks += [wr.H2("To keep in mind"), wr.UnorderedList(list(analysis.warnings))]
    spread: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
    panels: list[Any] = [
        wr.LinePlot(title=f"validation {name}", x="step", y=[f"eval/{metric}"], **spread),
        wr.LinePlot(title="training loss (nats)", x="step", y=["train/loss_nats"],
                    smoothing_type="average", smoothing_factor=5, **spread),
        wr.BarPlot(title=f"test {name}", metrics=[wr.SummaryMetric(f"test.{metric}")], **spread),
        wr.ScatterPlot(title=f"test {name} against trainable parameters", log_x=True,
                       x=wr.SummaryMetric("parameters.trainable"),
                       y=wr.SummaryMetric(f"test.{metric}")),
        wr.ScatterPlot(title=f"test {name} against training time (s)",
                       x=wr.SummaryMetric("time.train_s"), y=wr.SummaryMetric(f"test.{metric}")),
        wr.RunComparer(diff_only=True),
    ]  # fmt: skip
    blocks += [
        wr.H2("The runs of the comparison"),
        wr.P("Mean and standard deviation over the seeds of an arm; one run set an arm."),
        _grid(analysis, "compare", panels),
    ]
    tuned = [run for run in study.runs if run.phase == "tune"]
    if tuned:
        settings = [wr.Config(key) for key in study.tune]
        score = wr.SummaryMetric(f"validation.{metric}")
        columns: list[Any] = [*settings, score]
        panels = [
            wr.ScatterPlot(title=f"validation {name}", x=settings[0], y=score, log_x=True),
            wr.ParallelCoordinatesPlot(
                columns=[wr.ParallelCoordinatesPlotColumn(column) for column in columns]
            ),
        ]
        blocks += [wr.H2("Tuning, on validation"), _grid(analysis, "tune", panels)]
    blocks += [wr.H2("How it was made"), wr.CodeBlock(study.command)]
    return wr.Report(
        entity=entity,
        project=project,
        title=study.name[:TITLE_LENGTH],
        description=study.question,
        blocks=blocks,
        width="fluid",
    )


def _grid(analysis: Analysis, phase: str, panels: list[Any]) -> "wr.PanelGrid":
    """Panels over one run set for each arm that has runs, in the arm's colour."""
    import wandb_workspaces.expr as expr
    import wandb_workspaces.reports.v2 as wr

    run_sets: list[wr.Runset] = []
    colors: dict[Any, Any] = {}
    for arm, style in styles(analysis).items():
        runs = [r for r in analysis.study.runs if r.arm == arm and r.phase == phase]
        if not runs:
            continue
        run_sets.append(
            wr.Runset(
                name=arm,
                filters=expr.And(
                    expr.Metric("Group") == analysis.study.name,
                    expr.Metric("Name").isin([_run_name(run) for run in runs]),
                ),
                groupby=["config.variant.name"],
            )
        )
        variant = wr.RunsetGroupKey(wr.Config("variant.name"), runs[0].result["variant"])
        colors[wr.RunsetGroup(arm, (variant,))] = NEUTRAL if style.color == INK else style.color
    return wr.PanelGrid(runsets=run_sets, panels=panels, custom_run_colors=colors)


def _run_name(run: Run) -> str:
    """As train.py names a run and its folder."""
    result = run.result
    return f"{result['variant']}-s{result['seed']}-{result['run_key'][:8]}"


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
