"""Makes intervals, paired differences, costs and a certificate of runs; `sentences` says it.

The protocol: an arm is scored by its mean over seeds on test; differences are paired by seed; the
primary comparisons are one family. A diverged run is an outcome with the score of chance; a run
that failed for another reason is left out and counted.
"""

import dataclasses
import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.compare import stats
from harness.compare.findings import (
    Analysis,
    Arm,
    Certificate,
    Comparison,
    Costs,
    Interval,
    Tuning,
    TuningPoint,
)
from harness.compare.held import free_keys
from harness.compare.sentences import conclusions, noise_of, responses_text, warnings_of
from harness.compare.study import Choice, Run, Study, is_rate
from harness.compare.swept import responses
from harness.config.identity import held_config, leaves
from harness.disk.digest import digest
from harness.words import counted

RNG_SEED = 0  # of every bootstrap, so that a report is the same to the bit whenever it is made
BAND = 0.01  # of the best score: what a good rate may lose


def analysed(study: Study) -> Analysis:
    """Analyse a study with the bootstrap's fixed seed, so that the result is always the same."""
    return analyse(study, np.random.default_rng(RNG_SEED))


def analyse(study: Study, rng: np.random.Generator) -> Analysis:
    """Analyse a study for a table, a page or a report.

    Args:
        rng: of the bootstrap, and of the sign-flip test above 20 seeds.
    """
    arms = [_arm(study, name) for name in study.arms]
    arms = _with_equal_time(study, arms)
    comparisons = _comparisons(study, {arm.name: arm for arm in arms}, rng)
    noise = noise_of(study, {arm.name: arm for arm in arms})
    found = responses(study, arms)
    said = [] if noise else responses_text(study, found)
    return Analysis(
        study=study,
        arms=arms,
        comparisons=comparisons,
        certificate=_certificate(study),
        noise=list(noise),
        conclusions=[*noise.values(), *said, *conclusions(study, arms, comparisons, noise)],
        warnings=list(warnings_of(study, arms, comparisons, noise)),
        responses=found,
    )


def _scores(runs: Iterable[Run], metric: str, split: str = "test") -> dict[int, float]:
    found = {run.seed: run.score(metric, split) for run in runs}
    return {seed: value for seed, value in sorted(found.items()) if value is not None}


# ---- one arm ------------------------------------------------------------------------------------


def _arm(study: Study, name: str) -> Arm:
    runs = study.runs_of(name, "compare")
    scores = _scores(runs, study.metric)
    rates = {run.result["lr"] for run in runs}
    return Arm(
        name=name,
        score=_interval(scores.values()),
        metrics={metric: _interval(_scores(runs, metric).values()) for metric in study.metrics},
        scores=scores,
        equal_time=None,
        forgetting=_forgetting(runs),
        diverged=sum(run.diverged for run in runs),
        failed=sum(not (run.complete or run.diverged) for run in runs),
        scale=_scale(runs),
        rate=rates.pop() if len(rates) == 1 else None,
        costs=_costs([run.result for run in runs if run.complete]),
        tuning=_tuning(study, name) if study.tune else None,
    )


def _interval(values: Iterable[float]) -> Interval:
    """A t interval; of no values, NaN with n = 0."""
    found = list(values)
    return stats.t_interval(found) if found else Interval(math.nan, None, None, 0)


def _scale(runs: Sequence[Run]) -> float | str | None:
    scales = [run.result.get("effective_scale") for run in runs]
    if not scales:
        return None
    same = all(scale == scales[0] for scale in scales)
    return "by layer" if isinstance(scales[0], Mapping) or not same else scales[0]


def _forgetting(runs: Iterable[Run]) -> dict[str, Interval]:
    """Over the runs that measured it: a diverged one has no say."""
    found = [
        run.result["forgetting"] for run in runs if run.complete and "forgetting" in run.result
    ]
    if not found:
        return {}
    return {
        "loss_nats": _interval(f["loss_nats_after"] - f["loss_nats_before"] for f in found),
        "kl_nats": _interval(f["kl_nats"] for f in found),
    }


