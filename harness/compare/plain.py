"""Studies of runs that no fair study asked for: the arms are what differs between them."""

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from harness.compare import arms, multirun
from harness.compare.held import check_held, free_keys, hash_of, known_function
from harness.compare.multirun import Multirun
from harness.compare.rows import read_folder
from harness.compare.study import Run, Study
from harness.config.identity import has, leaves
from harness.disk.read import read_json
from harness.loop.result import Marker
from harness.tasks.metrics import metrics_of
from harness.words import counted, did_you_mean

ALL = "all"  # instead of a multirun's name: every run of the folder
DEFAULTS = Path(__file__).parents[2] / "conf" / "config.yaml"


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


def unplanned_study(folder: Path, named: str | None, varied: Sequence[str], quick: bool) -> Study:
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
            config = {**read_json(marker, Marker, nonfinite=True)["config"]}
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
        if not any(has(run.config, key) for _, run in places):
            known = sorted({key for _, run in places for key, _ in leaves(run.config)})
            raise ValueError(f"--varied names the key {key}, which no run has."
                             f"{did_you_mean(key, known)}")  # fmt: skip
    free = [*free_keys([run for _, run in places]), *varied]
    function = known_function([run for _, run in places])
    groups: dict[str, list[tuple[str, Run]]] = defaultdict(list)
    for place, run in places:
        groups[hash_of(run, free, varied, function)].append((place, run))
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
            differ = arms.differing(runs, free)
            listed = [f"{key} ({', '.join(values)})" for key, values in differ.items()]
            raise ValueError(
                f"the runs of {name} differ in {', '.join(listed[:6])}{', ...' * bool(listed[6:])} "
                "and are not every combination of these values, so they are not one comparison; "
                f"--varied {next(iter(differ))} compares the most that differ in that alone, and "
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
            arm: [f"variant={variant_of[arm]}",
                  *(f"{k}={arms.as_text(v)}" for k, v in of_arm[arm].items() if k != "variant")]
            for arm in ordered
        },
        reference=reference,
        primary=ordered[1:],
        metric=runs[0].result.get("primary_metric", "accuracy"),
        free=sorted({*free_keys(runs), *(k for k in changed if k.partition(".")[0] != "variant")}),
        tuning_seeds=[],
        seeds=sorted({run.seed for run in runs}),
        varied=varied,
        runs=[
            dataclasses.replace(run, arm=arm)
            for arm in ordered
            for run in sorted(by_arm[arm], key=lambda run: run.seed)
        ],
    )  # fmt: skip


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
