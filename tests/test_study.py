"""A fair study decides: its design, its grid, its choice of the rate, what is matched."""

import math

import numpy as np
import pytest

from harness.compare.findings import TuningPoint
from harness.study import choice as choices
from harness.study import design as designs
from harness.study import match
from harness.study.choice import parabola_vertex, validation_score
from harness.tasks.metrics import Metric

LR = "variant.lr"
TUNE = designs.DEFAULT_TUNE


def points(curve, rates, *, diverged=(), **others):
    """A tuning phase in which two seeds score curve(rate) +- 0.001."""
    return [
        TuningPoint(
            tuned={LR: rate, **others},
            scores=[curve(rate) - 0.001, curve(rate) + 0.001],
            diverged=2 * (rate in diverged),
        )
        for rate in rates
    ]


def rates(own=2e-3, tune=TUNE):
    return [point[LR] for point in designs.grid(tune, {LR: own})]


def choose(found, tune=TUNE, *, higher_is_better=True, chance=0.5, grown=0):
    metric = Metric(higher_is_better=higher_is_better, chance=chance)
    return choices.choose(found, tune, metric, grown=grown)


def growth(found, tune, *, higher_is_better):
    return choices.growth(found, tune, Metric(higher_is_better=higher_is_better, chance=0.5))


# ---- the choice ---------------------------------------------------------------------------------


def test_what_diverged_for_every_seed_is_never_chosen():
    grid = rates()
    curve = dict(zip(grid, [0.49, 0.485, 0.49, 0.495, 0.48, 0.5, 0.5], strict=True)).get
    found = points(curve, grid, diverged=grid[5:])  # chance beats what has learnt nothing
    assert choose(found).chosen == {LR: grid[3]}


def test_multipliers_that_round_to_one_value_are_refused():
    with pytest.raises(ValueError, match="some give the same value"):
        designs.grid({LR: {"multipliers": [1, 1.001]}}, {LR: 2e-3})


def test_the_vertex_of_a_parabola_is_exact():
    x = [0.0, 1.0, 2.5]
    assert parabola_vertex(x, [3 - 2 * (v - 1.3) ** 2 for v in x]) == pytest.approx(1.3)
    assert parabola_vertex(x, [3, 3, 3]) is None


@pytest.mark.parametrize("best_rate", [9e-4, 2.1e-3, 4e-3, 1.5e-2])
@pytest.mark.parametrize("higher", [True, False])
def test_a_quadratic_in_log_rate_is_recovered(best_rate, higher):
    def curve(rate):
        below = 0.02 * math.log10(rate / best_rate) ** 2
        return 0.8 - below if higher else 0.4 + below

    found = points(curve, rates())
    chance = 0.5 if higher else math.log(2)
    choice = choose(found, higher_is_better=higher, chance=chance)
    assert choice.chosen == {LR: pytest.approx(best_rate, rel=5e-3)}
    assert choice.rule == "quadratic" and choice.bracketed
    means = sorted((p.mean for p in found), reverse=higher)
    assert choice.gap == pytest.approx(abs(means[0] - means[1]))
    assert growth(found, TUNE, higher_is_better=higher) is None


def test_the_best_at_an_edge_grows_the_grid_by_its_own_step():
    low, high = points(lambda rate: 0.8 - rate, rates()), points(lambda r: 0.7 + r, rates())
    assert rates()[0] == 6.32e-5 and rates()[-1] == 0.0632
    below = growth(low, TUNE, higher_is_better=True)
    above = growth(high, TUNE, higher_is_better=True)
    assert below == {LR: pytest.approx(2e-5, rel=3e-3)}
    assert above == {LR: pytest.approx(0.2, rel=3e-3)}
    choice = choose(high, grown=2)
    assert (choice.chosen, choice.rule, choice.bracketed) == ({LR: 0.0632}, "argmax", False)
    assert choice.grown == 2
    assert growth(high, TUNE, higher_is_better=False)[LR] < 6.32e-5