def _costs(results: Sequence[Mapping[str, Any]]) -> Costs:
    def median(get: Callable[[Mapping[str, Any]], float | None]) -> float | None:
        values = [value for result in results if (value := get(result)) is not None]
        return statistics.median(values) if values else None

    return Costs(
        trainable=median(lambda r: r["parameters"]["trainable"]),
        trainable_final=median(lambda r: r["parameters"]["trainable_final"]),
        adapter_bytes=median(lambda r: r.get("adapter_bytes")),
        base_bytes=median(lambda r: r["memory"]["base_bytes"]),
        step_s=median(lambda r: r["time"]["step_median_s"]),
        peak_bytes=median(lambda r: r["memory"]["train_peak_bytes"]),
        tokens_per_s=median(lambda r: r["time"]["tokens_per_s"]),
        train_s=median(lambda r: r["time"]["train_s"]),
    )


def _tuning(study: Study, name: str) -> Tuning | None:
    cells: dict[str, list[Run]] = defaultdict(list)
    for run in study.runs_of(name, "tune"):
        cells[json.dumps(run.tuned, sort_keys=True)].append(run)
    points = []
    for runs in cells.values():
        scores = list(_scores(runs, study.metric, "validation").values())
        if scores:
            diverged = sum(run.diverged for run in runs)
            points.append(TuningPoint(tuned=runs[0].tuned, scores=scores, diverged=diverged))
    choice = study.chosen.get(name)
    if choice is None:
        return None
    key = next(iter(study.tune))
    points.sort(key=lambda point: _order(point.tuned[key]))
    return Tuning(
        **{field.name: choice[field.name] for field in dataclasses.fields(Choice)},
        points=points,
        band=_band(points, choice["chosen"], study.sign),
    )


def _order(value: Any) -> tuple[int, float, str]:
    number = isinstance(value, int | float)
    return (0, float(value), "") if number else (1, 0.0, str(value))


def _band(
    points: Sequence[TuningPoint], chosen: Mapping[str, Any], sign: int
) -> tuple[float, float] | None:
    """The rates around the best point whose mean score, interpolated linearly in log rate, is
    within 1 % of the best; other tuned keys as chosen."""
    key = next((key for key in chosen if is_rate(key)), None)
    if key is None:
        return None
    others = {k: v for k, v in chosen.items() if k != key}
    line = [(math.log(p.tuned[key]), p.mean) for p in points
            if {k: v for k, v in p.tuned.items() if k != key} == others]  # fmt: skip
    if not line:
        return None
    best = max(range(len(line)), key=lambda index: sign * line[index][1])
    limit = line[best][1] * (1 - sign * BAND)

    def end(step: int) -> float:
        at = best
        while 0 <= at + step < len(line):
            (x0, y0), (x1, y1) = line[at], line[at + step]
            if sign * (y1 - limit) < 0:
                return math.exp(x0 + (x1 - x0) * (y0 - limit) / (y0 - y1))
            at += step
        return math.exp(line[at][0])

    return end(-1), end(1)


def _with_equal_time(study: Study, arms: Sequence[Arm]) -> list[Arm]:
    """Each arm's score on validation when the fastest of reference and primary arms has finished
    training; None for an anchor that has finished before.

    An arm's step time is the median over its runs, since a single run's is the machine's too;
    scores are interpolated between scheduled evaluations. The rate schedule of a slower arm is not
    at its end then.
    """
    ends = []
    for arm in arms:
        steps = [r.result["steps"] for r in study.runs_of(arm.name, "compare") if r.complete]
        asked = arm.name in (study.reference, *study.primary)
        if asked and steps and arm.costs.step_s:
            ends.append(max(steps) * arm.costs.step_s)
    if len(ends) < 2:
        return list(arms)
    limit, found = min(ends), []
    for arm in arms:
        reached = [
            _score_at(run, study.metric, limit / arm.costs.step_s)
            for run in study.runs_of(arm.name, "compare")
            if arm.costs.step_s and (run.complete or run.diverged)
        ]
        known = [value for value in reached if value is not None]
        equal = _interval(known) if known and len(known) == len(reached) else None
        found.append(dataclasses.replace(arm, equal_time=equal))
    return found


def _score_at(run: Run, metric: str, step: float) -> float | None:
    """The score on validation at a step between evaluations; None before the first and after the
    last."""
    if run.diverged:
        return run.score(metric)
    seen = [(row["step"], row[f"eval/{metric}"]) for row in run.curve if f"eval/{metric}" in row]
    if not seen or not seen[0][0] <= step <= seen[-1][0] * (1 + 1e-9):
        return None
    at, values = zip(*seen, strict=True)
    return float(np.interp(step, at, values))


