"""Statistics of paired comparisons over few seeds. Randomness is an argument.

Intervals are two-sided. Sources: Student's t, its noncentral form and its quantiles from
scipy.stats; the rest is short and written here, with its paper.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from harness.cli import needs
from harness.compare.findings import Interval

ALPHA = 0.05
POWER = 0.8
ROUNDING = 1e-12  # of a difference of scores
EXACT_UP_TO = 20  # 2^20 sign patterns; above, they are drawn


def _finite(values: Sequence[float], what: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError(f"there is no {what}; at least one is needed.")
    if not np.isfinite(array).all():
        raise ValueError(f"a {what} is not finite.")
    return array


def varies(differences: Sequence[float]) -> bool:
    """False if all are equal but for rounding: their spread over other seeds is not known then."""
    return max(differences) - min(differences) > ROUNDING


def standard_deviation(values: Sequence[float]) -> float:
    """The sample's, with n - 1 in the denominator; n >= 2."""
    return float(np.std(_finite(values, "value"), ddof=1))


def deviation_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the standard deviation of a normal sample of n >= 2, from the
    chi-squared distribution."""
    stats = needs("scipy.stats")

    n = len(values)
    squares = (n - 1) * standard_deviation(values) ** 2
    low, high = stats.chi2.ppf([1 - ALPHA / 2, ALPHA / 2], n - 1)
    return math.sqrt(squares / low), math.sqrt(squares / high)


def t_interval(values: Sequence[float], confidence: float = 1 - ALPHA) -> Interval:
    """The mean of n values with Student's t interval: mean +- t_{n-1} s / sqrt(n).

    Of differences it is the paired t interval. One value has no interval: bounds are None. Raises
    ValueError for no values, or one that is not finite.
    """
    stats = needs("scipy.stats")

    array = _finite(values, "value")
    n, mean = array.size, float(array.mean())
    if n == 1:
        return Interval(mean, None, None, 1)
    quantile = float(stats.t.ppf(0.5 + confidence / 2, n - 1))
    half = quantile * standard_deviation(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def simultaneous_interval(values: Sequence[float], family: int) -> Interval:
    """A t interval at 1 - 0.05 / family: the intervals of a family of that many hold all at once
    with probability 0.95 at least, however they depend (Bonferroni; Dunn 1961, JASA 56)."""
    return t_interval(values, 1 - ALPHA / family)


def sign_flip_p(
    differences: Sequence[float], rng: np.random.Generator | None = None, draws: int = 100_000
) -> float:
    """Two-sided p of the sign-flip test of |mean difference| (Fisher 1935, The Design of
    Experiments, section 21): the share of sign patterns whose |sum| reaches the one seen.

    Exact over all 2^n for n <= 20, so p is at least 2^(1-n). Above, `draws` patterns from `rng`
    and the one seen. A difference of 0 has no sign and changes no |sum|; equal sums count as
    reached, whatever their rounding.
    """
    array = _finite(differences, "difference")
    array = array[array != 0]
    n, reached = array.size, abs(array.sum()) - 1e-9 * np.abs(array).sum()
    if n == 0:
        return 1.0
    if n <= EXACT_UP_TO:
        sums = array[:1]  # the first sign is fixed: |sum| is the same for the mirrored pattern
        for difference in array[1:]:
            sums = np.concatenate([sums + difference, sums - difference])
        return float(np.mean(np.abs(sums) >= reached))
    if rng is None:
        raise ValueError(f"{n} differences have too many sign patterns to list; give a generator.")
    count = 0
    for start in range(0, draws, 1000):  # in parts, to bound memory
        signs = rng.integers(0, 2, (min(1000, draws - start), n)) * 2 - 1
        count += int((np.abs(signs @ array) >= reached).sum())
    return (count + 1) / (draws + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values of Holm 1979 (Scandinavian Journal of Statistics 6): the i-th smallest of m
    times (m - i + 1), made monotone and capped at 1. In the order given."""
    m, largest = len(p_values), 0.0
    adjusted = [0.0] * m
    for rank, index in enumerate(sorted(range(m), key=p_values.__getitem__)):
        largest = max(largest, (m - rank) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


def fewest_seeds(family: int) -> int:
    """The smallest n at which a sign-flip p can pass Holm over `family` tests:
    ceil(1 + log2(family / 0.05)), from family * 2^(1-n) <= 0.05."""
    n = 1
    while family * 2.0 ** (1 - n) > ALPHA:
        n += 1
    return n


def bootstrap_interval(
    differences: NDArray[np.float64], rng: np.random.Generator, draws: int = 4000
) -> Interval:
    """Percentile interval (95 %) of the mean over seeds and items, both resampled: the pigeonhole
    bootstrap (Owen 2007, Annals of Applied Statistics 1).

    Args:
        differences: (seeds, items), the difference of a pair on one item, so that pairs stay whole.

    It speaks of other seeds and other items. The variance of a pure item effect is exact; that of
    the noise of single cells (seed x item) is counted about three times; the seeds' part is a
    little narrow, by sqrt((n-1)/n) and for having z in place of t. So it is a second view, next
    to the t interval. None below 2 seeds.
    """
    seeds, items = differences.shape
    estimate = float(differences.mean())
    if seeds < 2:
        return Interval(estimate, None, None, seeds)
    means = np.empty(draws)
    for start in range(0, draws, 200):  # in parts, to bound memory
        part = min(200, draws - start)
        chosen_seeds = _resampled_counts(seeds, part, rng)
        chosen_items = _resampled_counts(items, part, rng)
        sums = ((chosen_seeds @ differences) * chosen_items).sum(axis=1)
        means[start : start + part] = sums / (seeds * items)
    low, high = np.quantile(means, [ALPHA / 2, 1 - ALPHA / 2])
    return Interval(estimate, float(low), float(high), seeds)


def _resampled_counts(n: int, draws: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(draws, n): how often each of n units is in a sample of n with replacement."""
    flat = rng.integers(0, n, (draws, n)) + n * np.arange(draws)[:, None]
    return np.bincount(flat.ravel(), minlength=draws * n).reshape(draws, n).astype(np.float64)


def power_of(effect: float, n: int, alpha: float = ALPHA) -> float:
    """Power of the two-sided paired t test over n >= 2 seeds, from the noncentral t distribution.

    Args:
        effect: the mean difference in standard deviations of the differences.
    """
    stats = needs("scipy.stats")

    shift, limit = effect * math.sqrt(n), float(stats.t.ppf(1 - alpha / 2, n - 1))
    upper, lower = stats.nct.sf(limit, n - 1, shift), stats.nct.cdf(-limit, n - 1, shift)
    return float(upper + np.nan_to_num(lower))  # scipy's far tail may be NaN; it is 0 then


def smallest_detectable(sd: float, n: int, alpha: float = ALPHA) -> float:
    """The mean difference that n >= 2 paired seeds show with a power of 0.8, if the differences
    have the standard deviation `sd`; in the unit of `sd`. For n = 8: 1.16 sd."""
    optimize = needs("scipy.optimize")

    if sd == 0:
        return 0.0
    high = 1.0
    while power_of(high, n, alpha) < POWER:
        high *= 2
    return sd * float(optimize.brentq(lambda e: power_of(e, n, alpha) - POWER, 0, high))


def seeds_needed(difference: float, sd: float, alpha: float = ALPHA) -> int:
    """The smallest n >= 2 whose `smallest_detectable` is at most |difference|.

    Raises ValueError for a difference of 0: no number of seeds shows that.
    """
    if not (math.isfinite(difference) and difference):
        raise ValueError(f"the difference to be seen is {difference:g}; it must not be 0.")
    if sd == 0:
        return 2
    effect = abs(difference) / sd
    high = 2
    while power_of(effect, high, alpha) < POWER:
        high *= 2
    enough = range(high // 2 + 1, high + 1)
    return enough[bisect_left(enough, POWER, key=lambda n: power_of(effect, n, alpha))]


def correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's, over pairs; None below 3 pairs or if one side does not vary."""
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])