def test_a_point_that_grew_brackets_the_best():
    grown = [*rates(), 0.2]
    found = points(lambda rate: 0.8 - math.log10(rate / 0.06) ** 2 / 50, grown)
    assert choose(found, grown=1).bracketed
    assert choose(found).chosen == {LR: pytest.approx(0.06, rel=5e-3)}


@pytest.mark.parametrize("cliff", ["diverged", "collapsed"])
def test_a_cliff_is_no_parabola(cliff):
    edge = rates()[4]

    def curve(rate):
        return 0.8 + 0.01 * math.log10(rate) if rate < edge else 0.5 + 0.02

    found = points(curve, rates(), diverged=rates()[4:] if cliff == "diverged" else ())
    choice = choose(found)
    assert (choice.chosen, choice.rule, choice.bracketed) == ({LR: 2e-3}, "argmax", True)


@pytest.mark.parametrize(("score", "rule"), [(0.66, "quadratic"), (0.64, "argmax")])
def test_half_the_way_to_chance_is_a_cliff(score, rule):
    """From 0.8 to chance at 0.5; as a loss from 0.2 to chance at 0.5, by the mirrored scores."""
    found = points(lambda rate: 0.8 if rate == 2e-3 else score, rates())
    assert choose(found).rule == rule
    found = points(lambda rate: 0.2 if rate == 2e-3 else 0.2 + (0.8 - score), rates())
    assert choose(found, higher_is_better=False).rule == rule


def test_one_diverged_seed_of_two_is_enough_to_drop_a_neighbour():
    found = points(lambda rate: 0.8 - 0.01 * math.log10(rate / 2e-3) ** 2, rates())
    assert choose(found).rule == "quadratic"
    found[4] = TuningPoint(tuned=found[4].tuned, scores=[0.79, 0.5], diverged=1)
    assert choose(found).rule == "argmax"
    # Its mean alone would be no cliff.
    found[4] = TuningPoint(tuned=found[4].tuned, scores=[0.79, 0.79, 0.79, 0.5], diverged=1)
    assert found[4].mean > 0.7 and choose(found).rule == "argmax"
    found[4] = TuningPoint(tuned=found[4].tuned, scores=[0.79, 0.79, 0.79, 0.5], diverged=0)
    assert choose(found).rule == "quadratic"


def test_a_point_of_which_one_seed_diverged_may_be_the_best():
    """It has learnt most all the same; no parabola goes through it."""
    found = points(lambda rate: 0.6, rates())
    found[3] = TuningPoint(tuned=found[3].tuned, scores=[0.9, 0.5], diverged=1)
    choice = choose(found)
    assert (choice.chosen, choice.rule, choice.bracketed) == (found[3].tuned, "argmax", True)
    assert choice.gap == pytest.approx(0.1)


def test_if_all_diverged_the_grid_grows_downwards_and_is_not_bracketed():
    found = points(lambda rate: 0.5, rates(), diverged=rates())
    assert growth(found, TUNE, higher_is_better=True)[LR] < rates()[0]
    assert not choose(found).bracketed


def test_a_rate_that_changes_nothing_stays_what_it_was():
    found = points(lambda rate: 0.63, rates())
    choice = choose(found)
    assert (choice.chosen, choice.gap, choice.bracketed) == ({LR: 2e-3}, 0.0, True)
    assert growth(found, TUNE, higher_is_better=True) is None


def test_two_equal_neighbours_meet_half_way():
    heights = dict(zip(rates(), [0.6, 0.7, 0.8, 0.8, 0.7, 0.6, 0.55], strict=True))
    half_way = math.sqrt(rates()[2] * rates()[3])
    assert choose(points(heights.__getitem__, rates())).chosen == {
        LR: pytest.approx(half_way, rel=5e-3)
    }