# ---- comparisons --------------------------------------------------------------------------------


def _comparisons(
    study: Study, arms: Mapping[str, Arm], rng: np.random.Generator
) -> list[Comparison]:
    family = len(study.primary)
    reference = arms[study.reference]
    found = []
    for name, arm in arms.items():
        seeds = [seed for seed in arm.scores if seed in reference.scores]
        if name == study.reference or not seeds:
            continue
        primary = name in study.primary
        ours, theirs = [arm.scores[s] for s in seeds], [reference.scores[s] for s in seeds]
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        n, several = len(seeds), len(seeds) > 1
        tested = primary and n >= stats.fewest_seeds(family)
        difference = _difference(differences)
        found.append(
            Comparison(
                arm=name,
                reference=study.reference,
                primary=primary,
                difference=difference,
                simultaneous=stats.simultaneous_interval(differences, family)
                if primary and difference.bounds
                else None,
                p=stats.sign_flip_p(differences, rng) if tested else None,
                p_holm=None,
                bootstrap=_bootstrap(study, name, seeds, difference.estimate, rng)
                if several
                else None,
                detectable=stats.smallest_detectable(stats.standard_deviation(differences), n)
                if stats.varies(differences)
                else None,
                correlation=stats.correlation(ours, theirs),
                differences=dict(zip(seeds, differences, strict=True)),
            )
        )
    # An arm without a p, for want of seeds, still counts in the family.
    known = [c.p for c in found if c.p is not None]
    adjusted = iter(stats.holm(known + [1.0] * (family - len(known))))
    return [c if c.p is None else dataclasses.replace(c, p_holm=next(adjusted)) for c in found]


def _difference(differences: Sequence[float]) -> Interval:
    """The mean with its paired t interval; without bounds if all are equal: what does not vary
    over the seeds seen may over others."""
    found = stats.t_interval(differences)
    if stats.varies(differences):
        return found
    return dataclasses.replace(found, low=None, high=None)


def _bootstrap(
    study: Study, name: str, seeds: Sequence[int], estimate: float, rng: np.random.Generator
) -> Interval | None:
    if not study.metrics[study.metric].per_item:  # only whether it was right is kept of an item
        return None
    ours, theirs = (_items(study, arm, seeds) for arm in (name, study.reference))
    if ours is None or theirs is None:
        return None
    found = stats.bootstrap_interval(ours - theirs, rng)
    # One number to the bit, so that both views print it alike.
    same = math.isclose(found.estimate, estimate, abs_tol=1e-9)
    return dataclasses.replace(found, estimate=estimate) if same else found


def _items(study: Study, name: str, seeds: Sequence[int]) -> NDArray[np.float64] | None:
    """(seeds, items): 1.0 where right; a diverged run is right by chance on every item."""
    runs = {run.seed: run for run in study.runs_of(name, "compare")}
    items = {len(run.correct) for run in study.runs if run.correct and run.phase == "compare"}
    if len(items) != 1:
        return None
    n = items.pop()
    rows = []
    for seed in seeds:
        if correct := runs[seed].correct:
            rows.append(np.frombuffer(correct.encode(), dtype=np.uint8) - float(ord("0")))
        else:
            rows.append(np.full(n, runs[seed].score(study.metric)))
    return np.stack(rows)


