"""Read a study from disk, and refuse to put side by side what was not held alike.

A study's folder is one of three:
    outputs/<experiment>     study.yaml and the folders of its runs
    outputs/<experiment>     run folders alone, of a plain multirun: arms are what differs
    results/<study>          study.yaml and runs.jsonl, one run a line
"""

import contextlib
import dataclasses
import json
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from harness.compare import arms, multirun
from harness.compare.multirun import Multirun
from harness.compare.types import Run, Study
from harness.config.identity import at, control_hash, held_config, leaves, without
from harness.disk.read import check, read_json, read_json_lines, read_yaml
from harness.disk.write import to_json
from harness.loop import schemas
from harness.tasks.metrics import metrics_of
from harness.words import counted, did_you_mean

ALL = "all"  # instead of a multirun's name: every run of the folder
NORMS = ("norm/A", "norm/B", "norm/relative")
DEFAULTS = Path(__file__).parents[2] / "conf" / "config.yaml"
_STUDY_FIELDS = {field.name: field for field in dataclasses.fields(Study) if field.name != "runs"}
_RUN_FIELDS = [field.name for field in dataclasses.fields(Run)]
_PLACES = ("outputs_dir", "run_dir")  # where it was, on whose machine: nobody's business


# ---- one run ------------------------------------------------------------------------------------


def row(run: Run) -> str:
    """A run as a line of runs.jsonl; `read_rows` gives back an equal run."""
    fields = {name: getattr(run, name) for name in _RUN_FIELDS}
    return json.dumps(to_json(fields), ensure_ascii=False, allow_nan=False)


def read_rows(path: Path) -> list[Run]:
    """The runs of a runs.jsonl. Raises ValueError naming file and line where it is not one."""
    runs: list[Run] = []
    known: dict[str, tuple[int, Run]] = {}
    for number, fields in read_json_lines(path, schemas.Row):
        where = f"{path}, line {number}"
        kept: dict[str, Any] = {**fields}
        run = Run(**{name: kept[name] for name in _RUN_FIELDS})
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
        quick: leave out its curve and what is known of single items, which scores do not need.

    Raises ValueError naming the file that is missing or corrupt.
    """
    result = schemas.read_result(path / "result.json")
    marker = path / "run.json"
    if not marker.is_file():
        raise ValueError(
            f"{path / 'result.json'} was not written by train.py: run.json is missing beside it."
        )
    config = read_json(marker, schemas.Marker, nonfinite=True)["config"]
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
    for number, line in read_json_lines(path, schemas.Prediction):
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
    for _, logged in read_json_lines(path, schemas.Logged) if path.is_file() else ():
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
    schemas.check_written(result, where)
    check(schemas.Config, run.config, f"{where}: config")
    check(schemas.Environment, run.environment, f"{where}: environment")
    schemas.check_same_run(result, run.config, where)
    _check_curve(run, where)
    sessions = result.get("sessions", [])
    if not isinstance(sessions, list) or not all(
        isinstance(s, Mapping)
        and "after_step" in s
        and isinstance(s.get("differs"), list)
        and all(isinstance(phrase, str) for phrase in s["differs"])
        for s in sessions[1:]
    ):
        raise ValueError(f"{where} is not a result that train.py wrote: its sessions are no list.")
    if not run.complete:
        if run.diverged and "metrics" not in result and "classes" not in result:
            raise ValueError(f"{where} lacks classes.")
        return
    if run.phase == "compare" and result["test"] is None:
        raise ValueError(f"{where} has no test score: it was run with train.evaluate_test=false.")
    for split in ("validation", "test"):
        for metric in metrics_of(result) if result[split] is not None else ():
            schemas.check_finite(result, split, metric, where)
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


# ---- study.yaml ---------------------------------------------------------------------------------


def study_text(study: Study) -> str:
    """study.yaml: everything about a study but its runs."""
    fields = json.loads(json.dumps({name: getattr(study, name) for name in _STUDY_FIELDS}))
    fields = {k: v for k, v in fields.items() if v or k not in ("varied", "notes")}
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=100)


def read_study(path: Path) -> Study:
    """A study without its runs, from study.yaml. Raises ValueError for what is not one."""
    fields = read_yaml(path, dict[str, Any])
    for name in fields:
        if name not in _STUDY_FIELDS:
            raise ValueError(
                f"{path} holds the unknown key {name}.{did_you_mean(name, _STUDY_FIELDS)}"
            )
    check(schemas.StudyFile, fields, str(path))
    for run in (expected["run"] for expected in fields.get("expected") or ()):
        if run is not None and (Path(run).is_absolute() or ".." in Path(run).parts):
            raise ValueError(f"{path}: the run {run} is outside of the study's folder.")
    return Study(**fields)


# ---- a folder -----------------------------------------------------------------------------------


def load_study(
    folder: Path,
    *,
    reference: str | None = None,
    metric: str | None = None,
    unfinished: bool = False,
    named: str | None = None,
    varied: Sequence[str] = (),
    quick: bool = False,
) -> Study:
    """The study in a folder, with its runs in the order of the study.

    Args:
        reference, metric: instead of the study's own.
        unfinished: take what is finished of it, however little.
        named: one of several multiruns in the folder; ALL: every run. None: the last one.
        varied: keys in which the runs may differ that no record has.
        quick: see `read_folder`.

    Raises ValueError for a folder that is empty or somebody else's, runs that were not held alike
    (naming the keys), missing runs (naming them), a tuning that is not finished, unequal tuning
    budgets, an unknown reference or metric, another metric than the one that a study was tuned by.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}.")
    if not varied and taken(folder, named) == multirun.STUDY:
        study = read_study(folder / "study.yaml")
        study = dataclasses.replace(study, runs=_study_runs(study, folder, unfinished))
    elif (folder / "runs.jsonl").is_file() and (folder / "study.yaml").is_file():
        raise ValueError(
            f"{folder} is an archive, whose arms are in its study.yaml; leave --varied and "
            "--multirun out."
        )
    elif (folder / "runs.jsonl").is_file():
        raise ValueError(f"{folder} has runs.jsonl, but not the study.yaml that belongs to it.")
    else:
        study = _plain_multirun(folder, named, varied, quick)
    if not study.runs:
        raise ValueError(f"{folder} holds no finished run.")
    check_held(study.runs, varied=study.varied_keys)
    _check_named(study)
    if not unfinished:
        _check_tuned(study)
        check_budgets(study)
    if reference is not None:
        study = _with_reference(study, reference)
    for name in (study.metric, metric or study.metric):
        if name not in study.metrics:
            raise ValueError(
                f"there is no metric {name}; there are {', '.join(study.metrics)}."
                f"{did_you_mean(name, study.metrics)}"
            )
    if metric is not None and metric != study.metric:
        if study.tune:
            raise ValueError(
                f"the rates of {study.name} were chosen by {study.metric} on validation, so that "
                f"it is compared by {study.metric} alone; {metric} is in the second table."
            )
        study = dataclasses.replace(study, metric=metric)
    for name in (study.reference, *study.primary):
        if name not in study.arms:
            raise ValueError(f"the study has no arm {name}.{did_you_mean(name, study.arms)}")
    return study


