"""Advises settings for a model and a task, with their sources, and weighs rules of thumb.

    python -m harness.advise model=smollm2 task=g2p
    python -m harness.advise model=hf model.name=./my-llama variant=dora task=local_sft \\
        task.files.train=train.jsonl task.files.test=test.jsonl

Overrides are those of train.py; what they set stays. The model is known from its configuration, no
weight is read; the data are read, to count them. A setting comes from a study of results/ where one
asked, with its interval; else from a paper; else the variant's default is shown as such.
A rate is taken from a study of the same base alone, with the effective scale that it was tuned at.
rules.yaml has the papers and the claims; evidence.py decides from the intervals.
"""

import shlex
import statistics
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from harness import cli
from harness.advise.evidence import Evidence, compared, task_kind, where
from harness.compare import table
from harness.compare.findings import Analysis, Arm
from harness.compare.study import is_rate
from harness.config import build
from harness.config.identity import changed
from harness.config.overrides import pairs_of
from harness.config.settings import Settings
from harness.loop import facts, show
from harness.memory.trace import LiveBytes
from harness.models.base import architecture_kind
from harness.tasks.metrics import title, unit
from harness.words import count, counted

RULES = yaml.safe_load(Path(__file__).with_name("rules.yaml").read_text(encoding="utf-8"))
RESULTS = Path(__file__).parents[2] / "results"
WIDTH = 100
COUNTED = 1000  # training rows whose words are counted


@dataclass(frozen=True, kw_only=True)
class Case:
    """The facts known before training: the keys of `when` in rules.yaml.

    Args:
        model: the architecture, encoder or causal.
        task: classify, generate (answers to prompts) or text.
        rows: of train; words: their mean number in a row.
        hidden: the model's hidden size.
    """

    variant: str
    model: str
    task: str
    rows: int
    words: float
    hidden: int

    def meets(self, when: Mapping[str, Any]) -> bool:
        """True if all that `when` asks for holds."""
        limits = {"rows_below": self.rows.__lt__, "rows_from": self.rows.__ge__}
        return all(
            limits[key](wanted) if key in limits else getattr(self, key) == wanted
            for key, wanted in when.items()
        )


@dataclass(frozen=True)
class Start:
    """A setting to start with, and on whose word; `scale` and `rank`: those a rate belongs to."""

    value: Any
    source: str
    scale: float | None = None
    rank: int | None = None


def advice(arguments: Sequence[str], results: Path) -> str:
    """The text that is printed for these overrides.

    Args:
        results: the folder of studies; it need not be there.

    Raises ValueError for a mistake in them.
    """
    keys = [key.lstrip("+") for key, _ in pairs_of(arguments)]
    given = {key.removeprefix("variant.adapter.") for key in keys}
    config = build.compose(arguments)
    Settings.of(config)
    task = build.make(config, "task")
    outline = build.outline_base(config, task.labels)
    text = outline.model.config.get_text_config()
    total = sum(parameter.numel() for parameter in outline.model.parameters())
    words = [len(row.split()) for row in task.texts("train")[:COUNTED]]
    case = Case(
        variant=config["variant"]["name"],
        model=architecture_kind(outline.model.config),
        task=_kind_of(task),
        rows=task.counts["train"],
        words=statistics.fmean(words),
        hidden=text.hidden_size,
    )
    evidence = Evidence(results)
    starts = _starts(case, config, evidence, given)
    layers = _adapted(outline, config, starts)
    trained = facts.parameters(outline.model, layers, total)
    if "alpha" in starts and "alpha" not in given:
        starts["alpha"] = _alpha(config, layers, starts["alpha"])
    lines = [
        f"{config['model'].get('name') or config['model']['_target_'].split('.')[-2]}: "
        f"{case.model}, hidden size {case.hidden}, {text.num_hidden_layers} layers, "
        f"{count(total)} parameters",
        f"{task.name}: {case.task}, {case.rows:,} training rows, {case.words:.0f} words a row",
        f"{case.variant}: {show.parameters(trained)}",
        "",
        "start with",
    ]
    for key, start in starts.items():
        name = "rate" if is_rate(key) else key
        lines += _paragraph(f"  {name:<9}{_printed(start.value):<12} ", start.source)
    lines += ["", "what is often said, and what the studies of results/ say to it"]
    if not evidence.found:
        lines[-1] = "what is often said (there is no results/ here, so no study that could say)"
    for rule in RULES["claims"]:
        lines += _claim(rule, evidence)
    chosen = [f"{key}={_printed(start.value)}" for key, start in starts.items() if key not in given]
    lines += ["", f"python train.py {shlex.join([*arguments, *chosen])}"]
    lines += ["(the same with rate_test=true first shows at which rates the loss falls)"]
    return "\n".join(lines)


