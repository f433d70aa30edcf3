"""Read a study from disk, and refuse to put side by side what was not held alike.

A study's folder is one of three:
    outputs/<experiment>     study.yaml and the folders of its runs
    outputs/<experiment>     run folders alone, of a plain multirun: arms are what differs
    results/<study>          study.yaml and runs.jsonl, one run a line
"""

import dataclasses
import json
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from harness import schemas
from harness.compare.types import Run, Study
from harness.disk import check, read_json, read_json_lines, read_yaml
from harness.keys import at, control_hash, held_config, without
from harness.metrics import metrics_of
from harness.run import to_json
from harness.spelling import did_you_mean

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
    runs = []
    for number, fields in read_json_lines(path, schemas.Row):
        where = f"{path}, line {number}"
        kept: dict[str, Any] = {**fields}
        run = Run(**{name: kept[name] for name in _RUN_FIELDS})
        _check_run(run, where)
        runs.append(run)
    return runs


def read_folder(
    path: Path,
    arm: str,
    phase: str,
    seed: int | None = None,
    tuned: Mapping[str, Any] | None = None,
) -> Run:
    """A finished run from its folder, under the name that a study gives it.

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
    """How many rows of test a result says were judged."""
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
) -> Study:
    """The study in a folder, with its runs in the order of the study.

    Args:
        reference, metric: instead of the study's own.
        unfinished: take what is finished of it, however little.

    Raises ValueError for a folder that is empty or somebody else's, runs that were not held alike
    (naming the keys), missing runs (naming them), a tuning that is not finished, unequal tuning
    budgets, an unknown reference or metric, another metric than the one that a study was tuned by.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}.")
    if (folder / "study.yaml").is_file():
        study = read_study(folder / "study.yaml")
        study = dataclasses.replace(study, runs=_study_runs(study, folder, unfinished))
    elif (folder / "runs.jsonl").is_file():
        raise ValueError(f"{folder} has runs.jsonl, but not the study.yaml that belongs to it.")
    else:
        study = _plain_multirun(folder, unfinished)
    if not study.runs:
        raise ValueError(f"{folder} holds no finished run.")
    check_held(study.runs)
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
    """What tells a run from the others of its study."""
    return _identity(run.arm, run.phase, run.seed, run.tuned)


def _identity(arm: str, phase: str, seed: int, tuned: Mapping[str, Any]) -> str:
    return json.dumps([arm, phase, seed, tuned], sort_keys=True)


def _describe(wanted: Mapping[str, Any]) -> str:
    tuned = "".join(f" {key}={_short(value)}" for key, value in wanted["tuned"].items())
    return f"{wanted['arm']} ({wanted['phase']}, seed {wanted['seed']}{tuned})"


def _plain_multirun(folder: Path, unfinished: bool) -> Study:
    """A study of the run folders below `folder`: nothing named in advance, nothing tuned."""
    studies = {path.parent for path in folder.rglob("study.yaml")}
    studies -= {path.parent for path in folder.rglob("runs.jsonl")}  # reports
    if studies:
        names = ", ".join(sorted(path.relative_to(folder).as_posix() for path in studies))
        raise ValueError(f"{folder} holds several studies ({names}); give one of them.")
    paths = sorted({path.parent for path in folder.rglob("result.json")})
    runs = {path: read_folder(path, "", "compare") for path in paths}
    started = sorted(path.parent for path in folder.rglob("run.json") if path.parent not in runs)
    if not runs:
        raise ValueError(f"{folder} holds no finished run.")
    if started and not unfinished:
        names = ", ".join(path.name for path in started[:6])
        raise ValueError(
            f"{len(started)} runs in {folder} have not finished ({names}); the command that "
            "started them continues them, or remove their folders to compare without them."
        )
    return plain_study(folder.resolve().name, [(str(path), run) for path, run in runs.items()])


