"""A study that runs: it tunes every arm, then compares their choices. No Hydra.

What is finished is not run again. hydra_plugins/fair_sweeper.py says what a job is and starts jobs.
"""

import dataclasses
import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.compare import brief, multirun, report
from harness.compare.findings import Analysis, TuningPoint
from harness.compare.study import Choice, Study, read_study, study_text
from harness.config import build
from harness.config.identity import held_config, leaves, run_name
from harness.disk.digest import digest
from harness.disk.inputs import changed_file
from harness.disk.read import read_json
from harness.disk.write import make_folder, write_text
from harness.loop.result import Marker
from harness.study.archive import restore
from harness.study.choice import choices, choose, growth, validation_score
from harness.study.design import Design
from harness.study.index import Found, RunIndex
from harness.tasks.base import Task
from harness.tasks.metrics import metrics_of


@dataclass(frozen=True)
class PlannedRun:
    """A run that the study needs, and the job that makes it."""

    arm: str
    phase: str
    seed: int
    tuned: Mapping[str, Any]
    overrides: Sequence[str]
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.arm} seed {self.seed}"


def read_task(config: Mapping[str, Any], data: dict[str, str]) -> Task:
    """The task of a run, which reads its data. The fingerprint of the data is noted in `data`,
    under the digest of the task's config."""
    task: Task = build.make(config, "task")
    data[digest(config["task"])] = task.fingerprint
    return task


