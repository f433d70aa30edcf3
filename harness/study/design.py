"""A fair study as it was asked for: its arms, its seeds, its grid. No torch, no Hydra.

Phase 1 ("tune") runs every arm over the same multiples of its own rate with the same seeds and
chooses on validation; phase 2 ("compare") runs the choices with fresh seeds, paired between arms,
and reports on test. phases.py runs what is decided here, for hydra_plugins/fair_sweeper.py.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from harness.compare.arms import short
from harness.compare.stats import ALPHA, fewest_seeds, smallest_detectable
from harness.compare.table import aligned
from harness.disk.kinds import Count
from harness.disk.read import check
from harness.tasks.metrics import Metric
from harness.words import counted, did_you_mean

MATCHES = ("rank", "parameters", "none")
HALF_DECADES = (0.0316, 0.1, 0.316, 1.0, 3.16, 10.0, 31.6)
DEFAULT_TUNE: Mapping[str, Any] = {"variant.lr": {"multipliers": list(HALF_DECADES)}}


# ---- what was asked ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Design:
    """hydra.sweeper.* as plain values; see FairSweeperConf in hydra_plugins/fair_sweeper.py.

    Args:
        arms: name -> overrides.
        seed_offset: name -> a number added to every seed of that arm.
        metric: as in the settings; see `with_metric`.
        tune: key -> {"multipliers": [...]} of the arm's own value, or {"values": [...]}.
    """

    question: str
    arms: Mapping[str, Sequence[str]]
    seed_offset: Mapping[str, int]
    reference: str
    primary: Sequence[str]
    metric: str | None
    match: str
    tune: Mapping[str, Mapping[str, Sequence[Any]]]
    max_growth: int
    tuning_seeds: Sequence[int]
    seeds: Sequence[int]
    archive: str | None


def read_design(
    settings: Mapping[str, Any],
    *,
    swept: Mapping[str, Sequence[str]],
    seeds: Sequence[int] | None,
    common: Iterable[str],
) -> Design:
    """Check the settings of a study against each other and against the command line.

    Args:
        settings: hydra.sweeper.*, unresolved.
        swept: key -> values of the choices swept on the command line; without arms in the settings
            their product is the arms.
        seeds: as swept on the command line, instead of the settings'.
        common: the command line's other overrides, which apply to every run.

    Raises ValueError for a mistake.
    """
    for setting, (kind, words) in _KINDS.items():
        check(kind, settings[setting], setting, words)
    given = settings["arms"] or {}
    if given and swept:
        raise ValueError(
            f"this experiment names its arms, so {next(iter(swept))} cannot be swept as well; "
            "sweep nothing but seed."
        )
    named = {name: read_arm(name, arm) for name, arm in given.items()}
    arms = {name: overrides for name, (overrides, _) in named.items()} or arms_of_sweep(swept)
    if len(arms) < 2:
        raise ValueError(
            "a fair study compares at least two arms: sweep a choice, as in variant=a,b, or choose "
            "an experiment that names its arms."
        )
    tune = DEFAULT_TUNE if settings["tune"] is None else settings["tune"]
    reference = next(iter(arms)) if settings["reference"] is None else settings["reference"]
    others = [name for name in arms if name != reference]
    plain = ("question", "metric", "max_growth", "archive")
    design = Design(
        **{setting: settings[setting] for setting in plain},
        arms=arms,
        seed_offset={name: named[name][1] if named else 0 for name in arms},
        reference=reference,
        primary=others if settings["primary"] is None else settings["primary"],
        match=settings["match"] or _default_match(swept),
        tune=tune,
        tuning_seeds=settings["tuning_seeds"] if tune else [],
        seeds=settings["seeds"] if seeds is None else seeds,
    )
    _check_choices(design)
    _check_tune(tune)
    _check_seeds(design)
    _check_conflicts(design, swept, common)
    return design


def _default_match(swept: Iterable[str]) -> str:
    """rank, or none where the sweep is about a key that match=rank holds alike."""
    about = {key.lstrip("+").partition(".")[0] for key in swept}
    return "none" if about & {"rank", "rank_pattern", "targets", "layers"} else "rank"


def with_metric(design: Design, metrics: Mapping[str, Metric], primary: str) -> Design:
    """The design with a metric of its task: the `primary` one if it names none.

    Raises ValueError if it names another.
    """
    metric = primary if design.metric is None else design.metric
    _check_choice("metric", metric, metrics)
    return dataclasses.replace(design, metric=metric)


def read_arm(name: str, arm: Any) -> tuple[list[str], int]:
    """An arm's overrides and seed offset, from a list or {overrides: [...], seed_offset: n}."""
    if not isinstance(arm, Mapping):
        arm = {"overrides": arm}
    if unknown := set(arm) - {"overrides", "seed_offset"}:
        raise ValueError(
            f"arm {name} has the setting {min(unknown)}; it may have overrides and seed_offset."
        )
    overrides, offset = arm.get("overrides"), arm.get("seed_offset", 0)
    check(list[_Override], overrides, f"arm {name}", "a list of key=value")
    check(int, offset, f"seed_offset of arm {name}", "a whole number")
    return overrides, offset