def taken(folder: Path, named: str | None = None) -> str:
    """The multirun of the folder that is compared: the one named, else the last that varied
    anything, a study among them; ALL where there is none. Raises ValueError for a name that is
    not there."""
    records, study = multirun.read_all(folder), (folder / "study.yaml").is_file()
    names = [r.name for r in records if r.name != multirun.STUDY] + [multirun.STUDY] * study
    if named is not None:
        if named not in (ALL, *names):
            there = f"; there are {', '.join(names)}" if names else "; none is recorded there"
            raise ValueError(
                f"{folder} has no multirun {named}{there}.{did_you_mean(named, names)}"
            )
        return named
    last = [r.name for r in records if r.name in names and (r.keys or r.name == multirun.STUDY)]
    return last[-1] if last else multirun.STUDY if study else ALL


def _check_named(study: Study) -> None:
    """Raise ValueError if a run is another than the study calls it: other values than it was tuned
    to or its arm has, another seed, or not the rate that was chosen."""
    for run in study.runs:
        wrong = [
            f"{key} is {at(run.config, key)!r}, not {value!r}"
            for key, value in {**_settings(study.arms.get(run.arm, ())), **run.tuned}.items()
            if not _equal(at(run.config, key if key != "variant" else "variant.name"), value)
        ]
        if run.seed != run.config["seed"]:
            wrong.append(f"seed is {run.config['seed']}, not {run.seed}")
        if run.phase == "compare" and run.arm in study.chosen:
            wrong += [
                f"{key} is {run.tuned.get(key)!r}, and {value!r} was chosen"
                for key, value in study.chosen[run.arm]["chosen"].items()
                if not _equal(run.tuned.get(key), value)
            ]
        if wrong:
            about = {"arm": run.arm, "phase": run.phase, "seed": run.seed, "tuned": run.tuned}
            raise ValueError(
                f"a run is not the one that {study.name} calls {_describe(about)}: "
                f"{'; '.join(wrong)}."
            )


