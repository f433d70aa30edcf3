"""An archive's runs, laid out again as finished ones, so that a study need not repeat them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.compare.rows import read_rows
from harness.config.identity import run_name
from harness.disk import locks
from harness.loop.folder import RunFolder
from harness.study.index import ARCHIVED, RunIndex


def restore(archive: Path, folder: Path) -> int:
    """Lay out archived runs below `folder` as train.py leaves finished ones, without adapters.

    A run that is there already stays as it is. A run that failed for another reason than divergence
    is left out, since it must be run again.

    Args:
        archive: a runs.jsonl, or a folder that has one.
        folder: outputs_dir/<experiment>.

    Returns how many were restored. Raises ValueError if there is no such file, or for a line that
    is no run.
    """
    file = archive / "runs.jsonl" if archive.is_dir() else archive
    if not file.is_file():
        raise ValueError(f"archive: there is no {file}.")
    index, count = RunIndex(folder), 0
    for run in read_rows(file):
        config = {**run.config, "outputs_dir": str(folder.parent), "run_dir": None}
        result, found = run.result, index.find(config)
        if not (run.complete or run.diverged) or (found and found.result):
            continue
        place = RunFolder(
            folder / ARCHIVED / run_name(config), result["run_key"], result["fingerprints"]
        )
        try:
            place.create(config)
        except locks.Busy:  # the same study, started twice, is laying it out
            continue
        place.write_json("environment.json", run.environment)
        place.write_lines("metrics.jsonl", [_logged(row) for row in run.curve])
        if run.complete:  # without a line if it never looked at test
            judged = enumerate(run.correct or "")
            rows = [{"split": "test", "row": i, "correct": c == "1"} for i, c in judged]
            place.write_lines("predictions.jsonl", rows)
        place.write_json("result.json", result)
        count += 1
    return count


def _logged(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of metrics.jsonl has norms by layer where an archive has their mean."""
    return {f"{key}/mean" if key.startswith("norm/") else key: v for key, v in row.items()}