def _kind_of(task: Any) -> str:
    """classify, generate or text."""
    if task.labels is not None:
        return "classify"
    answers = any(role == "assistant" for role, _ in task.rows["train"][0].turns)
    return "generate" if answers else "text"


# ---- settings -----------------------------------------------------------------------------------


def _starts(
    case: Case, config: Mapping[str, Any], evidence: Evidence, given: set[str]
) -> dict[str, Start]:
    """Override -> what to start with, for the options that the variant has."""
    default = f"the default of conf/variant/{case.variant}.yaml; no study or paper is known here"
    has = config["variant"]["adapter"]
    rate = _tuned_rate(case, config, evidence) or _published("lr", case, evidence)
    if "variant.lr" in given:  # so it belongs to no rank or scale that somebody chose one at
        known = f"; {_printed(rate.value)}: {rate.source}" if rate else ""
        rate = Start(config["variant"]["lr"], f"as given{known}")
    rate = rate or Start(config["variant"]["lr"], default)
    starts: dict[str, Start] = {}
    for key in ("rank", "alpha", "dropout"):
        if key in has and key in given:
            starts[key] = Start(has[key], "as given")
        elif key == "rank" in has and rate.rank is not None:
            starts[key] = Start(rate.rank, "the rank that this rate was chosen at")
        elif key == "rank" in has:
            starts[key] = _fitting(_published(key, case, evidence), case.hidden)
        elif key == "alpha" in has:
            scale = _published("scale", case, evidence)
            if rate.scale is not None:
                scale = Start(rate.scale, "the effective scale that this rate was chosen at")
            starts[key] = scale  # until the layers say which alpha that is
        elif key in has:
            starts[key] = _published(key, case, evidence)
    if "targets" in given:
        starts["targets"] = Start(config["targets"], "as given")
    elif "rank" in has:
        starts["targets"] = _published("targets", case, evidence)
    if "rank" in starts and rate.rank not in (None, starts["rank"].value):
        unlike = f"; at rank {rate.rank}, so at another it is a guess: see rate_test below"
        rate = replace(rate, source=rate.source + unlike)
    starts["variant.lr"] = rate
    return starts


def _published(key: str, case: Case, evidence: Evidence) -> Any:
    """The first of the entries in rules.yaml that holds; None if none does."""
    for entry in RULES["starts"][key]:
        if "study" in entry:
            if (start := _best_arm(entry, case, evidence)) is not None:
                return start
        elif case.meets(entry.get("when", {})):
            return Start(
                entry["value"], f"{entry['source']} ({entry['status']})", entry.get("scale")
            )
    return None


def _best_arm(entry: Mapping[str, Any], case: Case, evidence: Evidence) -> Start | None:
    """An option of the reference arm of a study of this kind of task, or of the arm that is
    better than it by most, if any is beyond its interval."""
    for analysis in evidence.analyses(entry["study"], entry["against"]):
        study = analysis.study
        if task_kind(study) != case.task:
            continue
        arms = [comparison.arm for comparison in analysis.comparisons]
        seen = {arm: compared(analysis, arm) for arm in arms}
        gains = {c.arm: study.sign * c.difference.estimate for c in analysis.comparisons}
        better = [arm for arm in arms if seen[arm].side == 1]
        best = max(better, key=gains.__getitem__, default=None)
        options = dict(option.split("=", 1) for option in study.arms[best or study.reference])
        said = seen[best].text if best else _nothing_better(analysis)
        return Start(yaml.safe_load(options[entry["option"]]), said)
    return None


def _nothing_better(analysis: Analysis) -> str:
    study = analysis.study
    n = max(comparison.difference.n for comparison in analysis.comparisons)
    return (
        f"no arm of {study.name} was seen to be better than {study.reference} ({where(study)}, "
        f"n = {n} paired seeds)"
    )