def arms_of_sweep(swept: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The product of the swept choices: {"a dropout=0.1": ["variant=a", "dropout=0.1"], ...}."""
    if not swept:
        return {}
    products = itertools.product(*([(key, v) for v in values] for key, values in swept.items()))
    return {
        " ".join(v if key == "variant" else f"{key.lstrip('+')}={v}" for key, v in choices): [
            f"{key}={v}" for key, v in choices
        ]
        for choices in products
    }


def _different(listed: list[int]) -> list[int]:
    if len(set(listed)) < len(listed):
        raise ValueError
    return listed


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


_Override = Annotated[str, Field(pattern="=")]
_Different = Annotated[list[int], AfterValidator(_different)]
_KINDS: Mapping[str, tuple[Any, str]] = {  # setting -> its schema, in words
    "question": (str, "text"),
    "arms": (dict | None, "{name: [overrides], ...}, or null"),
    "reference": (str | None, "the name of an arm, or null"),
    "primary": (list | None, "a list of arms, or null"),
    "metric": (str | None, "the name of a metric, or null"),
    "match": (str | None, f"one of {', '.join(MATCHES)}, or null"),
    "tune": (dict | None, "{key: {multipliers: [...]}}, or null"),
    "max_growth": (Count, "a whole number, 0 or more"),
    "archive": (str | None, "a runs.jsonl or a folder with one, or null"),
}


def _check_choices(design: Design) -> None:
    _check_choice("match", design.match, MATCHES)
    _check_choice("reference", design.reference, design.arms)
    for name in design.primary:
        if not isinstance(name, str):
            raise ValueError(f"primary names {name!r}; it must be a list of arms.")
        if name not in design.arms or name == design.reference:
            others = [arm for arm in design.arms if arm != design.reference]
            raise ValueError(
                f"primary names {name!r}; the arms to compare with {design.reference} are "
                f"{', '.join(others)}.{did_you_mean(name, others)}"
            )


def _check_choice(setting: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ValueError(
            f"{setting} is {value!r}; it must be one of {', '.join(known)}."
            f"{did_you_mean(value, known)}"
        )


def _check_tune(tune: Mapping[str, Any]) -> None:
    for key, spec in tune.items():
        if not isinstance(spec, Mapping) or set(spec) not in ({"multipliers"}, {"values"}):
            raise ValueError(
                f"tune.{key} is {spec!r}; it must be {{multipliers: [...]}} or {{values: [...]}}."
            )
        ((kind, listed),) = spec.items()
        if not isinstance(listed, list) or len(listed) < 2:
            raise ValueError(f"{kind} of {key} is {listed!r}; tuning needs a list of at least two.")
        if kind == "multipliers" and not all(
            isinstance(m, int | float) and m > 0 and math.isfinite(m) for m in listed
        ):
            raise ValueError(f"multipliers of {key} are {listed}; they must be positive numbers.")
        if len(set(map(str, listed))) < len(listed):
            raise ValueError(f"{kind} of {key} are {listed}; each may be there once.")


def _check_seeds(design: Design) -> None:
    for setting, seeds in (("seeds", design.seeds), ("tuning_seeds", design.tuning_seeds)):
        check(_Different, seeds, setting, "a list of different whole numbers")
        if not seeds and (setting == "seeds" or design.tune):
            raise ValueError(f"{setting} is empty; give at least one.")
    offsets = set(design.seed_offset.values())
    fresh = {seed + offset for seed in design.seeds for offset in offsets}
    both = fresh & {seed + offset for seed in design.tuning_seeds for offset in offsets}
    if both:
        raise ValueError(
            f"seed {min(both)} is among both tuning_seeds and seeds; a comparison needs seeds that "
            "nothing was chosen by."
        )


def _check_conflicts(
    design: Design, swept: Mapping[str, Sequence[str]], common: Iterable[str]
) -> None:
    given = {key_of(override): override for override in common}
    for name, overrides in design.arms.items():
        for key in map(key_of, overrides):
            if key in given:
                raise ValueError(
                    f"the arms of this study set {key} themselves; leave {given[key]} out."
                )
            if key == "seed":
                raise ValueError(f"arm {name} sets seed; a study's seeds are in seeds.")
            if key == "train.evaluate_test":
                raise ValueError(f"arm {name} sets {key}; a study looks at test itself.")
            if "values" in design.tune.get(key, {}):
                raise ValueError(f"arm {name} sets {key}, which is tuned over values.")
    for key in design.tune:
        if key in ("seed", "train.evaluate_test"):
            raise ValueError(f"{key} cannot be tuned; a study sets it itself.")
        if key in (k.lstrip("+") for k in swept):
            raise ValueError(
                f"{key} is swept and tuned; leave it out of the sweep, or set "
                "hydra.sweeper.tune={} to tune nothing."
            )
        if key in given and "values" in design.tune[key]:
            raise ValueError(f"{key} is tuned over values; leave {given[key]} out.")


# ---- the grid ------------------------------------------------------------------------------------


def rounded(value: float) -> float:
    """Round to three significant digits, so that folders and tables stay readable."""
    return float(f"{value:.3g}")


def scaled_key(tune: Mapping[str, Any]) -> str | None:
    """The first key that is tuned by multipliers: the one with a curve, edges and a quadratic."""
    return next((key for key, spec in tune.items() if "multipliers" in spec), None)


def grid(tune: Mapping[str, Any], own: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the tuned keys' values, [{key: value}]; [{}] if nothing is tuned.

    Args:
        own: key -> the arm's composed value, which multipliers multiply.

    Raises ValueError if that is no positive number.
    """
    axes = []
    for key, spec in tune.items():
        if "values" in spec:
            axes.append([(key, value) for value in spec["values"]])
            continue
        value = own[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{key} is {value!r}, which cannot be multiplied; tune it by values.")
        multiples = [rounded(value * m) for m in sorted(spec["multipliers"])]
        if len(set(multiples)) < len(multiples):
            raise ValueError(
                f"multipliers of {key} are {spec['multipliers']}; to three digits, some give the "
                "same value."
            )
        axes.append([(key, multiple) for multiple in multiples])
    return [dict(point) for point in itertools.product(*axes)]


# ---- the plan ------------------------------------------------------------------------------------


def plan(design: Design, name: str, own: Mapping[str, Mapping[str, Any]]) -> str:
    """The study before anything is run.

    Args:
        own: arm -> tuned keys (variant.lr if none) -> its composed values.
    """
    points = math.prod(len(next(iter(spec.values()))) for spec in design.tune.values())
    tuning = points * len(design.tuning_seeds) if design.tune else 0
    rows = [["arm", "tuning runs", "comparison runs", "default"]]
    for arm in design.arms:
        values = ", ".join(f"{key}={short(value)}" for key, value in own[arm].items())
        rows.append([arm, str(tuning), str(len(design.seeds)), values])
    total = len(design.arms) * (tuning + len(design.seeds))
    lines = [
        f"study {name}: {design.question}".rstrip(": "),
        "",
        *aligned(rows, left=(0, 3)),
        "",
        f"{total} runs; reference {design.reference}, {design.metric or 'the metric of the task'}, "
        f"match={design.match}",
    ]
    for key, spec in design.tune.items():
        ((kind, listed),) = spec.items()
        what = "multiples of the default" if kind == "multipliers" else "values"
        lines.append(f"tuned: {key} over the {what} {', '.join(map(short, listed))}")
    if design.tune:
        lines.append(
            f"tuning seeds {_listed(design.tuning_seeds)}, on validation; where the best is at an "
            f"edge, at most {design.max_growth} more points an arm"
        )
    lines.append(f"comparison seeds {_listed(design.seeds)}, on test")
    n, family = len(design.seeds), len(design.primary)
    if n > 1:
        lines.append(
            f"{n} pairs of seeds show (80 % power) a difference of "
            f"{smallest_detectable(1.0, n):.2f} standard deviations of the paired differences"
        )
    if family and n < (needed := fewest_seeds(family)):
        lines.append(
            f"warning: {counted(n, 'seed')} cannot reach {ALPHA} in a Holm family of {family}, so "
            f"no p will be printed; {needed} can."
        )
    return "\n".join(lines)


def _listed(seeds: Sequence[int]) -> str:
    run = len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]} to {seeds[-1]}" if run else ", ".join(map(str, seeds))