def test_other_keys_are_tuned_beside_the_rate_with_a_product():
    tune = {LR: {"multipliers": [0.1, 1, 10]}, "dropout": {"values": [0.0, 0.1]}}
    grid = designs.grid(tune, {LR: 2e-3, "dropout": 0.0})
    assert len(grid) == 6 and {LR: 0.02, "dropout": 0.1} in grid
    found = []
    for dropout, top, best in ((0.0, 0.80, 5e-4), (0.1, 0.82, 4e-3)):
        found += points(
            lambda rate, top=top, best=best: top - 0.03 * math.log10(rate / best) ** 2,
            rates(tune={LR: tune[LR]}),
            dropout=dropout,
        )
    choice = choose(found, tune)
    assert choice.chosen == {LR: pytest.approx(4e-3, rel=5e-3), "dropout": 0.1}
    assert choice.rule == "quadratic" and choice.bracketed
    edge = growth(found[:3] + points(lambda r: 0.9 + r, rates(tune={LR: tune[LR]}),
                                           dropout=0.1), tune, higher_is_better=True)  # fmt: skip
    assert edge == {LR: 0.2, "dropout": 0.1}


def test_values_have_no_edges_and_no_parabola():
    tune = {"variant.adapter.scaling": {"values": ["lora", "rslora"]}}
    found = [
        TuningPoint(tuned=cell, scores=[score], diverged=0)
        for cell, score in zip(designs.grid(tune, {}), (0.7, 0.8), strict=True)
    ]
    choice = choose(found, tune)
    assert choice.chosen == {"variant.adapter.scaling": "rslora"}
    assert (choice.rule, choice.bracketed) == ("argmax", True)
    assert growth(found, tune, higher_is_better=True) is None


def test_two_multipliers_are_an_edge_on_both_sides():
    tune = {LR: {"multipliers": [1, 10]}}
    found = points(lambda rate: 0.8 - rate, [2e-3, 2e-2])
    assert growth(found, tune, higher_is_better=True) == {LR: 2e-4}
    assert not choose(found, tune).bracketed