def _settings(overrides: Sequence[str]) -> dict[str, Any]:
    """The values of an arm's overrides that are one number or word, the last of each key."""
    found: dict[str, str] = {}
    for override in overrides:
        key, _, text = override.lstrip("+").partition("=")
        found.pop(key, None)
        if re.fullmatch(r"[\w.+-]+", text):
            found[key] = text
    return found


def _equal(value: Any, other: Any) -> bool:
    """Of a setting and a value or a text of it; true of what is no single value."""
    if isinstance(value, Mapping | list):
        return True
    try:
        return math.isclose(float(value), float(other), rel_tol=1e-5)
    except (TypeError, ValueError):
        words = [{"none": "null"}.get(str(v).lower(), str(v).lower()) for v in (value, other)]
        return words[0] == words[1]


def _check_tuned(study: Study) -> None:
    """Raise ValueError if a study was stopped between its phases."""
    if study.expected is not None and all(run["phase"] == "tune" for run in study.expected):
        raise ValueError(
            f"the tuning of {study.name} is not finished; continue it with: {study.command}"
        )


def _study_runs(study: Study, folder: Path, unfinished: bool) -> list[Run]:
    """Of every run that is expected: its folder, or its line of runs.jsonl."""
    rows = folder / "runs.jsonl"
    archived = {identity(run): run for run in read_rows(rows)} if rows.is_file() else {}
    if study.expected is None:
        return list(archived.values())
    runs, missing = [], []
    for wanted in study.expected:
        arm, phase, seed = wanted["arm"], wanted["phase"], wanted["seed"]
        key = _identity(arm, phase, seed, wanted["tuned"])
        path = folder / wanted["run"] if wanted.get("run") else None
        if path is not None and (path / "result.json").is_file():
            runs.append(read_folder(path, arm, phase, seed, wanted["tuned"]))
        elif key in archived:
            runs.append(archived[key])
        else:
            missing.append(_describe(wanted))
    if missing and not unfinished:
        listed = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if missing[6:] else "")
        raise ValueError(
            f"{len(missing)} of {len(study.expected)} runs of the study {study.name} are missing: "
            f"{listed}; continue it with: {study.command}"
        )
    return runs


def identity(run: Run) -> str:
    """The values that tell a run from the others of its study."""
    return _identity(run.arm, run.phase, run.seed, run.tuned)


def _identity(arm: str, phase: str, seed: int, tuned: Mapping[str, Any]) -> str:
    return json.dumps([arm, phase, seed, tuned], sort_keys=True)


def _describe(wanted: Mapping[str, Any]) -> str:
    tuned = "".join(f" {key}={arms.short(value)}" for key, value in wanted["tuned"].items())
    return f"{wanted['arm']} ({wanted['phase']}, seed {wanted['seed']}{tuned})"


def _plain_multirun(folder: Path, named: str | None, varied: Sequence[str], quick: bool) -> Study:
    """A study of the run folders below `folder`: nothing named in advance, nothing tuned.

    Args:
        named: the multirun whose runs to take, see `taken`.
        varied: the keys that all runs may differ in.
    """
    name = ALL if varied else taken(folder, named)
    record = next((r for r in multirun.read_all(folder) if r.name == name), None)
    if record is not None:
        return _recorded(folder, record, quick)
    studies = {path.parent for path in folder.rglob("study.yaml")} - {folder}
    studies -= {path.parent for path in folder.rglob("runs.jsonl")}  # reports
    if studies:
        names = ", ".join(sorted(path.relative_to(folder).as_posix() for path in studies))
        raise ValueError(f"{folder} holds several studies ({names}); give one of them.")
    paths = sorted({path.parent for path in folder.rglob("result.json")})
    runs = {path: read_folder(path, "", "compare", quick=quick) for path in paths}
    started = sorted(path.parent for path in folder.rglob("run.json") if path.parent not in runs)
    if not runs:
        raise ValueError(f"{folder} holds no finished run.")
    notes = []
    if started:
        names = ", ".join(path.name for path in started[:6]) + ", ..." * bool(started[6:])
        notes.append(
            f"{counted(len(started), 'run')} in {folder.name} did not finish and "
            f"{'is' if len(started) == 1 else 'are'} left out ({names}); the command that started "
            "them continues them."
        )
    places = [(str(path), run) for path, run in runs.items()]
    if varied:
        places, more = _largest_alike(folder, places, varied)
        notes += more
    name = "-".join([folder.resolve().name, *(key.rpartition(".")[2] for key in varied)])
    study = plain_study(name, places, varied)
    return dataclasses.replace(study, notes=notes)


