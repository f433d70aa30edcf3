"""Statistics against scipy, against definitions written out, and by simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from harness.compare import stats


@pytest.fixture
def rng():
    return np.random.default_rng(20261121)


# ---- intervals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 8, 40])
def test_the_paired_interval_is_scipys(rng, n):
    a, b = rng.normal(0.8, 0.01, n), rng.normal(0.79, 0.02, n)
    found = stats.t_interval(list(a - b))
    expected = scipy_stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert found.estimate == pytest.approx(np.mean(a - b)) and found.n == n
    wide = scipy_stats.ttest_rel(a, b).confidence_interval(1 - 0.05 / 5)
    assert stats.simultaneous_interval(list(a - b), 5).low == pytest.approx(wide.low, rel=1e-12)


def test_one_value_has_no_interval_and_none_is_an_error():
    assert stats.t_interval([0.5]) == stats.Interval(0.5, None, None, 1)
    with pytest.raises(ValueError, match="at least one"):
        stats.t_interval([])
    with pytest.raises(ValueError, match="not finite"):
        stats.t_interval([0.5, math.nan])


def test_equal_values_have_an_interval_without_width():
    assert stats.t_interval([0.25, 0.25, 0.25]) == stats.Interval(0.25, 0.25, 0.25, 3)


def covers(interval, truth):
    return interval.low <= truth <= interval.high


@pytest.mark.parametrize("n", [3, 8])
def test_the_interval_covers_as_often_as_it_says(rng, n):
    hits = sum(covers(stats.t_interval(rng.normal(0.3, 2.0, n)), 0.3) for _ in range(2000))
    assert abs(hits / 2000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_simultaneous_intervals_hold_all_at_once(rng):
    """Differences from one reference are correlated: Bonferroni covers at least as often."""
    hits = 0
    for _ in range(1000):
        reference = rng.normal(0, 1, 8)
        rows = rng.normal(0, 1, (5, 8)) - reference
        hits += all(covers(stats.simultaneous_interval(row, 5), 0.0) for row in rows)
    assert 0.94 < hits / 1000 < 0.99


def test_the_interval_of_the_deviation_covers(rng):
    hits = 0
    for _ in range(2000):
        low, high = stats.deviation_interval(rng.normal(5, 3.0, 6))
        hits += low <= 3.0 <= high
    assert abs(hits / 2000 - 0.95) < 0.02


# ---- sign flips and Holm ------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "p"), [(1, 1.0), (3, 0.25), (8, 0.0078125)])
def test_known_p_where_all_have_one_sign(rng, n, p):
    assert stats.sign_flip_p(list(rng.uniform(0.1, 1, n))) == p
    assert stats.sign_flip_p(list(-rng.uniform(0.1, 1, n))) == p


@pytest.mark.parametrize("trial", range(6))
def test_the_sign_flip_p_is_scipys(rng, trial):
    """Differences of accuracies: many ties, and a zero."""
    differences = rng.integers(-4, 7, 7) / 1108
    if trial == 0:
        differences[2] = 0
    expected = scipy_stats.permutation_test(
        (differences,), lambda x, axis: np.abs(np.mean(x, axis=axis)).round(12),
        permutation_type="samples", alternative="greater", vectorized=True, n_resamples=np.inf,
    ).pvalue  # fmt: skip
    assert stats.sign_flip_p(list(differences)) == expected


def test_ties_count_as_reached_whatever_their_rounding():
    """All 2^3 sums of tenths written out: |sum| = 0.6 for two patterns only, 0.2 or more for 6."""
    assert stats.sign_flip_p([0.1, 0.2, 0.3]) == 0.25
    assert stats.sign_flip_p([0.3, -0.2, 0.1]) == 0.75  # 0.3 - 0.2 + 0.1 is not 0.2 in binary


def test_zeros_carry_no_sign():
    assert stats.sign_flip_p([0.0, 0.0]) == 1.0
    assert stats.sign_flip_p([1.0, 2.0, 3.0, 0.0, 0.0]) == 0.25
    assert stats.sign_flip_p([1.0] * 3 + [0.0] * 30) == 0.25  # nor does it make a list too long


def test_above_twenty_patterns_are_drawn(rng):
    differences = list(rng.normal(0.45, 1, 21))
    signs = 1 - 2 * (np.arange(2**20, dtype=np.int32)[:, None] >> np.arange(20) & 1)
    sums = signs @ np.array(differences[:20])
    exact = np.mean(np.abs(sums) >= abs(sum(differences[:20])) - 1e-12)
    assert stats.sign_flip_p(differences[:20]) == exact
    drawn = stats.sign_flip_p(differences, rng, draws=20_000)
    normal = 2 * scipy_stats.norm.sf(abs(sum(differences)) / math.hypot(*differences))
    assert drawn == pytest.approx(normal, abs=0.015)
    for shift in (-0.1, 0.1):  # where both sides of the null count
        differences = list(rng.normal(shift, 1, 24))
        normal = 2 * scipy_stats.norm.sf(abs(sum(differences)) / math.hypot(*differences))
        drawn = stats.sign_flip_p(differences, rng, draws=20_000)
        assert normal > 0.2 and drawn == pytest.approx(normal, abs=0.03)
    with pytest.raises(ValueError, match="give a generator"):
        stats.sign_flip_p(differences)
    assert stats.sign_flip_p([1.0] * 40, rng, draws=999) == 1 / 1000  # never 0


def test_holm_known_answers():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx(
        [0.05, 0.08, 0.09, 0.09, 0.09]
    )
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_holm_is_the_closed_test_of_bonferroni(rng):
    """Its definition: the largest Bonferroni p over all subfamilies that hold the hypothesis."""
    p = list(rng.uniform(0, 0.2, 5))
    families = [f for k in range(1, 6) for f in itertools.combinations(range(5), k)]
    expected = [
        max(min(1.0, len(f) * min(p[j] for j in f)) for f in families if i in f) for i in range(5)
    ]
    assert stats.holm(p) == pytest.approx(expected)


@pytest.mark.parametrize("family", range(1, 30))
def test_the_fewest_seeds_that_holm_can_pass(family):
    n = stats.fewest_seeds(family)
    assert n == math.ceil(1 + math.log2(family / 0.05))
    p = stats.sign_flip_p([1.0] * n)
    assert stats.holm([p] + [1.0] * (family - 1))[0] <= 0.05
    fewer = stats.sign_flip_p([1.0] * (n - 1))
    assert stats.holm([fewer] + [1.0] * (family - 1))[0] > 0.05


# ---- the bootstrap ------------------------------------------------------------------------------


def test_the_bootstrap_resamples_seeds_and_items_alike(rng):
    """Seeds that all say the same leave the items' error, and the other way round."""
    items = rng.choice([-1.0, 0.0, 1.0], 400)
    found = stats.bootstrap_interval(np.tile(items, (6, 1)), rng)
    error = items.std() / math.sqrt(400)
    assert found.estimate == pytest.approx(items.mean()) and found.n == 6
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    seeds = rng.normal(0, 1, 30)
    found = stats.bootstrap_interval(np.tile(seeds[:, None], (1, 400)), rng)
    assert found.high - found.low == pytest.approx(2 * 1.96 * seeds.std() / math.sqrt(30), rel=0.1)