class Phases:
    """Runs a study.

    Args:
        design: as it was asked for, with a metric.
        study: its question, without runs.
        folder: outputs_dir/<experiment>.
        cells: arm -> the points of its grid; those added at an edge are appended.
        data: see `read_task`; of the data that were read already.
        job: (arm, phase, seed, tuned) -> the run.
        launch: starts jobs, given the overrides of each and the number of the first, and waits.
        force: run everything again.
    """

    def __init__(
        self,
        design: Design,
        study: Study,
        folder: Path,
        cells: dict[str, list[dict[str, Any]]],
        *,
        data: dict[str, str],
        job: Callable[[str, str, int, Mapping[str, Any]], PlannedRun],
        launch: Callable[[Sequence[Sequence[str]], int], object],
        force: bool,
    ):
        self.design, self.study, self.folder, self.cells = design, study, folder, cells
        self.data, self.job, self.launch, self.force = data, job, launch, force
        self.jobs: list[PlannedRun] = []
        self.launched: set[str] = set()

    def run(self) -> Analysis:
        """Tune, compare and report. Raises ValueError if the folder holds another study, the data
        changed, or a run did not finish."""
        self._check_folder()
        record = multirun.Multirun(
            name=multirun.STUDY,
            started=datetime.datetime.now(datetime.UTC).isoformat(),
            command=self.study.command,
            keys=self.study.varied_keys,
        )
        multirun.write(self.folder, record)
        if self.design.archive and not self.force:
            count = restore(Path(self.design.archive).expanduser(), self.folder)
            print(f"\n{count} runs restored from {self.design.archive}")
        chosen = {arm: cells[0] for arm, cells in self.cells.items()}  # {} if nothing is tuned
        if self.design.tune:
            tuned = self._tune()
            print(f"\n{choices(tuned)}")
            about = {arm: dataclasses.asdict(choice) for arm, choice in tuned.items()}
            self.study = dataclasses.replace(self.study, chosen=about)
            chosen = {arm: dict(choice.chosen) for arm, choice in tuned.items()}
        # By seed, so that a study that is interrupted holds whole pairs.
        self._finish(
            "compare", [(arm, chosen[arm], s) for s in self.design.seeds for arm in chosen]
        )
        self._write()
        analysis = report.write_report(self.folder, self.folder / "report", named=multirun.STUDY)
        print(f"\n{brief.text(analysis)}")
        print(f"\nreport: {self.folder / 'report'}")
        return analysis

    def _tune(self) -> dict[str, Choice]:
        """Run the grid of every arm and the points added at its edges; the choice of each arm."""
        design, grown = self.design, dict.fromkeys(self.cells, 0)
        name, seeds = str(design.metric), design.tuning_seeds
        while True:
            cells = [(arm, cell) for arm in self.cells for cell in self.cells[arm]]
            results = self._finish("tune", [(arm, cell, s) for arm, cell in cells for s in seeds])
            metric, left = metrics_of(results[0])[name], iter(results)
            points: dict[str, list[TuningPoint]] = {arm: [] for arm in self.cells}
            for arm, cell in cells:
                runs = [next(left) for _ in seeds]
                scores = [validation_score(run, name) for run in runs]
                diverged = sum(run["status"] == "failed" for run in runs)
                points[arm].append(TuningPoint(tuned=cell, scores=scores, diverged=diverged))
            may_grow = [arm for arm in self.cells if grown[arm] < design.max_growth]
            beyond = {arm: growth(points[arm], design.tune, metric) for arm in may_grow}
            more = {arm: cell for arm, cell in beyond.items() if cell is not None}
            if not more:
                break
            print(f"\nthe best is at an edge, so one more point for {', '.join(more)}")
            for arm, cell in more.items():
                self.cells[arm].append(cell)
                grown[arm] += 1
        return {arm: choose(points[arm], design.tune, metric, grown=grown[arm]) for arm in points}

    def _finish(
        self, phase: str, asked: Sequence[tuple[str, Mapping[str, Any], int]]
    ) -> list[Mapping[str, Any]]:
        """The results of the runs that are asked for (arm, tuned values, seed), in their order,
        after running those that have none.

        A run that failed otherwise than by divergence is run again. Raises ValueError if one ends
        so now, or if the data are not those of the runs on disk.
        """
        offset = self.design.seed_offset
        jobs = [self.job(arm, phase, seed + offset[arm], tuned) for arm, tuned, seed in asked]
        self.jobs = [job for job in self.jobs if job.phase != phase] + jobs
        keys = [digest(job.config) for job in jobs]  # one run may serve two arms
        before = self._find(jobs)
        self._check_places(jobs, keys)
        self._check_data(jobs, before)
        todo = {
            key: [*job.overrides, *(["force=true"] if found and found.result and again else [])]
            for job, key, found in zip(jobs, keys, before, strict=True)
            if ((again := _unusable(found) or self.force) or _changed(found))
            and key not in self.launched
        }
        print(f"\nphase {phase}: {len(jobs)} runs, {len(todo)} to do")
        if todo:
            self._write()
            self.launch(list(todo.values()), len(self.launched))
            self.launched |= set(todo)
            self._write()
        results, bad, stale = list[Mapping[str, Any]](), [], False
        for job, key, found, was in zip(jobs, keys, self._find(jobs), before, strict=True):
            old = found and was and found.written == was.written
            if why := _unusable(None if old and "force=true" in todo.get(key, ()) else found):
                bad.append(f"{job.name} {why}")
            elif file := _changed(found):  # it was started, and did not find it to be the same
                bad.append(f"{job.name} stands on {file}, which changed since")
                stale = True
            elif found and found.result is not None:
                results.append(found.result)
        if bad:
            remedy = "force=true runs everything again" if stale else "rerun the same command"
            raise ValueError(
                f"{len(bad)} of {len(jobs)} runs did not finish ({'; '.join(bad[:3])}"
                f"{'; ...' * (len(bad) > 3)}); {remedy}{'' if stale else ' to continue'}."
            )
        return results

    def _check_places(self, jobs: Sequence[PlannedRun], keys: Sequence[str]) -> None:
        """Raise ValueError if different runs have one folder."""
        places: dict[str, str] = {}
        for job, key in zip(jobs, keys, strict=True):
            place = job.config["run_dir"]
            if place is not None and places.setdefault(place, key) != key:
                raise ValueError(
                    f"several runs of {job.arm} have the run_dir {place}; let it depend on the "
                    "run, as in run_dir=...-${seed}."
                )

    def _check_data(self, jobs: Sequence[PlannedRun], found: Sequence[Found | None]) -> None:
        """Read the data before any job does, so that a mistake in them is reported once. Raises
        ValueError if runs on disk had other data."""
        for job, run in zip(jobs, found, strict=True):
            key = digest(job.config["task"])
            if key not in self.data:
                read_task(job.config, self.data)
            known = run.result["fingerprints"]["data"] if run and run.result else None
            if known not in (None, self.data[key]) and not self.force:
                raise ValueError(
                    f"the data changed since {job.name} was run; force=true runs everything "
                    "again, another outputs_dir keeps both."
                )

    def _check_folder(self) -> None:
        """Raise ValueError if the folder holds another study than this."""
        file = self.folder / "study.yaml"
        if not file.is_file():
            return
        other, ours = read_study(file), self.study
        fields = ("arms", "reference", "metric", "match", "tune", "tuning_seeds")
        different = [field for field in fields if getattr(other, field) != getattr(ours, field)]
        expected = next((e for e in other.expected or () if e["run"]), None)
        marker = self.folder / expected["run"] / "run.json" if expected else None
        if not different and expected and marker and marker.is_file():
            arm, free = expected["arm"], {"free": list(ours.free)}
            mine = self.job(arm, "tune", ours.seeds[0], self.cells[arm][0]).config
            theirs = read_json(marker, Marker, nonfinite=True)["config"]
            held = [dict(leaves(held_config({**config, **free}))) for config in (mine, theirs)]
            keys = sorted({*held[0], *held[1]})
            different = [key for key in keys if held[0].get(key) != held[1].get(key)]
        if different:
            raise ValueError(
                f"{self.folder} holds a study with other {', '.join(different)}; give another "
                "outputs_dir."
            )

    def _find(self, jobs: Sequence[PlannedRun]) -> list[Found | None]:
        """The jobs' runs on disk."""
        index = RunIndex(self.folder)  # a new one: it looks at the disk once, for the first job
        return [index.find(job.config, rescan=n == 0) for n, job in enumerate(jobs)]

    def _write(self) -> None:
        """Write study.yaml with the runs that are planned so far, and the folder of each: also the
        one that it will have, so that an unfinished study can be archived."""
        expected = []
        for job, found in zip(self.jobs, self._find(self.jobs), strict=True):
            path = Path(job.config["run_dir"] or self.folder / run_name(job.config))
            run = (found.path if found else path).relative_to(self.folder).as_posix()
            about = {name: getattr(job, name) for name in ("arm", "phase", "seed", "tuned")}
            expected.append({**about, "run": run})
        self.study = dataclasses.replace(self.study, expected=expected)
        make_folder(self.folder, "outputs_dir")
        write_text(self.folder / "study.yaml", study_text(self.study))


def _unusable(found: Found | None) -> str:
    """The reason to repeat a run, empty if there is none: divergence is an outcome."""
    if found is None or found.result is None:
        return "has no result"
    if found.result["status"] == "failed" and found.result.get("failure") != "NonFiniteLoss":
        return f"failed: {found.result['reason']}"
    return ""


def _changed(found: Found | None) -> str | None:
    """A file that a run has read and that has another sha256 now; None if there is none. The files
    of an archived run are not known; the table compares its fingerprints instead."""
    read = found and found.inputs
    return changed_file(read, times=False) if read else None
