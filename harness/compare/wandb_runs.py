"""The runs of a study as Weights & Biases is sent them: from their folders, an archive or a bundle.

A bundle is an archive (study.yaml, runs.jsonl) with one more file, wandb_runs.jsonl, which holds
all rows and samples.
"""

import dataclasses
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import wandb_run
from harness.compare.rows import identity, row
from harness.compare.study import Run, Study, study_text
from harness.disk.digest import digest
from harness.disk.read import read_json, read_json_lines, schema_of
from harness.disk.write import to_json, write_text
from harness.loop.result import Marked, Result

BUNDLE = "wandb_bundle"  # in a study's folder, with a bundle by the study's name
RUNS = "wandb_runs.jsonl"  # in a bundle: the runs as they are sent


@dataclass(frozen=True, kw_only=True)
class SentRun:
    """A run as it is sent.

    Args:
        key: of study, arm, phase, seed, tuned values and result: the same from its folder, an
            archive or a bundle.
        run_id: on the server, a part of the key: a run that serves two studies is there once for
            each. An earlier one takes its place, see `Server.placed`.
        tracked_id: that it had while it ran; "" for another, if it serves two arms.
        history: rows of metrics.jsonl, or of the curve that an archive keeps.
        samples: rows of samples.jsonl, where they are kept.
    """

    key: str
    run_id: str
    name: str
    group: str
    job_type: str
    tags: Sequence[str]
    config: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    result: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]] = ()
    tracked_id: str = ""
    offline: Sequence[str] = field(default=(), compare=False)  # its folders of offline tracking

    @property
    def described(self) -> dict[str, Any]:
        """The run's name, group and tags, as wandb.init takes them."""
        named = ("name", "group", "job_type", "tags", "config")
        return {name: getattr(self, name) for name in named}

    @property
    def sha256(self) -> str:
        """Identifies the run's description and its result, which is its rows' too."""
        return digest([self.described, self.result])


def sent_runs(study: Study, folder: Path) -> list[SentRun]:
    """The study's runs, from the bundle in `folder`, their own folders, or the archive's lines."""
    bundle = folder / RUNS
    lines = read_json_lines(bundle, schema_of(SentRun)) if bundle.is_file() else ()
    bundled = {fields["key"]: SentRun(**fields) for _, fields in lines}
    folders = _run_folders(folder)
    runs = list[SentRun]()
    used = {""}
    for run in study.runs:
        key = digest([study.name, identity(run), run.result])
        if key in bundled:
            runs.append(bundled[key])
            continue
        path = next(iter(folders.get(digest(run.result), [])), None)
        marker = read_json(path / "run.json", Marked, nonfinite=True) if path else Marked()
        tracked_id = marker.get("run_id") or ""
        if tracked_id in used:  # one run may serve two arms
            tracked_id = ""
        used.add(tracked_id)
        runs.append(_sent_run(study, run, path, key=key, tracked_id=tracked_id))
    return runs


def _sent_run(study: Study, run: Run, path: Path | None, *, key: str, tracked_id: str) -> SentRun:
    result = run.result
    kinds = [result["variant"], result.get("base"), result.get("task")]
    about = {name: result.get(name) for name in ("control_hash", "run_key")}
    return SentRun(
        key=key,
        run_id=key[:16],
        name=f"{run.arm}-s{run.seed}-{result['run_key'][:8]}",
        group=study.name,
        job_type=run.phase,
        tags=[str(kind) for kind in kinds if kind],
        config=wandb_run.config_of(
            run.config, study=study.name, arm=run.arm, environment=run.environment, **about
        ),
        history=_lines(path / "metrics.jsonl") if path else _archived_history(run),
        result=result,
        samples=_lines(path / "samples.jsonl") if path else (),
        tracked_id=tracked_id,
        offline=[str(p) for p in sorted(path.glob("wandb/offline-run-*"))] if path else (),
    )


def _archived_history(run: Run) -> list[dict[str, Any]]:
    """The rows that runs.jsonl keeps of a run, with the mean rank where it changed."""
    rows = {point["step"]: dict(point) for point in run.curve}
    history = run.result.get("rank_history") or []
    changing = [entry for entry in history if entry["ranks"]] if len(history) > 1 else []
    for entry in changing:
        step = entry["step"]
        rows.setdefault(step, {"step": step})["rank/mean"] = statistics.fmean(entry["ranks"])
    return [rows[step] for step in sorted(rows)]


def _run_folders(folder: Path) -> dict[str, list[Path]]:
    """Digest of a result -> the folders that hold it."""
    found: dict[str, list[Path]] = defaultdict(list)
    for marker in sorted(folder.rglob("run.json")):
        result = marker.with_name("result.json")
        if result.is_file():
            found[digest(Result.read(result))].append(marker.parent)
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's file, none if it is not there. Raises ValueError if it is damaged."""
    return [row for _, row in read_json_lines(path, dict[str, Any])] if path.is_file() else []


def write_bundle(study: Study, runs: Sequence[SentRun], folder: Path) -> Path:
    """Write what is sent to folder/wandb_bundle/<study>; a folder that is a bundle or an archive
    itself stays as it is. The bundle's place."""
    if (folder / RUNS).is_file() or (
        (folder / "runs.jsonl").is_file() and not _run_folders(folder)
    ):
        return folder
    bundle = folder / BUNDLE / re.sub(r"[^\w.+-]", "_", study.name)
    bundle.mkdir(parents=True, exist_ok=True)
    write_text(bundle / "study.yaml", study_text(study))
    write_text(bundle / "runs.jsonl", "".join(row(run) + "\n" for run in study.runs))
    sent = (to_json(dataclasses.asdict(dataclasses.replace(run, offline=()))) for run in runs)
    write_text(bundle / RUNS, "".join(json.dumps(run, ensure_ascii=False) + "\n" for run in sent))
    return bundle
