"""One run of a study: a line of runs.jsonl, written and read, or read from the run's own folder."""

import dataclasses
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from harness.compare.study import Run
from harness.config.identity import without
from harness.disk.read import check, read_json, read_json_lines, schema_of
from harness.disk.write import to_json
from harness.loop.result import Config, Environment, Logged, Marker, Prediction, Result
from harness.tasks.metrics import metrics_of

NORMS = ("norm/A", "norm/B", "norm/relative")
_RUN_FIELDS = [field.name for field in dataclasses.fields(Run)]
_PLACES = ("outputs_dir", "run_dir")  # paths of the machine that it ran on, which are private
_Row = schema_of(
    Run,
    result=dict[str, Any],
    curve=list[Logged],
    correct=Annotated[str, Field(pattern="^[01]*$")] | None,
)


def row(run: Run) -> str:
    """A run as a line of runs.jsonl; `read_rows` gives back an equal run."""
    fields = {name: getattr(run, name) for name in _RUN_FIELDS}
    return json.dumps(to_json(fields), ensure_ascii=False, allow_nan=False)


def read_rows(path: Path) -> list[Run]:
    """The runs of a runs.jsonl. Raises ValueError naming file and line where it is not one."""
    runs: list[Run] = []
    known: dict[str, tuple[int, Run]] = {}
    for number, fields in read_json_lines(path, _Row):
        where = f"{path}, line {number}"
        fields["result"] = Result.from_json(fields["result"], where)
        run = Run(**{name: fields[name] for name in _RUN_FIELDS})
        _check_run(run, where)
        if (earlier := known.setdefault(identity(run), (number, run)))[1] is run:
            runs.append(run)
        elif earlier[1] != run:
            raise ValueError(
                f"{path}, lines {earlier[0]} and {number} are two results of one run "
                f"({run.arm}, {run.phase}, seed {run.seed}); remove the one that is not it."
            )
    return runs


def read_folder(
    path: Path,
    arm: str,
    phase: str,
    seed: int | None = None,
    tuned: Mapping[str, Any] | None = None,
    *,
    quick: bool = False,
) -> Run:
    """A finished run from its folder, under the name that a study gives it.

    Args:
        quick: leave out its curve and its judged items, which scores do not need.

    Raises ValueError naming the file that is missing or corrupt.
    """
    result = Result.read(path / "result.json")
    marker = path / "run.json"
    if not marker.is_file():
        raise ValueError(f"{path} has result.json, but no run.json, so train.py did not write it.")
    config = read_json(marker, Marker, nonfinite=True)["config"]
    run = Run(
        arm=arm,
        phase=phase,  # type: ignore[arg-type]
        seed=result.get("seed", 0) if seed is None else seed,
        tuned=dict(tuned or {}),
        result=result,
        config=to_json(without(dict(config), _PLACES)),
        environment=read_json(path / "environment.json", dict[str, Any]),
        curve=[],
        correct=None,
    )
    _check_run(run, str(path))
    if quick:
        return run
    correct = _correct(path / "predictions.jsonl", result) or None if run.complete else None
    curve = _curve(path / "metrics.jsonl")
    run = dataclasses.replace(run, curve=curve, correct=correct)
    _check_curve(run, str(path / "metrics.jsonl"))
    return run


def _correct(path: Path, result: Mapping[str, Any]) -> str:
    """1 or 0 for each row of test that was judged. Where a metric is over judged rows, all are, or
    as many as answers were generated; elsewhere a row has a loss alone."""
    judged = any(metric.per_item for metric in metrics_of(result).values())
    needed = "correct" if judged and "generated" not in result["validation"] else "loss_nats"
    found = []
    for number, line in read_json_lines(path, Prediction):
        if needed not in line:
            raise ValueError(f"{path}, line {number} is no prediction: it needs {needed}.")
        if line["split"] == "test" and "correct" in line:
            found.append("1" if line["correct"] else "0")
    if judged and len(found) != (expected := _judged(result)):
        raise ValueError(
            f"{path} is not that of its result.json: {len(found)} rows of test have correct, and "
            f"the result counts {expected}."
        )
    return "".join(found)


def _judged(result: Mapping[str, Any]) -> int | None:
    """Counts the rows of test that a result says were judged."""
    test = result["test"] or {"n": 0}
    return test.get("generated", test.get("n"))


def _curve(path: Path) -> list[dict[str, Any]]:
    rows = []
    for _, logged in read_json_lines(path, Logged) if path.is_file() else ():
        kept = {
            key: value
            for key, value in logged.items()
            if value is not None and (key == "train/loss_nats" or key.startswith("eval/"))
        }
        for norm in NORMS:
            values = [v for key, v in logged.items() if key.startswith(norm + "/")]
            numbers = [value for value in values if isinstance(value, int | float)]
            if values and len(numbers) == len(values):
                kept[norm] = statistics.fmean(numbers)
        if kept:
            rows.append({"step": logged["step"], **kept})
    return rows


def _check_run(run: Run, where: str) -> None:
    """Raise ValueError, beginning with `where`, unless a run can stand in a report."""
    result = run.result
    check(Config, run.config, f"{where}: config")
    check(Environment, run.environment, f"{where}: environment")
    result.check_same_run(run.config, where)
    _check_curve(run, where)
    if not run.complete:
        if run.diverged and "metrics" not in result and "classes" not in result:
            raise ValueError(f"{where} lacks classes.")
        return
    if run.phase == "compare" and result["test"] is None:
        raise ValueError(f"{where} has no test score: it was run with train.evaluate_test=false.")
    for split in ("validation", "test"):
        for metric in metrics_of(result) if result[split] is not None else ():
            result.check_finite(split, metric, where)
    if run.correct is not None and len(run.correct) != (expected := _judged(result)):
        raise ValueError(
            f"{where}: correct has {len(run.correct)} rows of test, and the result counts "
            f"{expected}."
        )


def _check_curve(run: Run, where: str) -> None:
    """Raise ValueError, beginning with `where`, if something that a curve shows is no number."""
    for point in run.curve:
        for key, value in point.items():
            if key == "train/loss_nats" or key in NORMS or key.startswith("eval/"):
                check(float | None, value, f"{where}: step {point['step']}: {key}")


def identity(run: Run) -> str:
    """The values that tell a run from the others of its study."""
    return identity_of(run.arm, run.phase, run.seed, run.tuned)


def identity_of(arm: str, phase: str, seed: int, tuned: Mapping[str, Any]) -> str:
    return json.dumps([arm, phase, seed, tuned], sort_keys=True)
