"""Plain sentences on a study: conclusions, noise, and what to keep in mind.

Conclusions go by the bounds of intervals: effect, interval, n; "no difference larger than d could
be seen" is one.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from harness.compare import stats, table
from harness.compare.arms import name_of, short
from harness.compare.findings import Arm, Comparison, Response
from harness.compare.study import Run, Study, is_rate
from harness.compare.table import magnitude, p_value, rate, scale, score
from harness.config.identity import leaves
from harness.tasks.metrics import metrics_of, unit
from harness.words import counted

FLAT = 0.01  # relative difference of tuning scores that chooses nothing
SAME_RATE = 1e-3  # rates this close, relatively, are one rate disturbed (A/A)
UNMATCHED = 0.01  # relative difference of trained parameters that is pointed out


def conclusions(
    study: Study, arms: Sequence[Arm], comparisons: Sequence[Comparison], noise: Collection[str]
) -> list[str]:
    """One sentence a comparison, but for the arms that are there to show the `noise`."""
    by_name = {arm.name: arm for arm in arms}
    reference = by_name[study.reference]
    asked = [c for c in comparisons if c.arm not in noise and c.difference.n > 1]
    if asked and not reference.bracketed:
        return [
            f"The best setting of the reference {reference.name} is at the edge of its grid "
            "(not bracketed), so nothing is concluded about any difference from it."
        ]
    return [
        _conclusion(study, comparison, arm, reference)
        if (arm := by_name[comparison.arm]).bracketed
        else f"{arm.name}: nothing is concluded; its best setting is at the edge of the grid "
        "(not bracketed)."
        for comparison in asked
    ]


def responses_text(study: Study, responses: Sequence[Response]) -> list[str]:
    """One sentence for each swept number: the best value, and the smallest that is as good."""
    return [_response_text(study, response) for response in responses if len(response.values) > 1]


def _response_text(study: Study, r: Response) -> str:
    about = f"{r.key} ({name_of(r.others)})" if r.others else r.key
    best, largest = short(r.values[r.best]), len(r.values) - 1
    gaps = [gap for gap in r.behind if gap is not None]
    if all(gap.estimate == 0 for gap in gaps):
        return f"{about}: {', '.join(map(short, r.values))} have one and the same mean."
    text = f"{about}: {best} has the best mean of {', '.join(map(short, r.values))}"
    if r.smallest is None:
        return f"{text}; one seed each cannot tell it from the others."
    if r.smallest == r.best:
        text += ", and every smaller value is worse" if r.best else ", and is the smallest"
    else:
        gap = r.behind[r.smallest]
        text += f"; {short(r.values[r.smallest])} is the smallest that cannot be told from it"
        if gap is not None:
            points = unit(study.metric).of_difference
            seen = table.difference(gap.estimate, study.metric)
            bounds = table.bounds(gap, study.metric)
            seen += f"{f' {points}' * (points == 'points')}{f' {bounds}' * bool(bounds)}"
            together = f", all {largest} at once" if largest > 1 else ""
            text += f" ({seen}{together}, n = {gap.n} paired {'seed' if gap.n == 1 else 'seeds'})"
    edge = r.best == largest and r.smallest == r.best
    return text + ("; it is the largest tried, so more may be better." if edge else ".")


def _conclusion(study: Study, c: Comparison, arm: Arm, reference: Arm) -> str:
    """Effect, interval, n and rate of one comparison; concluded from the bounds."""
    metric, d = study.metric, c.difference
    about = (
        f"n = {d.n} paired seeds"
        + (f", {arm.diverged} diverged" if arm.diverged else "")
        + (f", {reference.diverged} of {reference.name} diverged" if reference.diverged else "")
        + (", exploratory" if c.primary and c.p is None else "")
        + ("" if c.primary else ", anchor, not tested")
    )
    points = unit(metric).of_difference
    at = f"{arm.name}{f' at rate {rate(arm.rate)}' if arm.rate is not None else ''}"
    test = f", p = {p_value(c.p_holm)} (Holm)" if c.p_holm is not None else ""
    estimate = table.difference(d.estimate, metric) + (f" {points}" if points == "points" else "")
    if d.bounds is None:
        return (
            f"{at}: all {d.n} differences from {c.reference} are equal ({estimate}, {about}), so "
            "their spread is not known and nothing is concluded."
        )
    low, high = (table.difference(bound, metric) for bound in d.bounds)
    seen = f"{estimate}, 95 % interval {low} to {high}, {about}"
    if d.holds_zero:
        bound = table.at_most(max(map(abs, d.bounds)), metric)
        return f"{at}: no difference from {c.reference} larger than {bound} could be seen ({seen})."
    better = (d.estimate > 0) == study.higher_is_better
    text = (
        f"{at} is {'better' if better else 'worse'} than {c.reference} by "
        f"{magnitude(d.estimate, metric)} ({seen}{test})"
    )
    m = len(study.primary)
    if m > 1 and (together := table.bounds(c.simultaneous, metric)):
        if c.simultaneous is not None and c.simultaneous.holds_zero:
            text = f"taken alone, {text}; with all {m} comparisons at once it is undecided, "
        else:
            text += f"; with all {m} comparisons at once "
        text += together
    if c.bootstrap is not None and c.bootstrap.holds_zero:
        items = table.bounds(c.bootstrap, metric)
        text += f"; over other test items as well it is undecided, {items}"
    return text + "."


def noise_of(study: Study, arms: Mapping[str, Arm]) -> dict[str, str]:
    """A/A: arm -> what it shows of the noise, of the arms that should be equal to the reference."""
    found, metric = {}, study.metric
    reference = {run.seed: run for run in study.runs_of(study.reference, "compare")}
    own = arms[study.reference].scores
    for name, arm in arms.items():
        runs = study.runs_of(name, "compare")
        kinds = {_kinship(run, reference.get(run.seed), reference) for run in runs}
        if len(kinds) > 1:
            kinds.discard("untimed")
        if name == study.reference or len(kinds) != 1:
            continue
        kind = kinds.pop()
        paired = [arm.scores[seed] - own[seed] for seed in arm.scores if seed in own]
        if kind == "itself":
            found[name] = f"{name} is {study.reference}: the same runs under another name."
        elif kind in ("again", "untimed") and paired:
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
    """The relation of an arm's run to the reference's: itself, again, one of these (untimed),
    disturbed, other seeds; None if it is another way of fine-tuning."""
    other = twin or next(iter(reference.values()), None)
    if other is None:
        return None

    def settings(of: Run) -> dict[str, Any]:
        ignored = ("seed", "tracking", "free", "force")
        return {k: v for k, v in leaves(of.config) if k.partition(".")[0] not in ignored}

    ours, theirs = settings(run), settings(other)
    different = {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)}
    if not different and twin:  # two runs never take the same time to the bit
        times = [of.result.get("time") for of in (run, twin)]
        if None in times:  # it diverged
            return "untimed"
        return "itself" if times[0] == times[1] else "again"
    if not different:
        return "other seeds"
    close = all(
        is_rate(key) and math.isclose(ours[key], theirs[key], rel_tol=SAME_RATE)
        for key in different
    )
    return "disturbed" if twin and close else None


def warnings_of(
    study: Study, arms: Sequence[Arm], comparisons: Sequence[Comparison], noise: Collection[str]
) -> Iterator[str]:
    by_name = {arm.name: arm for arm in arms}
    reference = by_name[study.reference]
    yield from study.notes
    if len(arms) == 1:
        yield "There is one arm only, so there is nothing to compare it with."
    if max(arm.score.n for arm in arms) < 2:
        yield "One seed each: no interval, so no claim that one arm is better than another."
    yield from _seed_warnings(study, comparisons, noise)
    if not study.reference_named:
        yield (
            f"The reference {reference.name} was not named in advance: its comparisons were chosen "
            "when the runs were there, so they have intervals and no p."
        )
    if not study.tune:
        yield "Nothing was tuned here: a difference may be one of rates that suit one arm better."
    for arm in arms:
        if not arm.bracketed:
            yield (
                f"{arm.name} is not bracketed: its best setting was at the edge of the grid after "
                f"{arm.tuning.grown if arm.tuning else 0} more points."
            )
    yield from _flat_warnings(study, arms)
    yield from _scale_warnings(arms)
    yield from _match_warnings(study, by_name)
    notes = (note for run in study.runs for note in run.result.get("notes") or ())
    yield from dict.fromkeys(map(str, notes))  # of the base models, each once
    yield from _run_warnings(study, arms, comparisons)
    yield from _environment_warnings(study.runs)
    yield from _function_warnings(study.runs)
    items = {len(run.correct) for run in study.runs if run.correct and run.phase == "compare"}
    if len(items) == 1 and max(arm.score.n for arm in arms) > 1:
        resampled = any(c.bootstrap is not None for c in comparisons)
        yield (
            f"All seeds share one test set of {items.pop()} items: the intervals over seeds say "
            "nothing about another test set"
            + ("; the bootstrap over seeds and items does." if resampled else ".")
        )


def _seed_warnings(
    study: Study, comparisons: Sequence[Comparison], noise: Collection[str]
) -> Iterator[str]:
    few = {c.difference.n for c in comparisons if c.primary and c.p is None}
    if few:
        n, family = max(few), len(study.primary)
        yield (
            f"Exploratory: with n = {n} the smallest exact p is {2.0 ** (1 - n):.2g}, which Holm "
            f"over {counted(family, 'comparison')} cannot pass; at least "
            f"{stats.fewest_seeds(family)} seeds are needed, so no p is printed there."
        )
    known = {study.reference, *noise, *(c.arm for c in comparisons)}
    if lost := [arm for arm in study.arms if arm not in known]:
        yield f"{', '.join(lost)}: no seed in common with {study.reference}."


def _match_warnings(study: Study, arms: Mapping[str, Arm]) -> Iterator[str]:
    if study.match == "parameters":
        for name, found in study.matched.items():
            if name != study.reference:
                yield (
                    f"{name} is matched by parameters: at rank {found['rank']} it trains "
                    f"{100 * found['gap_frac']:.1f} % fewer than {study.reference}."
                )
        return
    ours = arms[study.reference].costs.trainable
    shares = []
    for name in study.primary:
        theirs = arms[name].costs.trainable
        if ours and theirs and abs(theirs / ours - 1) > UNMATCHED:
            shares.append(f"{name} {100 * (theirs / ours - 1):+.0f} %")
    if shares:
        how = "matched by rank" if study.match == "rank" else "not matched"
        yield (
            f"The arms are {how}, so some train more or fewer parameters than {study.reference}: "
            f"{', '.join(shares)}."
        )


def _flat_warnings(study: Study, arms: Sequence[Arm]) -> Iterator[str]:
    """Names arms whose tuning had nothing to choose between, as those have that learned nothing."""
    for arm in arms:
        points = arm.tuning.points if arm.tuning is not None else []
        means = [point.mean for point in points]
        if len(means) < 2 or max(means) - min(means) > FLAT * abs(max(means, key=abs)):
            continue
        chance = metrics_of(study.runs[0].result)[study.metric].chance
        learned = any(study.sign * (mean - chance) > 0 for mean in means)
        yield (
            f"All {len(means)} points that {arm.name} was tuned over are within "
            f"{100 * FLAT:g} % of each other, so that nothing was chosen by their scores"
            + ("." if learned else ", which are no better than chance: it has learned nothing.")
        )


def _scale_warnings(arms: Sequence[Arm]) -> Iterator[str]:
    """Names arms at one rate that nobody tuned, with different effective scales."""
    at_rate: dict[float, list[Arm]] = {}
    for arm in arms:
        tuned = arm.tuning is not None and any(map(is_rate, arm.tuning.chosen))
        if arm.rate is not None and arm.scale is not None and not tuned:
            at_rate.setdefault(arm.rate, []).append(arm)
    for shared, group in at_rate.items():
        if len({arm.scale for arm in group}) > 1:
            named = [f"{arm.name} (s = {scale(arm.scale)})" for arm in group]
            yield (
                f"{', '.join(named[:-1])} and {named[-1]} share the rate {rate(shared)}: with "
                "another s this is another rate in effect."
            )


def _run_warnings(
    study: Study, arms: Sequence[Arm], comparisons: Sequence[Comparison]
) -> Iterator[str]:
    failed = [run for run in study.runs if not (run.complete or run.diverged)]
    if failed:
        listed = "; ".join(
            f"{run.arm} {run.phase} seed {run.seed}: {run.result.get('failure', 'failed')}"
            for run in failed[:5]
        )
        more = f" and {len(failed) - 5} more" if failed[5:] else ""
        yield (
            f"{counted(len(failed), 'run')} failed and {'is' if len(failed) == 1 else 'are'} left "
            f"out ({listed}{more})."
        )
    skipping = [run for run in study.runs if run.complete and run.result.get("skipped_steps")]
    for arm in dict.fromkeys(run.arm for run in skipping):
        most = max(run.result["skipped_steps"] for run in skipping if run.arm == arm)
        number = sum(run.arm == arm for run in skipping)
        yield (
            f"{counted(number, 'run')} of {arm} left out steps whose loss or gradient was not "
            f"finite, at most {most}."
        )
    diverged = Counter(run.arm for run in study.runs if run.diverged)
    for arm, count in diverged.items():
        in_test = next(a.diverged for a in arms if a.name == arm)
        chance = score(next(r.score(study.metric) for r in study.runs if r.diverged),
                       study.metric)  # fmt: skip
        yield (
            f"{counted(count, 'run')} of {arm} diverged ({in_test} of them in the comparison) and "
            f"{'counts' if count == 1 else 'count'} with the score of chance, {chance}."
        )
    full = len(study.seeds)
    for c in comparisons:
        if c.difference.n < full:
            yield (
                f"{c.arm} is compared on the {c.difference.n} seeds that it and {c.reference} both "
                f"have, of {full}."
            )


def _environment_warnings(runs: Sequence[Run]) -> Iterator[str]:
    flat = [dict(leaves(run.environment)) for run in runs]
    different = [
        f"{key} {', '.join(map(str, values))}"
        for key in dict.fromkeys(key for record in flat for key in record)
        if key not in ("commit", "code", "uncommitted_changes")
        and len(values := list(dict.fromkeys(str(record.get(key)) for record in flat))) > 1
    ]
    if different:
        yield (
            f"The runs were made in different environments ({'; '.join(different)}): equal seeds "
            "need not be equal runs, and their times are no comparison."
        )
    commits = list(dict.fromkeys(str(run.environment.get("commit"))[:8] for run in runs))
    if len(commits) > 1:
        yield f"The runs were made by different commits ({', '.join(commits)})."
    changed = sum(bool(run.environment.get("uncommitted_changes")) for run in runs)
    if changed:
        yield f"{counted(changed, 'run')} had changes in the code that were not committed."
    for run in runs:
        for session in run.result.get("sessions", ())[1:]:
            yield (
                f"{run.arm} (seed {run.seed}, {run.phase}) was continued after step "
                f"{session['after_step']} in another environment ({'; '.join(session['differs'])})"
                ", as train.resume=anyway asked: it is a run of neither."
            )


def _function_warnings(runs: Sequence[Run]) -> Iterator[str]:
    """Counts runs of before the function of a base was recorded, if there are others."""
    known = sum("function" in run.result["fingerprints"] for run in runs)
    if known not in (0, len(runs)):
        yield (
            f"{counted(len(runs) - known, 'run')} of {len(runs)} were made before the function of "
            "a base was recorded: of their base it is known that its tensors and its tokenizer are "
            "those of the others, not its configuration."
        )