def plain_study(name: str, runs: Sequence[tuple[str, Run]]) -> Study:
    """A study of runs that no study asked for: their arms are what differs between them.

    Args:
        runs: where each is, and the run.

    Raises ValueError if they were not held alike, or one is there twice.
    """
    check_held([run for _, run in runs], [place for place, _ in runs])
    found: dict[str, dict[int, tuple[str, Run]]] = defaultdict(dict)
    named = arm_names([run.config for _, run in runs])
    for (place, run), arm in zip(runs, named, strict=True):
        if (twin := found[arm].setdefault(run.seed, (place, run)))[1] is not run:
            raise ValueError(
                f"{twin[0]} and {place} are one run kept twice ({arm}, seed {run.seed}); give a "
                "folder that holds one of them."
            )
    arms = sorted(found, key=_natural)
    variant = _default_variant()
    reference = next((a for a in arms if a.split()[0] == variant), arms[0])
    arms = [reference, *(arm for arm in arms if arm != reference)]
    overrides = {
        arm: [f"variant={arm.split()[0]}", *(part for part in arm.split()[1:])] for arm in arms
    }
    return Study(
        name=name,
        question="A plain multirun: no comparison was named in advance.",
        command="",
        commit=runs[0][1].environment.get("commit"),
        arms=overrides,
        reference=reference,
        primary=arms[1:],
        metric=runs[0][1].result.get("primary_metric", "accuracy"),
        free=free_keys([run for _, run in runs]),
        tuning_seeds=[],
        seeds=sorted({run.seed for _, run in runs}),
        runs=[
            dataclasses.replace(run, arm=arm)
            for arm in arms
            for _, (_, run) in sorted(found[arm].items())
        ],
    )


def arm_names(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each run's way of fine-tuning: its variant, then the free keys in which the runs
    differ ("dora rank=4"), then keys of the variant that still differ under one such name."""
    free = sorted({key for config in configs for key in config.get("free", [])} - {"seed"})
    own = [{key: value for key, value in leaves(c["variant"], "variant")} for c in configs]
    chosen = [dict(_chosen(config, free)) for config in configs]
    names = [config["variant"]["name"] + suffix
             for config, suffix in zip(configs, _suffixes(chosen), strict=True)]  # fmt: skip
    for name in set(names):
        same = [index for index, other in enumerate(names) if other == name]
        suffixes = _suffixes([own[index] for index in same])
        for index, suffix in zip(same, suffixes, strict=True):
            names[index] += suffix
    return names


def _chosen(config: Mapping[str, Any], keys: Iterable[str]) -> Iterator[tuple[str, Any]]:
    flat = dict(leaves(config))
    for key in keys:
        yield from (
            (name, value)
            for name, value in flat.items()
            if (name == key or name.startswith(key + ".")) and not name.startswith("variant.")
        )


def _suffixes(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """' key=value' for the keys that are not the same in all."""
    keys = list(dict.fromkeys(key for setting in settings for key in setting))
    different = [k for k in keys if len({json.dumps(s.get(k)) for s in settings}) > 1]
    return ["".join(f" {k}={_short(s[k])}" for k in different if k in s) for s in settings]


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value).replace(" ", "")


def _natural(name: str) -> list[tuple[int, float, str]]:
    """Sorts rank=4 before rank=16."""
    parts = re.split(r"((?<=[=\s])-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)", name)
    return [
        (0, float(part), "") if index % 2 else (1, 0.0, part) for index, part in enumerate(parts)
    ]


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
    """What any of the runs declares free is free for all of them: a run may have been made before
    the study that it serves in."""
    return sorted({key for run in runs for key in run.config["free"]})


def check_held(runs: Sequence[Run], places: Sequence[str] = ()) -> None:
    """Raise ValueError if control hashes differ, naming the keys that do.

    Args:
        places: where the runs are, if nothing asked for them to be in one table.
    """
    free = free_keys(runs)

    def hash_of(run: Run) -> str:
        return control_hash({**run.config, "free": free}, run.result["fingerprints"])

    def flat(run: Run) -> dict[str, Any]:
        fingerprints = run.result["fingerprints"]
        return dict(
            leaves({"fingerprints": fingerprints, **held_config({**run.config, "free": free})})
        )

    first = runs[0]
    expected = hash_of(first)
    at = next((at for at, run in enumerate(runs) if hash_of(run) != expected), None)
    if at is None:
        return
    names = places or [f"{run.arm or run.result['variant']} seed {run.seed}" for run in runs]
    ours, theirs = flat(first), flat(runs[at])
    keys = sorted({*ours, *theirs}, key=lambda key: (key.startswith("fingerprints."), key))
    differing = [
        f"{key}: {ours.get(key)!r} and {theirs.get(key)!r}"
        for key in keys
        if ours.get(key) != theirs.get(key)
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


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a nested mapping."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node