def test_the_bootstrap_covers_and_errs_as_documented(rng):
    """8 seeds x 150 items with effects of both and noise: near 95 %, a little off at few seeds."""
    hits = 0
    for _ in range(400):
        table = (
            rng.normal(0, 0.02, (8, 1))
            + rng.normal(0, 0.2, (1, 150))
            + rng.normal(0, 0.3, (8, 150))
        )
        hits += covers(stats.bootstrap_interval(table + 0.1, rng, draws=400), 0.1)
    assert 0.90 < hits / 400 < 0.985


def test_the_bootstrap_needs_two_seeds_and_follows_its_generator():
    table = np.random.default_rng(1).normal(0, 1, (4, 50))
    one, two = (stats.bootstrap_interval(table, np.random.default_rng(5)) for _ in range(2))
    assert one == two
    assert stats.bootstrap_interval(table[:1], np.random.default_rng(5)).low is None


# ---- planning -----------------------------------------------------------------------------------


def test_the_smallest_detectable_difference_of_the_protocol():
    assert stats.smallest_detectable(1.0, 8) == pytest.approx(1.16, abs=0.005)
    assert stats.smallest_detectable(1.0, 8, alpha=0.01) == pytest.approx(1.60, abs=0.005)
    assert stats.smallest_detectable(0.02, 8) == pytest.approx(0.02 * 1.156, abs=1e-4)
    assert stats.smallest_detectable(0.0, 8) == 0.0


@pytest.mark.parametrize("n", [3, 8, 30])
def test_power_by_simulation(rng, n):
    effect = stats.smallest_detectable(1.0, n)
    p = scipy_stats.ttest_1samp(rng.normal(effect, 1, (20_000, n)), 0.0, axis=1).pvalue
    assert np.mean(p < 0.05) == pytest.approx(0.8, abs=0.012)


def test_seeds_needed_is_the_inverse(rng):
    for n in (3, 8, 9, 50, 300):
        d = stats.smallest_detectable(0.01, n)
        assert stats.seeds_needed(d * 1.0001, 0.01) == n
        assert stats.seeds_needed(-d * 0.9999, 0.01) == n + 1
        d = stats.smallest_detectable(0.01, n, alpha=0.01)
        assert stats.seeds_needed(d * 1.0001, 0.01, alpha=0.01) == n
    assert stats.seeds_needed(1.0, 0.0) == stats.seeds_needed(100.0, 1.0) == 2
    with pytest.raises(ValueError, match="must not be 0"):
        stats.seeds_needed(0.0, 0.01)


def test_pair_correlation():
    assert stats.correlation([1, 2, 4], [2, 4, 8]) == pytest.approx(1.0)
    assert stats.correlation([1, 2, 3], [5, 5, 5]) is None
    assert stats.correlation([1, 2], [3, 1]) is None
