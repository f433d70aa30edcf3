"""The controls that runs of one table share, and the budget of tuning that arms share."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from harness.compare import arms
from harness.compare.study import Run, Study
from harness.config.identity import control_hash, held_config, leaves, without


def free_keys(runs: Sequence[Run]) -> list[str]:
    """The keys that any of the runs declares free, which are free for all: a run may have been
    made before the study that it serves in."""
    return sorted({key for run in runs for key in run.config["free"]})


def known_function(runs: Sequence[Run]) -> dict[str, str]:
    """The function of a base that some of the runs record. A run of before it was recorded is held
    against the others without it."""
    recorded = [run.result["fingerprints"] for run in runs]
    return next(({"function": f["function"]} for f in recorded if "function" in f), {})


def hash_of(run: Run, free: Sequence[str], varied: Sequence[str], known: Mapping[str, str]) -> str:
    """The run's control hash, were these keys free, or swept."""
    return control_hash({**run.config, "free": free}, _prints(run, varied, known))


def _prints(run: Run, varied: Sequence[str], known: Mapping[str, str]) -> dict[str, Any]:
    """The run's fingerprints but for those that the varied keys change."""
    return without({**known, **run.result["fingerprints"]}, arms.excused(varied))


def check_held(runs: Sequence[Run], places: Sequence[str] = (), varied: Sequence[str] = ()) -> None:
    """Raise ValueError if control hashes differ, naming the keys that do.

    Args:
        places: where the runs are, if nothing asked for them to be in one table.
        varied: keys that were swept, in which they may differ.
    """
    free, known = sorted({*free_keys(runs), *varied}), known_function(runs)

    def flat(run: Run) -> dict[str, Any]:
        about: dict[str, Any] = {"fingerprints": _prints(run, varied, known)}
        if "base" in about["fingerprints"]:
            about["base"] = run.result.get("definition")
        return dict(leaves({**about, **held_config({**run.config, "free": free})}))

    first = runs[0]
    hashes = [hash_of(run, free, varied, known) for run in runs]
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
