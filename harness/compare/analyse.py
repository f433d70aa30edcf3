"""From runs to what can be said of them: intervals, paired differences, costs, sentences.

The protocol: an arm is scored by its mean over seeds on test; differences are paired by seed; the
primary comparisons are one family. A diverged run is an outcome with the score of chance; a run
that failed for another reason is left out and counted.
"""

import dataclasses
import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.compare import stats, table
from harness.compare.load import METRICS, leaves
from harness.compare.table import in_nats, magnitude, p_value, rate, scale, score
from harness.compare.types import (
    Analysis,
    Arm,
    Certificate,
    Comparison,
    Costs,
    Interval,
    Run,
    Study,
    Tuning,
    TuningPoint,
)
from harness.keys import held_config

BAND = 0.01  # of the best score: what a good rate may lose
SAME_RATE = 1e-3  # rates this close, relatively, are one rate disturbed (A/A)
UNMATCHED = 0.01  # relative difference of trained parameters that is pointed out


def analyse(study: Study, rng: np.random.Generator) -> Analysis:
    """Everything that a table, a page or a report says of a study.

    Args:
        rng: of the bootstrap, and of the sign-flip test above 20 seeds.
    """
    arms = [_arm(study, name) for name in study.arms]
    arms = _with_equal_time(study, arms)
    comparisons = _comparisons(study, {arm.name: arm for arm in arms}, rng)
    noise = _noise(study, {arm.name: arm for arm in arms})
    return Analysis(
        study=study,
        arms=arms,
        comparisons=comparisons,
        certificate=_certificate(study),
        conclusions=[*noise.values(), *_conclusions(study, arms, comparisons, noise)],
        warnings=_warnings(study, arms, comparisons, noise),
    )


def runs_of(study: Study, arm: str, phase: str) -> list[Run]:
    return [run for run in study.runs if run.arm == arm and run.phase == phase]


def score_of(run: Run, metric: str, split: str = "test") -> float | None:
    """The run's score; that of chance if it diverged (uniform over the classes); None if it failed
    for another reason."""
    if run.complete:
        return float(run.result[split][metric])
    if not run.diverged:
        return None
    classes = run.result["classes"]
    return math.log(classes) if in_nats(metric) else 1 / classes


def _scores(runs: Iterable[Run], metric: str, split: str = "test") -> dict[int, float]:
    found = {run.seed: score_of(run, metric, split) for run in runs}
    return {seed: value for seed, value in sorted(found.items()) if value is not None}


# ---- one arm ------------------------------------------------------------------------------------


def _arm(study: Study, name: str) -> Arm:
    runs = runs_of(study, name, "compare")
    scores = _scores(runs, study.metric)
    rates = {run.result["lr"] for run in runs}
    return Arm(
        name=name,
        score=_interval(scores.values()),
        metrics={metric: _interval(_scores(runs, metric).values()) for metric in METRICS},
        scores=scores,
        equal_time=None,
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
    for run in runs_of(study, name, "tune"):
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
        points=points,
        chosen=choice["chosen"],
        rule=choice["rule"],
        bracketed=choice["bracketed"],
        grown=choice["grown"],
        gap=choice["gap"],
        band=_band(points, choice["chosen"], study.higher_is_better),
    )


def _order(value: Any) -> tuple[int, float, str]:
    number = isinstance(value, int | float)
    return (0, float(value), "") if number else (1, 0.0, str(value))


def is_rate(key: str) -> bool:
    return key.rpartition(".")[2] == "lr"


