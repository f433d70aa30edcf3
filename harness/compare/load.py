"""Reads a study from disk, and refuses to compare runs that were not held alike.

A study's folder is one of three:
    outputs/<experiment>     study.yaml and the folders of its runs
    outputs/<experiment>     run folders alone, of a plain multirun: arms are what differs
    results/<study>          study.yaml and runs.jsonl, one run a line
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.compare import arms, multirun
from harness.compare.held import check_budgets, check_held
from harness.compare.plain import taken, unplanned_study
from harness.compare.rows import identity, identity_of, read_folder, read_rows
from harness.compare.study import Run, Study, read_study
from harness.config.identity import at
from harness.words import did_you_mean


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
        unfinished: take the runs that are finished, however few.
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
        study = unplanned_study(folder, named, varied, quick)
    if not study.runs:
        raise ValueError(f"{folder} holds no finished run.")
    check_held(study.runs, varied=study.varied_keys)
    _check_named(study)
    if not unfinished:
        if study.expected is not None and all(run["phase"] == "tune" for run in study.expected):
            raise ValueError(
                f"the tuning of {study.name} is not finished; continue it with: {study.command}"
            )
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
    """Compares a setting with a value, or with the text of one. True for lists and mappings, which
    are not compared."""
    if isinstance(value, Mapping | list):
        return True
    try:
        return math.isclose(float(value), float(other), rel_tol=1e-5)
    except (TypeError, ValueError):
        words = [{"none": "null"}.get(str(v).lower(), str(v).lower()) for v in (value, other)]
        return words[0] == words[1]


def _study_runs(study: Study, folder: Path, unfinished: bool) -> list[Run]:
    """Reads every run that is expected from its folder, or its line of runs.jsonl."""
    rows = folder / "runs.jsonl"
    archived = {identity(run): run for run in read_rows(rows)} if rows.is_file() else {}
    if study.expected is None:
        return list(archived.values())
    runs, missing = [], []
    for wanted in study.expected:
        arm, phase, seed = wanted["arm"], wanted["phase"], wanted["seed"]
        key = identity_of(arm, phase, seed, wanted["tuned"])
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


def _describe(wanted: Mapping[str, Any]) -> str:
    tuned = "".join(f" {key}={arms.short(value)}" for key, value in wanted["tuned"].items())
    return f"{wanted['arm']} ({wanted['phase']}, seed {wanted['seed']}{tuned})"


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