def test_the_choice_loses_about_half_of_what_argmax_loses():
    """The simulation behind `choose`: mean loss of accuracy at the chosen rate."""
    rng = np.random.default_rng(0)
    grid = np.array(rates(1.0))
    lost = {"argmax": [], "choose": []}
    for draw in range(1200):
        shape, noise = draw % 4, (0.006, 0.012)[draw // 4 % 2]
        best, left = rng.uniform(-0.6, 0.6), rng.uniform(0.02, 0.08)
        right, edge = rng.uniform(0.1, 0.3), rng.uniform(0.1, 0.8)

        def curve(rate, shape=shape, best=best, left=left, right=right, edge=edge):
            x = np.log10(rate) - best
            below = [
                left * x**2,
                np.where(x < 0, left, right) * x**2,
                np.where(x < edge, left * x**2, 1),
                np.where(x < edge, left * np.maximum(-x, 0) ** 1.5, 1),
            ][shape]
            return np.maximum(0.83 - below, 0.5)

        scores = curve(grid) + rng.normal(0, noise, (2, len(grid)))
        found = [
            TuningPoint(tuned={LR: rate}, scores=list(pair), diverged=0)
            for rate, pair in zip(grid, scores.T, strict=True)
        ]
        top = curve(10 ** np.linspace(-1.5, 1.5, 601)).max()
        lost["argmax"].append(top - curve(grid[scores.mean(0).argmax()]))
        lost["choose"].append(top - curve(choose(found).chosen[LR]))
    assert 0.0018 < np.mean(lost["argmax"]) < 0.0025
    assert np.mean(lost["choose"]) < 0.65 * np.mean(lost["argmax"])


# ---- scores and seeds ---------------------------------------------------------------------------


def test_a_diverged_run_scores_as_guessing_does():
    diverged = {"status": "failed", "failure": "NonFiniteLoss", "classes": 77}
    assert validation_score(diverged, "accuracy") == pytest.approx(1 / 77)
    assert validation_score(diverged, "macro_f1") == pytest.approx(1 / 77)
    assert validation_score(diverged, "loss_nats") == pytest.approx(math.log(77))
    complete = {"status": "complete", "classes": 2, "validation": {"loss_nats": 0.3}}
    assert validation_score(complete, "loss_nats") == 0.3


# ---- the design ---------------------------------------------------------------------------------

SETTINGS = {
    "question": "Is b better than a?",
    "arms": {"a": ["variant=a"], "b": ["variant=b"], "c": ["variant=c"]},
    "reference": None,
    "primary": None,
    "metric": "accuracy",
    "match": "rank",
    "tune": None,
    "max_growth": 2,
    "tuning_seeds": [100, 101],
    "seeds": [0, 1],
    "archive": None,
}


def design(*, swept=None, seeds=None, common=(), **settings):
    return designs.read_design(
        {**SETTINGS, **settings}, swept=swept or {}, seeds=seeds, common=common
    )


def test_defaults_are_filled_in():
    found = design()
    assert found.reference == "a" and list(found.primary) == ["b", "c"]
    assert found.tune == TUNE and len(TUNE[LR]["multipliers"]) == 7
    assert design(seeds=[5]).seeds == [5]
    assert design(tune={}).tuning_seeds == []
    shifted = design(arms={"a": ["variant=a"], "b": {"overrides": ["rank=4"], "seed_offset": 9}})
    assert shifted.seed_offset == {"a": 0, "b": 9}


def test_a_sweep_makes_arms_of_every_key_but_seed():
    swept = {"variant": ["a", "b"], "dropout": ["0", "0.1"]}
    assert design(arms={}, swept=swept).arms == {
        "a dropout=0": ["variant=a", "dropout=0"],
        "a dropout=0.1": ["variant=a", "dropout=0.1"],
        "b dropout=0": ["variant=b", "dropout=0"],
        "b dropout=0.1": ["variant=b", "dropout=0.1"],
    }


def test_the_metric_is_one_of_the_task():
    metrics = {"exact_match": None, "phoneme_error_rate": None}
    assert designs.with_metric(design(metric=None), metrics, "exact_match").metric == "exact_match"
    rate = design(metric="phoneme_error_rate")
    assert designs.with_metric(rate, metrics, "exact_match") == rate
    with pytest.raises(ValueError, match=r"^metric is 'exact'.*Did you mean exact_match\?$"):
        designs.with_metric(design(metric="exact"), metrics, "exact_match")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"swept": {"dropout": ["0", "0.1"]}}, "names its arms, so dropout cannot be swept"),
        ({"arms": None}, "at least two arms"),
        ({"arms": {"a": ["variant=a"]}}, "at least two arms"),
        ({"arms": {"a": "variant=a", "b": []}}, "arm a is 'variant=a'; it must be a list"),
        ({"arms": {"a": {"seed": 1}, "b": []}}, "arm a has the setting seed"),
        ({"arms": {"a": ["seed=3"], "b": []}}, "arm a sets seed"),
        ({"reference": "d"}, "reference is 'd'; it must be one of a, b, c"),
        ({"match": "params"}, "match is 'params'; it must be one of rank, parameters, none"),
        ({"primary": ["a"]}, "primary names 'a'; the arms to compare with a are b, c"),
        ({"primary": "b"}, "primary is 'b'; it must be a list of arms, or null."),
        ({"arms": ["a", "b"]}, "arms is ['a', 'b']; it must be {name: [overrides], ...}, or null."),
        ({"tune": [1]}, "tune is [1]; it must be {key: {multipliers: [...]}}, or null."),
        ({"metric": 3}, "metric is 3; it must be the name of a metric, or null."),
        ({"seeds": 3}, "seeds is 3; it must be a list of different whole numbers."),
        ({"max_growth": "two"}, "max_growth is 'two'; it must be a whole number, 0 or more."),
        ({"tune": {LR: [1, 2]}}, "tune.variant.lr is [1, 2]"),
        ({"tune": {LR: {"multipliers": [1]}}}, "at least two"),
        ({"tune": {LR: {"multipliers": [0, 1]}}}, "must be positive"),
        ({"tune": {LR: {"values": [1, 1]}}}, "each may be there once"),
        ({"max_growth": -1}, "max_growth is -1"),
        ({"seeds": [100, 3]}, "seed 100 is among both tuning_seeds and seeds"),
        ({"seeds": [0, 0]}, "of different whole numbers"),
        ({"seeds": []}, "seeds is empty"),
        ({"tuning_seeds": []}, "tuning_seeds is empty"),
        ({"common": ["variant=a"]}, "set variant themselves; leave variant=a out"),
        (
            {"arms": {}, "swept": {LR: ["1", "2"]}},
            "variant.lr is swept and tuned; leave it out of the sweep",
        ),
        (
            {"tune": {"dropout": {"values": [0, 0.1]}}, "common": ["dropout=0.1"]},
            "dropout is tuned over values; leave dropout=0.1 out",
        ),
    ],
)
def test_a_mistake_in_a_design_is_one_sentence(changed, message):
    with pytest.raises(ValueError) as error:
        design(**changed)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_shifted_seeds_may_not_be_tuning_seeds_either():
    arms = {"a": ["variant=a"], "b": {"overrides": ["variant=b"], "seed_offset": 100}}
    with pytest.raises(ValueError, match="seed 100 is among both"):
        design(arms=arms)


