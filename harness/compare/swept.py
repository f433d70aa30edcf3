"""The score over what a multirun swept: which value is best, and which smaller one is as good.

"As good" is: cannot be told from the best one at these seeds. The differences from the best are
paired by seed, and their intervals hold all at once (Bonferroni over the other values), since the
best was chosen among them. So a value that is called worse is worse with 95 % confidence, however
many values there are; a value that is not called worse may still be.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from harness.compare import stats
from harness.compare.arms import name_of, short
from harness.compare.findings import Arm, Interval, Response
from harness.compare.study import Study


def responses(study: Study, arms: Sequence[Arm]) -> list[Response]:
    """One for each swept number and each combination of the other swept keys' values."""
    found = []
    scored = [arm for arm in arms if arm.score.n and arm.name in study.varied]
    for key in study.varied_keys:
        lines: dict[str, list[Arm]] = {}
        for arm in scored:
            own = study.varied[arm.name]
            if is_number(own.get(key)) and arm.bracketed:
                lines.setdefault(name_of(_without(own, key)), []).append(arm)
        if not all(is_number(study.varied[arm.name].get(key)) for arm in scored):
            continue
        for line in lines.values():
            if len({study.varied[arm.name][key] for arm in line}) > 1:
                found.append(_response(study, key, line))
    return found


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_geometric(values: Sequence[float]) -> bool:
    """True if rising values are closer to a geometric series than to an arithmetic one: their
    steps vary less, relatively, as ratios. Of two values: the higher is at least four times the
    other."""
    if values[0] <= 0:
        return False
    if len(values) == 2:
        return values[1] >= 4 * values[0]
    steps = [b - a for a, b in pairwise(values)]
    ratios = [math.log(b / a) for a, b in pairwise(values)]
    return max(ratios) / min(ratios) < max(steps) / min(steps)


def _without(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


def _response(study: Study, key: str, line: Sequence[Arm]) -> Response:
    line = sorted(line, key=lambda arm: study.varied[arm.name][key])
    values = [study.varied[arm.name][key] for arm in line]
    best = max(range(len(line)), key=lambda at: study.sign * line[at].score.estimate)
    behind = [
        None if at == best else _behind(arm, line[best], len(line) - 1)
        for at, arm in enumerate(line)
    ]
    known = any(gap is not None and gap.n > 1 for gap in behind)
    return Response(
        key=key,
        others=_without(study.varied[line[0].name], key),
        values=values,
        arms=[arm.name for arm in line],
        best=best,
        behind=behind,
        smallest=next(at for at, gap in enumerate(behind) if not _is_worse(gap, study.sign))
        if known
        else None,
    )


def _behind(arm: Arm, best: Arm, family: int) -> Interval | None:
    seeds = [seed for seed in arm.scores if seed in best.scores]
    if not seeds:
        return None
    differences = [arm.scores[seed] - best.scores[seed] for seed in seeds]
    if not stats.varies(differences):  # its spread over other seeds is not known
        return Interval(differences[0], None, None, len(seeds))
    return stats.simultaneous_interval(differences, family)


def _is_worse(gap: Interval | None, sign: int) -> bool:
    """True if an arm is told from the best one; the best one itself is not."""
    return gap is not None and gap.bounds is not None and max(sign * b for b in gap.bounds) < 0


def grid(study: Study) -> tuple[list[Any], list[Any], dict[tuple[str, str], str]] | None:
    """The values of each of two swept keys, and (a value of each, as texts) -> arm; None if there
    are not two."""
    if len(study.varied_keys) != 2 or not all(len(v) == 2 for v in study.varied.values()):
        return None
    first, second = study.varied_keys
    values = [
        sorted(
            {short(own[key]): own[key] for own in study.varied.values()}.values(),
            key=lambda value: (0, value, "") if is_number(value) else (1, 0, ""),
        )
        for key in (first, second)
    ]
    at = {(short(own[first]), short(own[second])): arm for arm, own in study.varied.items()}
    return values[0], values[1], at