def _recorded(folder: Path, record: Multirun, quick: bool) -> Study:
    """The study of a multirun's runs, as far as they are finished."""
    outside = [Path(member.run_dir) for member in record.members if member.run_dir]
    markers = {*folder.rglob("run.json"), *(path / "run.json" for path in outside)}
    by_question: dict[str, list[tuple[Mapping[str, Any], Path]]] = defaultdict(list)
    for marker in sorted(markers):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            config = {**read_json(marker, schemas.Marker, nonfinite=True)["config"]}
            by_question[multirun.asked(config)].append((config, marker.with_name("result.json")))
    taken: dict[Path, dict[str, Any]] = {}
    missing = []
    for member in record.members:
        files = [
            file
            for config, file in by_question[member.asked]
            if file.is_file() and member.is_run(config)
        ]
        if files:
            taken[max(files, key=lambda file: file.stat().st_mtime)] = dict(member.values)
        else:
            missing.append(str(member))
    if not taken:
        raise ValueError(
            f"no run of the multirun {record.name} in {folder} has finished; continue it with: "
            f"{record.command}"
        )
    runs = [read_folder(file.parent, "", "compare", quick=quick) for file in taken]
    _check_one_task(runs, record.keys)
    places = [str(file.parent) for file in taken]
    check_held(runs, places, record.keys)
    name = f"{folder.resolve().name}-{record.name}"
    study = _of_arms(name, runs, list(taken.values()), record.keys)
    notes = []
    if missing:
        names = "; ".join(missing[:4]) + "; ..." * bool(missing[4:])
        notes.append(
            f"{len(missing)} of {counted(len(record.members), 'run')} of this multirun "
            f"{'has' if len(missing) == 1 else 'have'} no result ({names}): interrupted, or failed "
            "before they had one. The same command runs what is missing."
        )
    if record.inapplicable:
        notes.append(
            f"{counted(record.inapplicable, 'job')} of this multirun did not apply: the variant "
            "has no such option."
        )
    results = {marker.with_name("result.json") for marker in markers}
    if others := sum(file.is_file() for file in results - set(taken)):
        notes.append(
            f"{counted(others, 'other run')} in {folder.name} {'is' if others == 1 else 'are'} no "
            "part of this multirun and left out."
        )
    return dataclasses.replace(study, command=record.command, notes=notes)


def _largest_alike(
    folder: Path, places: Sequence[tuple[str, Run]], varied: Sequence[str]
) -> tuple[list[tuple[str, Run]], list[str]]:
    """The largest group of runs that were held alike but for the varied keys, and a sentence of the
    others."""
    for key in varied:
        if not any(arms.is_there(run.config, key) for _, run in places):
            known = sorted({key for _, run in places for key, _ in leaves(run.config)})
            raise ValueError(f"--varied names the key {key}, which no run has."
                             f"{did_you_mean(key, known)}")  # fmt: skip
    free = [*free_keys([run for _, run in places]), *varied]
    known_function = _known([run for _, run in places])
    groups: dict[str, list[tuple[str, Run]]] = defaultdict(list)
    for place, run in places:
        groups[_hash_of(run, free, varied, known_function)].append((place, run))
    kept = max(groups.values(), key=len)
    left = len(places) - len(kept)
    if not left:
        return kept, []
    were = "is" if left == 1 else "are"
    return kept, [
        f"{counted(left, 'other run')} in {folder.name} {were} left out: {were} not held alike."
    ]