def _band(
    points: Sequence[TuningPoint], chosen: Mapping[str, Any], higher_is_better: bool
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
    sign = 1 if higher_is_better else -1
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
    """Each arm's score on validation when the fastest arm has finished training.

    An arm's step time is the median over its runs, since a single run's is the machine's too;
    scores are interpolated between scheduled evaluations. The rate schedule of a slower arm is not
    at its end then.
    """
    ends = []
    for arm in arms:
        steps = [r.result["steps"] for r in runs_of(study, arm.name, "compare") if r.complete]
        if steps and arm.costs.step_s:
            ends.append(max(steps) * arm.costs.step_s)
    if len(ends) < 2:
        return list(arms)
    limit, found = min(ends), []
    for arm in arms:
        reached = [
            _score_at(run, study.metric, limit / arm.costs.step_s)
            for run in runs_of(study, arm.name, "compare")
            if arm.costs.step_s and (run.complete or run.diverged)
        ]
        known = [value for value in reached if value is not None]
        equal = _interval(known) if known and len(known) == len(reached) else None
        found.append(dataclasses.replace(arm, equal_time=equal))
    return found


def _score_at(run: Run, metric: str, step: float) -> float | None:
    """The score on validation at a step between evaluations; None before the first."""
    if run.diverged:
        return score_of(run, metric)
    seen = [(row["step"], row[f"eval/{metric}"]) for row in run.curve if f"eval/{metric}" in row]
    if not seen or step < seen[0][0]:
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
        difference = stats.t_interval(differences)
        found.append(
            Comparison(
                arm=name,
                reference=study.reference,
                primary=primary,
                difference=difference,
                simultaneous=stats.simultaneous_interval(differences, family)
                if primary and several
                else None,
                p=stats.sign_flip_p(differences, rng) if tested else None,
                p_holm=None,
                bootstrap=_bootstrap(study, name, seeds, difference.estimate, rng)
                if several
                else None,
                detectable=stats.smallest_detectable(stats.standard_deviation(differences), n)
                if several
                else None,
                correlation=stats.correlation(ours, theirs),
                differences=dict(zip(seeds, differences, strict=True)),
            )
        )
    # An arm without a p, for want of seeds, still counts in the family.
    known = [c.p for c in found if c.p is not None]
    adjusted = iter(stats.holm(known + [1.0] * (family - len(known))))
    return [c if c.p is None else dataclasses.replace(c, p_holm=next(adjusted)) for c in found]


def _bootstrap(
    study: Study, name: str, seeds: Sequence[int], estimate: float, rng: np.random.Generator
) -> Interval | None:
    if study.metric != "accuracy":  # per item, only whether it was right is kept
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
    runs = {run.seed: run for run in runs_of(study, name, "compare")}
    items = {len(run.correct) for run in study.runs if run.correct and run.phase == "compare"}
    if len(items) != 1:
        return None
    n = items.pop()
    rows = []
    for seed in seeds:
        if correct := runs[seed].correct:
            rows.append(np.frombuffer(correct.encode(), dtype=np.uint8) - float(ord("0")))
        else:
            rows.append(np.full(n, score_of(runs[seed], "accuracy")))
    return np.stack(rows)


def pooled(analyses: Sequence[Analysis]) -> dict[str, Interval]:
    """Arm -> its difference from the reference over several studies: per seed the mean over studies
    of the paired difference, then a t interval over the seeds that all of them have.

    It speaks of these tasks and models only, since they are no sample of others. Raises ValueError
    if reference or metric differ, or no arm and seed are in all.
    """
    first = analyses[0].study
    for other in (analysis.study for analysis in analyses[1:]):
        for what in ("reference", "metric"):
            if getattr(first, what) != getattr(other, what):
                raise ValueError(
                    f"{first.name} and {other.name} have the {what}s {getattr(first, what)} and "
                    f"{getattr(other, what)}; effects over several studies need one (--{what})."
                )
    tables = [{c.arm: c.differences for c in analysis.comparisons} for analysis in analyses]
    found = {}
    for arm in tables[0]:
        if all(arm in table for table in tables):
            seeds = [s for s in tables[0][arm] if all(s in table[arm] for table in tables)]
            if seeds:
                means = [statistics.fmean(table[arm][s] for table in tables) for s in seeds]
                found[arm] = stats.t_interval(means)
    if not found:
        raise ValueError("no arm has a seed that is in all of these studies; nothing to pool.")
    return found


# ---- certificate --------------------------------------------------------------------------------


def _certificate(study: Study) -> Certificate:
    runs = study.runs
    first = runs[0]
    software = [dict(leaves(_software(run.environment))) for run in runs]
    hardware = [dict(leaves(_hardware(run.environment))) for run in runs]
    prints = [r.result["base_fingerprint"] for r in runs if "base_fingerprint" in r.result]
    compared = [run for run in runs if run.phase == "compare"]
    return Certificate(
        held=dict(leaves(held_config(first.config))),
        free=_free(study),
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
        joined[key] = ", ".join(f"{v} ({_runs(n)})" if several else v for v, n in counts.items())
    return joined


def _free(study: Study) -> dict[str, str]:
    values: dict[str, dict[str, None]] = {"variant": {}, "seed": {}}
    for run in study.runs:
        flat = {key: value for key, value in leaves(run.config)}
        values["variant"][run.result["variant"]] = None
        values["seed"][str(run.seed)] = None
        for free in study.free:
            for key, value in flat.items():
                if key == free or key.startswith(free + "."):
                    values.setdefault(key, {})[str(value)] = None
    return {key: ", ".join(found) for key, found in values.items()}


def _tuned(study: Study) -> list[str]:
    sentences = []
    for arm in study.arms if study.tune else ():
        runs = runs_of(study, arm, "tune")
        points = len({json.dumps(run.tuned, sort_keys=True) for run in runs})
        grown = study.chosen.get(arm, {}).get("grown", 0)
        sentences.append(
            f"{arm}: {', '.join(study.tune)} at {points} points"
            f"{f' ({grown} of them growth at an edge)' if grown else ''}, {len(runs)} runs"
        )
    return sentences


# ---- sentences ----------------------------------------------------------------------------------


def _conclusions(
    study: Study, arms: Sequence[Arm], comparisons: Sequence[Comparison], noise: Collection[str]
) -> list[str]:
    """One sentence a comparison, but for the arms that are there to show the `noise`."""
    by_name = {arm.name: arm for arm in arms}
    reference = by_name[study.reference]
    asked = [c for c in comparisons if c.arm not in noise and c.difference.n > 1]
    if asked and not _bracketed(reference):
        return [
            f"The best setting of the reference {reference.name} is at the edge of its grid "
            "(not bracketed), so nothing is concluded about any difference from it."
        ]
    return [
        _conclusion(study, comparison, arm)
        if _bracketed(arm := by_name[comparison.arm])
        else f"{arm.name}: nothing is concluded; its best setting is at the edge of the grid "
        "(not bracketed)."
        for comparison in asked
    ]


def _bracketed(arm: Arm) -> bool:
    return arm.tuning is None or arm.tuning.bracketed


def _conclusion(study: Study, c: Comparison, arm: Arm) -> str:
    """Effect, interval, n and rate of one comparison; concluded from the bounds."""
    metric, d = study.metric, c.difference
    assert d.low is not None and d.high is not None
    estimate, low, high = (table.difference(x, metric) for x in (d.estimate, d.low, d.high))
    seen = (
        f"{estimate}{'' if in_nats(metric) else ' points'}, 95 % interval {low} to {high}, "
        f"n = {d.n} paired seeds"
        + (f", {arm.diverged} diverged" if arm.diverged else "")
        + (", exploratory" if c.primary and c.p is None else "")
    )
    at = f"{arm.name}{f' at rate {rate(arm.rate)}' if arm.rate is not None else ''}"
    test = f", p = {p_value(c.p_holm)} (Holm)" if c.p_holm is not None else ""
    if d.low <= 0 <= d.high:
        bound = magnitude(max(abs(d.low), abs(d.high)), metric)
        return f"{at}: no difference from {c.reference} larger than {bound} could be seen ({seen})."
    better = (d.estimate > 0) == study.higher_is_better
    text = (
        f"{at} is {'better' if better else 'worse'} than {c.reference} by "
        f"{magnitude(d.estimate, metric)} ({seen}{test})"
    )
    s = c.simultaneous
    if s is None or s.low is None or s.high is None or len(study.primary) == 1:
        return text + "."
    all_at_once = f"[{table.difference(s.low, metric)}, {table.difference(s.high, metric)}]"
    m = len(study.primary)
    if s.low <= 0 <= s.high:
        return f"{text}; taken with all {m} comparisons it is undecided, {all_at_once}."
    return f"{text}; with all {m} comparisons at once {all_at_once}."


def _noise(study: Study, arms: Mapping[str, Arm]) -> dict[str, str]:
    """A/A: arm -> what it shows of the noise, of the arms that should be equal to the reference."""
    found, metric = {}, study.metric
    reference = {run.seed: run for run in runs_of(study, study.reference, "compare")}
    own = arms[study.reference].scores
    for name, arm in arms.items():
        runs = runs_of(study, name, "compare")
        kinds = {_kinship(run, reference.get(run.seed), reference) for run in runs}
        if name == study.reference or len(kinds) != 1:
            continue
        kind = kinds.pop()
        paired = [arm.scores[seed] - own[seed] for seed in arm.scores if seed in own]
        if kind == "itself":
            found[name] = f"{name} is {study.reference}: the same runs under another name."
        elif kind == "again" and paired:
            largest = max(map(abs, paired))
            verdict = "exactly 0" if largest == 0 else f"up to {magnitude(largest, metric)}, not 0"
            found[name] = (
                f"Noise, the same run again ({name}, n = {len(paired)}): differences are {verdict}."
            )
        elif kind == "disturbed" and len(paired) > 1:
            found[name] = (
                f"Noise that pairing leaves ({name}, the rate disturbed by less than 0.1 %, "
                f"n = {len(paired)}): standard deviation of the paired differences "
                f"{magnitude(stats.standard_deviation(paired), metric)}."
            )
        elif kind == "other seeds" and len(arm.scores) > 1 and len(own) > 1:
            both = [stats.standard_deviation(list(s.values())) for s in (arm.scores, own)]
            apart = arm.score.estimate - arms[study.reference].score.estimate
            found[name] = (
                f"Noise without pairing ({name}, other seeds, n = {len(arm.scores)}): standard "
                f"deviation of a difference of two runs {magnitude(math.hypot(*both), metric)}; "
                f"the means differ by {magnitude(apart, metric)}."
            )
    return found


def _kinship(run: Run, twin: Run | None, reference: Mapping[int, Run]) -> str | None:
    """How a run of an arm is related to the reference's: itself, again, disturbed, other seeds;
    None if it is another way of fine-tuning."""
    other = twin or next(iter(reference.values()), None)
    if other is None:
        return None

    def settings(of: Run) -> dict[str, Any]:
        ignored = ("seed", "tracking", "free", "force")
        return {k: v for k, v in leaves(of.config) if k.partition(".")[0] not in ignored}

    ours, theirs = settings(run), settings(other)
    different = {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)}
    if not different and twin:  # two runs never take the same time to the bit
        return "itself" if run.result.get("time") == twin.result.get("time") else "again"
    if not different:
        return "other seeds"
    close = all(
        is_rate(key) and math.isclose(ours[key], theirs[key], rel_tol=SAME_RATE)
        for key in different
    )
    return "disturbed" if twin and close else None


def _warnings(
    study: Study, arms: Sequence[Arm], comparisons: Sequence[Comparison], noise: Collection[str]
) -> list[str]:
    by_name = {arm.name: arm for arm in arms}
    reference = by_name[study.reference]
    found = []
    if len(arms) == 1:
        found.append("There is one arm only, so there is nothing to compare it with.")
    if max(arm.score.n for arm in arms) < 2:
        found.append("One seed each: no interval, so no claim that one arm is better than another.")
    found += _seed_warnings(study, comparisons, noise)
    if not study.tune:
        found.append(
            "Nothing was tuned here: a difference may be one of rates that suit one arm better."
        )
    for arm in arms:
        if not _bracketed(arm):
            found.append(
                f"{arm.name} is not bracketed: its best setting was at the edge of the grid after "
                f"{arm.tuning.grown if arm.tuning else 0} more points."
            )
        tuned_rate = arm.tuning is not None and any(map(is_rate, arm.tuning.chosen))
        if (
            arm.rate is not None
            and arm.rate == reference.rate
            and not tuned_rate
            and None not in (arm.scale, reference.scale)
            and arm.scale != reference.scale
        ):
            found.append(
                f"{arm.name} (s = {scale(arm.scale)}) and {reference.name} (s = "
                f"{scale(reference.scale)}) share the rate {rate(arm.rate)}: with another s this "
                "is another rate in effect."
            )
    found += _match_warnings(study, by_name)
    found += _run_warnings(study, arms, comparisons)
    found += _environment_warnings(study.runs)
    items = {len(run.correct) for run in study.runs if run.correct and run.phase == "compare"}
    if len(items) == 1 and max(arm.score.n for arm in arms) > 1:
        found.append(
            f"All seeds share one test set of {items.pop()} items: the intervals over seeds say "
            "nothing about another test set; the bootstrap over seeds and items does."
        )
    return found


def _seed_warnings(
    study: Study, comparisons: Sequence[Comparison], noise: Collection[str]
) -> list[str]:
    family, found = len(study.primary), []
    few = {c.difference.n for c in comparisons if c.primary and c.p is None}
    if few:
        n, need = max(few), stats.fewest_seeds(family)
        found.append(
            f"Exploratory: with n = {n} the smallest exact p is {2.0 ** (1 - n):.2g}, which Holm "
            f"over {family} comparisons cannot pass; at least {need} seeds are needed, so no p is "
            "printed there."
        )
    known = {study.reference, *noise, *(c.arm for c in comparisons)}
    if lost := [arm for arm in study.arms if arm not in known]:
        found.append(f"{', '.join(lost)}: no seed in common with {study.reference}.")
    return found


def _match_warnings(study: Study, arms: Mapping[str, Arm]) -> list[str]:
    if study.match == "parameters":
        return [
            f"{name} is matched by parameters: at rank {found['rank']} it trains "
            f"{100 * found['gap_frac']:.1f} % fewer than {study.reference}."
            for name, found in study.matched.items()
            if name != study.reference
        ]
    ours = arms[study.reference].costs.trainable
    shares = []
    for name in study.primary:
        theirs = arms[name].costs.trainable
        if ours and theirs and abs(theirs / ours - 1) > UNMATCHED:
            shares.append(f"{name} {100 * (theirs / ours - 1):+.0f} %")
    if not shares:
        return []
    how = "matched by rank" if study.match == "rank" else "not matched"
    return [
        f"The arms are {how}, so some train more or fewer parameters than {study.reference}: "
        f"{', '.join(shares)}."
    ]


def _run_warnings(
    study: Study, arms: Sequence[Arm], comparisons: Sequence[Comparison]
) -> list[str]:
    found = []
    failed = [run for run in study.runs if not (run.complete or run.diverged)]
    if failed:
        listed = "; ".join(
            f"{run.arm} {run.phase} seed {run.seed}: {run.result.get('failure', 'failed')}"
            for run in failed[:5]
        )
        more = f" and {len(failed) - 5} more" if failed[5:] else ""
        found.append(
            f"{_runs(len(failed))} failed and {'is' if len(failed) == 1 else 'are'} left out "
            f"({listed}{more})."
        )
    diverged = Counter(run.arm for run in study.runs if run.diverged)
    for arm, count in diverged.items():
        in_test = next(a.diverged for a in arms if a.name == arm)
        chance = score(next(score_of(r, study.metric) for r in study.runs if r.diverged),
                       study.metric)  # fmt: skip
        found.append(
            f"{_runs(count)} of {arm} diverged ({in_test} of them in the comparison) and "
            f"{'counts' if count == 1 else 'count'} with the score of chance, {chance}."
        )
    full = len(study.seeds)
    for c in comparisons:
        if c.difference.n < full:
            found.append(
                f"{c.arm} is compared on the {c.difference.n} seeds that it and {c.reference} both "
                f"have, of {full}."
            )
    return found


def _runs(number: int) -> str:
    return "1 run" if number == 1 else f"{number} runs"


def _environment_warnings(runs: Sequence[Run]) -> list[str]:
    found = []
    flat = [dict(leaves(run.environment)) for run in runs]
    different = [
        f"{key} {', '.join(map(str, values))}"
        for key in dict.fromkeys(key for record in flat for key in record)
        if key not in ("commit", "uncommitted_changes")
        and len(values := list(dict.fromkeys(str(record.get(key)) for record in flat))) > 1
    ]
    if different:
        found.append(
            f"The runs were made in different environments ({'; '.join(different)}): equal seeds "
            "need not be equal runs, and their times are no comparison."
        )
    commits = list(dict.fromkeys(str(run.environment.get("commit"))[:8] for run in runs))
    if len(commits) > 1:
        found.append(f"The runs were made by different commits ({', '.join(commits)}).")
    changed = sum(bool(run.environment.get("uncommitted_changes")) for run in runs)
    if changed:
        found.append(f"{_runs(changed)} had changes in the code that were not committed.")
    return found