def _fitting(start: Start, hidden: int) -> Start:
    """Halves the rank until it is at most half the hidden size."""
    rank = start.value
    while rank > max(1, hidden // 2):
        rank //= 2
    note = f"; halved to fit a hidden size of {hidden}" if rank != start.value else ""
    return Start(rank, start.source + note)


def _tuned_rate(case: Case, config: Mapping[str, Any], evidence: Evidence) -> Start | None:
    """The rate that a study found for this variant on this base and kind of task; that of the same
    task if there are several, else of the most seeds."""
    found: list[tuple[bool, int, Start]] = []
    for analysis in evidence.analyses():
        study = analysis.study
        run = study.runs[0]
        if task_kind(study) != case.task or _base(run.config) != _base(config):
            continue
        same = run.config["task"]["_target_"] == config["task"]["_target_"]
        for arm in analysis.arms:
            options = [o for o in study.arms[arm.name] if not is_rate(o.partition("=")[0])]
            plain = options == [f"variant={case.variant}"]
            if plain and arm.tuning is not None and arm.bracketed and arm.rate is not None:
                found.append((same, arm.score.n, _of_arm(analysis, arm)))
    return max(found, key=lambda entry: entry[:2])[2] if found else None


def _base(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model's settings: a key that is null or empty may be younger than the study."""
    model = config["model"].items()
    return {key: value for key, value in model if key != "dtype" and value not in (None, [])}


def _of_arm(analysis: Analysis, arm: Arm) -> Start:
    study = analysis.study
    result, settings = study.runs[0].result, study.runs[0].config["train"]
    score = table.score_interval(arm.score, study.metric)
    band = arm.tuning.band if arm.tuning else None
    text = (
        f"tuned in {study.name} ({where(study)}, {result['steps']} steps of "
        f"{settings['batch_size']} rows): test {title(study.metric)} {score}"
        f" {unit(study.metric).name}".rstrip()
        + f", n = {arm.score.n}"
    )
    if band is not None:
        text += f"; within 1 % of the best from {table.rate(band[0])} to {table.rate(band[1])}"
    scale = arm.scale if isinstance(arm.scale, float | int) else None
    (run, *_) = study.runs_of(arm.name, "compare")
    return Start(arm.rate, text, scale, run.config["rank"])


def _adapted(outline: Any, config: Mapping[str, Any], starts: Mapping[str, Start]) -> Any:
    """The outline's layers with the variant in them, at the rank and targets to start with."""
    places = {"rank": "variant.adapter.rank", "targets": "targets"}
    other = changed(config, {at: starts[key].value for key, at in places.items() if key in starts})
    with LiveBytes(()):  # which answers for values that are not there
        return build.adapt(outline, build.make_variant(other), other)


def _alpha(config: Mapping[str, Any], layers: Any, wanted: Start) -> Start:
    """The alpha at which the layers, made with the config's, have the effective scale wanted."""
    scale = facts.effective_scale(layers)
    if not isinstance(scale, float | int) or not scale:
        return Start(config["alpha"], "the config's: effective scales differ between layers")
    adapter = config["variant"]["adapter"]
    alpha = adapter["alpha"] or 2 * adapter["rank"]  # null: `effective_scale`
    alpha *= wanted.value / scale
    return Start(round(alpha, 6), f"s = {wanted.value:g}: {wanted.source}")


# ---- in words -----------------------------------------------------------------------------------


def _printed(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    listed = isinstance(value, list)
    return f"[{','.join(map(str, value))}]" if listed else str(value)


def _paragraph(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=label, subsequent_indent=" " * len(label),
        break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip


def _claim(rule: Mapping[str, Any], evidence: Evidence) -> list[str]:
    """A claim with its source, the verdict, and a line for each finding."""
    verdict = evidence.verdict(rule["tests"])
    text = f"{rule['claim']} ({rule['source']})"
    if 0 < verdict.decided < verdict.tested:
        text += f"; by {verdict.decided} of {counted(verdict.tested, 'comparison')}"
    lines = _paragraph(f"  {verdict.word:<20}", text)
    for finding in verdict.findings or ["no experiment here asks it"]:
        lines += _paragraph(" " * 22 + "- ", finding)
    return lines


def main() -> None:
    cli.run(lambda arguments: print(advice(arguments, RESULTS)), sys.argv[1:])


if __name__ == "__main__":
    main()