def plain_study(
    name: str, places: Sequence[tuple[str, Run]], varied: Sequence[str] | None = None
) -> Study:
    """A study of runs that no record and no study asked for: their arms are what differs.

    Args:
        places: where each run is, and the run.
        varied: the held keys that they may differ in; None or none: found from the runs.

    Raises ValueError if they were not held alike, or one is there twice.
    """
    runs = [run for _, run in places]
    free = free_keys(runs)
    if not varied:
        varied = arms.found_varied(runs, free)
        if varied is None:
            raise ValueError(
                f"the runs of {name} differ in {arms.differing_text(runs, free)} and are not every "
                "combination of these values, so they are not one comparison; --varied "
                f"{arms.differing(runs, free)[0]} compares the most that differ in that alone, and "
                "outputs_dir=... keeps runs apart."
            )
    _check_one_task(runs, varied)
    check_held(runs, [place for place, _ in places], varied)
    values = arms.values_of(runs, [*free, *varied])
    found: dict[tuple[str, int], str] = {}
    for (place, run), own in zip(places, values, strict=True):
        arm = arms.name_of(own) or run.config["variant"]["name"]
        if (twin := found.setdefault((arm, run.seed), place)) != place:
            raise ValueError(
                f"{twin} and {place} are one run kept twice ({arm}, seed {run.seed}); give a "
                "folder that holds one of them."
            )
    return _of_arms(name, runs, values, [])