def test_only_a_positive_number_is_multiplied():
    with pytest.raises(ValueError, match=r"dropout is 0\.0, which cannot be multiplied"):
        designs.grid({"dropout": {"multipliers": [1, 2]}}, {"dropout": 0.0})


def test_the_plan_counts_runs_and_warns_of_too_few_seeds():
    text = designs.plan(design(), "made", {arm: {LR: 2e-3} for arm in "abc"})
    assert "made: Is b better than a?" in text
    assert "48 runs; reference a, accuracy, match=rank" in text  # 3 x (7 x 2 + 2)
    assert "2 seeds cannot reach 0.05 in a Holm family of 2, so no p will be printed; 7 can" in text
    eight = designs.plan(design(seeds=list(range(8))), "made", {arm: {} for arm in "abc"})
    assert "8 pairs of seeds show (80 % power) a difference of 1.16 standard deviations" in eight
    one = designs.plan(design(seeds=[0]), "made", {arm: {} for arm in "abc"})
    assert "1 seed cannot reach" in one and "pairs of seeds" not in one
    assert "warning" not in designs.plan(
        design(seeds=list(range(7))), "made", {a: {} for a in "abc"}
    )


# ---- matching -----------------------------------------------------------------------------------


def config(rank, **adapter):
    ranked = {} if rank is None else {"rank": rank}
    shared = {"rank_pattern": {}, "targets": "all-linear", "layers": "all"}
    return {"variant": {"adapter": {**ranked, **adapter}}, **shared}


def test_arms_with_a_rank_must_share_it():
    configs = {"a": config(8), "b": config(8, max_rank=None), "full": config(None)}
    match.check_rank(configs, "a")
    match.check_rank(configs, "full")
    with pytest.raises(ValueError, match=r"rank of c is 4, that of a 8;.*match=none"):
        match.check_rank({**configs, "c": config(4)}, "a")
    with pytest.raises(ValueError, match="rank of c is 12, that of a 8"):
        match.check_rank({**configs, "c": config(8, max_rank=12)}, "a")
    with pytest.raises(ValueError, match=r"targets of c is \['query'\], that of a all-linear"):
        match.check_rank({**configs, "c": {**config(8), "targets": ["query"]}}, "a")


def test_the_largest_rank_that_trains_no_more_than_the_reference():
    sizes = {"a": lambda r: 100 * r, "b": lambda r: 100 * r + 50, "c": lambda r: 150 * r,
             "d": lambda r: 10 * r}  # fmt: skip
    found = match.match_parameters("a", 8, list(sizes), lambda arm, rank: sizes[arm](rank))
    assert {arm: (m["rank"], m["trainable"]) for arm, m in found.items()} == {
        "a": (8, 800),
        "b": (7, 750),
        "c": (5, 750),
        "d": (8, 80),
    }
    assert found["b"]["gap_frac"] == pytest.approx(50 / 800)
    with pytest.raises(ValueError, match="b trains 900 parameters at rank 1, a 800 at rank 8"):
        match.match_parameters("a", 8, ["b"], lambda arm, rank: 800 if arm == "a" else 900 * rank)
