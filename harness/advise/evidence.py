"""The verdict of the studies in results/ on a claim, decided by the bounds of their intervals.

A comparison that was named in advance is judged by the interval that holds for all of its study's
at once, any other by its own paired interval (harness.compare.stats). An arm whose best setting is
at the edge of its grid decides nothing, and neither does a study that is not finished.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.compare import table
from harness.compare.analyse import analysed
from harness.compare.findings import Analysis
from harness.compare.load import load_study
from harness.compare.study import Study, read_study
from harness.tasks.metrics import metrics_of, unit

# What a claim expects of an arm -> the sides that speak for it, and those against it. That nothing
# differs can be refuted, and never shown.
EXPECTATIONS: Mapping[str, tuple[set[int], set[int]]] = {
    "better": ({1}, {-1}),
    "worse": ({-1}, {1}),
    "not better": ({-1}, {1}),
    "not worse": ({1}, {-1}),
    "same": (set(), {1, -1}),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One arm compared with another in one study.

    Args:
        side: +1 if better beyond the interval, -1 if worse, 0 if the interval holds 0; None where
            nothing can be concluded.
        text: the difference with its interval, n and where it was seen.
    """

    side: int | None
    text: str


@dataclass(frozen=True)
class Verdict:
    """supported, contradicted, mixed, untested, or no difference seen; the findings, and how many
    of those that could have decided did."""

    word: str
    findings: Sequence[str]
    decided: int = 0
    tested: int = 0


class Evidence:
    """The studies of a folder, by name; those that are not finished are known, and say nothing.

    Args:
        results: of study folders; None, or one that is not there, for no studies at all.
    """

    def __init__(self, results: Path | None):
        self.found = results is not None and results.is_dir()
        self.studies: list[tuple[Path, Study]] = []
        self.unfinished: set[str] = set()
        for path in sorted(results.glob("*/study.yaml")) if results and self.found else ():
            try:
                study = load_study(path.parent)
            except ValueError:  # `python -m harness.compare` on the folder says why
                self.unfinished.add(read_study(path).name)
                continue
            # Only the bootstrap reads items, and it takes most of the time.
            runs = [dataclasses.replace(run, correct=None) for run in study.runs]
            self.studies.append((path.parent, dataclasses.replace(study, runs=runs)))
        self._analyses: dict[tuple[Path, str], Analysis] = {}

    def analyses(self, name: str | None = None, against: str | None = None) -> list[Analysis]:
        """Analyses the studies of this name (None: all), with `against` as the reference if it is
        given; a study without that arm is left out."""
        found = []
        for path, study in self.studies:
            reference = against or study.reference
            if name not in (None, study.name) or reference not in study.arms:
                continue
            if (path, reference) not in self._analyses:
                if reference != study.reference:  # its comparisons were not named in advance
                    study = dataclasses.replace(study, reference=reference, primary=[])
                self._analyses[path, reference] = analysed(study)
            found.append(self._analyses[path, reference])
        return found

    def findings(self, name: str, arms: Sequence[str], against: str) -> list[Finding]:
        """Compares arms of the finished studies of this name with the arm `against`."""
        return [
            compared(analysis, arm)
            for analysis in self.analyses(name, against)
            for arm in arms
            if arm in {comparison.arm for comparison in analysis.comparisons}
        ]

    def verdict(self, tests: Sequence[Mapping[str, Any]]) -> Verdict:
        """Decides on a claim by its tests {study, arms, against, expects}; see rules.yaml."""
        seen: list[str] = []
        decided: list[bool] = []  # for or against
        tested = 0
        for test in tests:
            for_it, against_it = EXPECTATIONS[test["expects"]]
            for finding in self.findings(test["study"], test["arms"], test["against"]):
                seen.append(finding.text)
                tested += finding.side is not None
                if finding.side in for_it | against_it:
                    decided.append(finding.side in for_it)
        seen += self._open(tests)
        if decided:
            word = "supported" if all(decided) else "mixed" if any(decided) else "contradicted"
            return Verdict(word, seen, len(decided), tested)
        return Verdict("no difference seen" if tested else "untested", seen)

    def _open(self, tests: Sequence[Mapping[str, Any]]) -> list[str]:
        """Gives the command for each study that is missing."""
        names = dict.fromkeys(test["study"] for test in tests)
        names = dict.fromkeys(name for name in names if not self.analyses(name))
        return [
            f"{name} has begun and is not finished"
            if name in self.unfinished
            else f"python train.py -m experiment={name} would test it"
            for name in names
        ]


def compared(analysis: Analysis, arm: str) -> Finding:
    """Compares an arm with the reference of an analysis."""
    study = analysis.study
    c = next(comparison for comparison in analysis.comparisons if comparison.arm == arm)
    interval = c.simultaneous or c.difference
    bracketed = all(a.bracketed for a in analysis.arms if a.name in (arm, study.reference))
    points = unit(study.metric).of_difference
    text = (
        f"{arm} {table.MINUS} {study.reference}: "
        f"{table.difference_interval(interval, study.metric)} {points}".rstrip()
        + f" {study.metric.removesuffix('_nats').replace('_', ' ')}, n = {interval.n} paired seeds"
        f"{f', all {len(study.primary)} comparisons at once' if c.simultaneous else ''}"
        f" ({study.name}: {where(study)})"
    )
    if interval.bounds is None:
        return Finding(side=None, text=f"{text}; no interval, so nothing is concluded")
    if not bracketed:
        return Finding(side=None, text=f"{text}; not bracketed: nothing is concluded")
    largest = table.at_most(max(map(abs, interval.bounds)), study.metric)
    if interval.holds_zero:
        return Finding(side=0, text=f"{text}; no difference larger than {largest}")
    better = (interval.bounds[0] > 0) == study.higher_is_better
    return Finding(side=1 if better else -1, text=text)


def where(study: Study) -> str:
    """The base and the task of a study."""
    result = study.runs[0].result
    return f"{result['base'].rpartition('/')[2]}, {result.get('task', 'a task')}"


def task_kind(study: Study) -> str:
    """classify, generate or text, as `harness.advise` calls them."""
    result = study.runs[0].result
    if result.get("classes"):
        return "classify"
    judged = any(metric.per_item for metric in metrics_of(result).values())
    return "generate" if judged else "text"