def _of_arms(
    name: str, runs: Sequence[Run], values: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> Study:
    """The study whose arms are the different `values`.

    Args:
        values: of each run.
        keys: that were swept; the arms are in the order of the values then. Empty: by name.
    """
    of_arm: dict[str, Mapping[str, Any]] = {}
    by_arm: dict[str, list[Run]] = defaultdict(list)
    for run, own in zip(runs, values, strict=True):
        arm = arms.name_of(own) or run.config["variant"]["name"]
        of_arm.setdefault(arm, own)
        by_arm[arm].append(run)
    ordered = list(of_arm) if keys else sorted(of_arm, key=arms.natural)
    default = _default_variant()
    variant_of = {arm: by_arm[arm][0].config["variant"]["name"] for arm in ordered}
    reference = next((arm for arm in ordered if variant_of[arm] == default), ordered[0])
    ordered = [reference, *(arm for arm in ordered if arm != reference)]
    varied = {arm: dict(of_arm[arm]) for arm in ordered} if len(ordered) > 1 else {}
    changed = list(dict.fromkeys(key for own in varied.values() for key in own))
    return Study(
        name=name,
        question=f"varied: {varied_text(varied)}; all else was held alike." if varied else
        "A plain multirun: no comparison was named in advance.",
        command="",
        commit=runs[0].environment.get("commit"),
        arms={
            arm: arms.with_values([f"variant={variant_of[arm]}"],
                                  {k: v for k, v in of_arm[arm].items() if k != "variant"})
            for arm in ordered
        },
        reference=reference,
        primary=ordered[1:],
        metric=runs[0].result.get("primary_metric", "accuracy"),
        free=sorted({*free_keys(runs), *(key for key in changed if not _of_variant(key))}),
        tuning_seeds=[],
        seeds=sorted({run.seed for run in runs}),
        varied=varied,
        runs=[
            dataclasses.replace(run, arm=arm)
            for arm in ordered
            for run in sorted(by_arm[arm], key=lambda run: run.seed)
        ],
    )  # fmt: skip


def _of_variant(key: str) -> bool:
    return key.partition(".")[0] == "variant"


def varied_text(varied: Mapping[str, Mapping[str, Any]]) -> str:
    """rank (1, 4, 16) and dropout (0, 0.1)"""
    values: dict[str, list[str]] = {}
    for own in varied.values():
        for key, value in own.items():
            if (text := arms.short(value)) not in values.setdefault(key, []):
                values[key].append(text)
    return " and ".join(f"{key} ({', '.join(listed)})" for key, listed in values.items())


def _check_one_task(runs: Sequence[Run], varied: Sequence[str]) -> None:
    """Raise ValueError if the runs were scored by different metrics."""
    metrics = list(dict.fromkeys(tuple(metrics_of(run.result)) for run in runs))
    tasks = list(dict.fromkeys(str(run.result.get("task")) for run in runs))
    if len(metrics) > 1 or ("task" in varied and len(tasks) > 1):
        raise ValueError(
            f"the runs are of the tasks {' and '.join(tasks)}, whose scores are no one table; give "
            "each task an outputs_dir of its own, and compare pools the effects of several folders."
        )


def _default_variant() -> str | None:
    """The variant in the defaults list of conf/config.yaml; None outside the repository."""
    if not DEFAULTS.is_file():
        return None
    defaults = yaml.safe_load(DEFAULTS.read_text())["defaults"]
    return next((d["variant"] for d in defaults if isinstance(d, dict) and "variant" in d), None)


def _with_reference(study: Study, reference: str) -> Study:
    if reference not in study.arms:
        raise ValueError(
            f"the study has no arm {reference}; it has {', '.join(study.arms)}."
            f"{did_you_mean(reference, study.arms)}"
        )
    if reference == study.reference:
        return study
    if study.expected is not None:  # its comparisons were named in advance, and are others
        return dataclasses.replace(study, reference=reference, primary=[], reference_named=False)
    family = {study.reference, *study.primary} - {reference}
    primary = [arm for arm in study.arms if arm in family]
    return dataclasses.replace(study, reference=reference, primary=primary)


# ---- what must be alike -------------------------------------------------------------------------


def free_keys(runs: Sequence[Run]) -> list[str]:
    """The keys that any of the runs declares free, which are free for all: a run may have been
    made before the study that it serves in."""
    return sorted({key for run in runs for key in run.config["free"]})


def _known(runs: Sequence[Run]) -> dict[str, str]:
    """The function of a base that some of the runs record. A run of before it was recorded is held
    against the others without it."""
    recorded = [run.result["fingerprints"] for run in runs]
    return next(({"function": f["function"]} for f in recorded if "function" in f), {})


def _hash_of(run: Run, free: Sequence[str], varied: Sequence[str], known: Mapping[str, str]) -> str:
    """Its control hash, were these keys free, or swept."""
    return control_hash({**run.config, "free": free}, _prints(run, varied, known))


def _prints(run: Run, varied: Sequence[str], known: Mapping[str, str]) -> dict[str, Any]:
    """Its fingerprints but for those that the varied keys change."""
    return without({**known, **run.result["fingerprints"]}, arms.excused(varied))


def check_held(runs: Sequence[Run], places: Sequence[str] = (), varied: Sequence[str] = ()) -> None:
    """Raise ValueError if control hashes differ, naming the keys that do.

    Args:
        places: where the runs are, if nothing asked for them to be in one table.
        varied: keys that were swept, in which they may differ.
    """
    free, known = sorted({*free_keys(runs), *varied}), _known(runs)

    def flat(run: Run) -> dict[str, Any]:
        about: dict[str, Any] = {"fingerprints": _prints(run, varied, known)}
        if "base" in about["fingerprints"]:
            about["base"] = run.result.get("definition")
        return dict(leaves({**about, **held_config({**run.config, "free": free})}))

    first = runs[0]
    hashes = [_hash_of(run, free, varied, known) for run in runs]
    at = next((at for at, found in enumerate(hashes) if found != hashes[0]), None)
    if at is None:
        return
    names = places or [f"{run.arm or run.result['variant']} seed {run.seed}" for run in runs]
    ours, theirs = flat(first), flat(runs[at])
    keys = sorted({*ours, *theirs}, key=lambda key: (key.startswith("fingerprints."), key))
    differing = [
        f"{key}: {ours.get(key)!r} and {theirs.get(key)!r}"
        for key in keys
        if ours.get(key) != theirs.get(key)
        and (not key.startswith("base") or "base" not in {*ours, *theirs})  # one says nothing of it
    ]
    remedy = " Move what does not belong there elsewhere; outputs_dir=... keeps runs apart."
    raise ValueError(
        f"{names[0]} and {names[at]} were not held alike and do not belong in one table; "
        f"{'; '.join(differing)}.{remedy if places else ''}"
    )


def check_budgets(study: Study) -> None:
    """Raise ValueError unless every arm was tuned over as many points, growth at an edge aside, and
    every point with as many seeds."""
    if not study.tune:
        return
    budgets = {}
    for arm in study.arms:
        cells = Counter(
            json.dumps(run.tuned, sort_keys=True)
            for run in study.runs
            if run.arm == arm and run.phase == "tune"
        )
        for cell, number in cells.items():
            if number != len(study.tuning_seeds):
                raise ValueError(
                    f"{arm} was tuned at {cell} with {number} seeds, not with the study's "
                    f"{len(study.tuning_seeds)}."
                )
        grown = study.chosen.get(arm, {}).get("grown", 0)
        budgets[arm] = len(cells) - max(0, grown)
    if len(set(budgets.values())) > 1:
        listed = ", ".join(f"{arm} {points}" for arm, points in budgets.items())
        raise ValueError(
            f"tuning budgets differ by more than counted growth at an edge (points: {listed}); a "
            "comparison of such arms would not be fair."
        )