def pooled(analyses: Sequence[Analysis]) -> tuple[dict[str, Interval], dict[str, str]]:
    """Arm -> its difference from the reference over several studies: per seed the mean over studies
    of the paired difference, then a t interval over the seeds that all of them have. And the arms
    without one -> why.

    It speaks of these tasks and models only, since they are no sample of others. Raises ValueError
    if reference or metric differ, if the reference is not bracketed in one of them, or if no arm
    and seed are in all.
    """
    first = analyses[0].study
    for other in (analysis.study for analysis in analyses[1:]):
        for what in ("reference", "metric"):
            if getattr(first, what) != getattr(other, what):
                raise ValueError(
                    f"{first.name} and {other.name} have the {what}s {getattr(first, what)} and "
                    f"{getattr(other, what)}; effects over several studies need one (--{what})."
                )
    left_out: dict[str, str] = {}
    for analysis in analyses:
        study = analysis.study
        for arm in analysis.arms:
            if not arm.bracketed:
                left_out.setdefault(arm.name, f"it is not bracketed in {study.name}")
        for name in analysis.noise:
            left_out.setdefault(name, f"in {study.name} it is {study.reference} again")
    if first.reference in left_out:
        raise ValueError(
            f"the reference {first.reference} cannot be pooled: {left_out[first.reference]}, so "
            "nothing is concluded about any difference from it."
        )
    tables = [{c.arm: c.differences for c in analysis.comparisons} for analysis in analyses]
    found = {}
    for name in dict.fromkeys(name for table in tables for name in table):
        seeds = sorted(set.intersection(*(set(table.get(name, {})) for table in tables)))
        if name not in left_out and seeds:
            means = [statistics.fmean(table[name][s] for table in tables) for s in seeds]
            found[name] = _difference(means)
        elif not seeds:
            left_out.setdefault(name, "it has no seed that is in all of them")
    if not found:
        reasons = "".join(f"; {arm}: {why}" for arm, why in left_out.items())
        raise ValueError(f"no arm can be pooled over these studies{reasons}.")
    return found, left_out


# ---- certificate --------------------------------------------------------------------------------


def _certificate(study: Study) -> Certificate:
    # A run may serve two arms; two runs never have one result, since they take their own time.
    runs = list({digest(run.result): run for run in study.runs}.values())
    first, free = runs[0], sorted({*free_keys(runs), *study.free})
    software = [dict(leaves(_software(run.environment))) for run in runs]
    hardware = [dict(leaves(_hardware(run.environment))) for run in runs]
    prints = [r.result["base_fingerprint"] for r in runs if "base_fingerprint" in r.result]
    compared = [run for run in runs if run.phase == "compare"]
    return Certificate(
        held=dict(leaves(held_config({**first.config, "free": free}))),
        free=_free(runs, free),
        tuned=_tuned(study),
        fingerprints=dict(first.result["fingerprints"]),
        base_unchanged=bool(prints) and all(p["before"] == p["after"] for p in prints),
        software=_joined(software),
        hardware=_joined(hardware),
        runs={
            "tuning": len(runs) - len(compared),
            "comparison": len(compared),
            "diverged": sum(run.diverged for run in runs),
            "failed": sum(not (run.complete or run.diverged) for run in runs),
        },
    )


_HARDWARE = ("platform", "processor", "cores", "threads", "cpu_capability", "device", "accelerator")


def _software(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in environment.items() if k not in (*_HARDWARE, "packages")} | dict(
        environment.get("packages", {})
    )


def _hardware(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {key: environment[key] for key in _HARDWARE if environment.get(key) is not None}


def _joined(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Key -> its values in all records, "2.12 (8 runs), 2.13 (40 runs)" if there are several."""
    joined = {}
    for key in dict.fromkeys(key for record in records for key in record):
        counts = Counter(str(record[key]) if key in record else "none" for record in records)
        several = len(counts) > 1
        joined[key] = ", ".join(
            f"{v} ({counted(n, 'run')})" if several else v for v, n in counts.items()
        )
    return joined


def _free(runs: Sequence[Run], keys: Sequence[str]) -> dict[str, str]:
    values: dict[str, dict[str, None]] = {"variant": {}, "seed": {}}
    for run in runs:
        flat = {key: value for key, value in leaves(run.config)}
        values["variant"][run.result["variant"]] = None
        values["seed"][str(run.seed)] = None
        for free in keys:
            for key, value in flat.items():
                if key == free or key.startswith(free + "."):
                    values.setdefault(key, {})[str(value)] = None
    return {key: ", ".join(found) for key, found in values.items()}


def _tuned(study: Study) -> list[str]:
    sentences = []
    for arm in study.arms if study.tune else ():
        runs = study.runs_of(arm, "tune")
        points = len({json.dumps(run.tuned, sort_keys=True) for run in runs})
        grown = study.chosen.get(arm, {}).get("grown", 0)
        sentences.append(
            f"{arm}: {', '.join(study.tune)} at {points} points"
            f"{f' ({grown} of them growth at an edge)' if grown else ''}, {len(runs)} runs"
        )
    return sentences
