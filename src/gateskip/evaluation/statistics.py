"""Means over seeds with their intervals, differences between methods, and what many tests cost.

Small functions of numbers alone. An interval always says by name how it was made, and where one
seed allows none there is none: :class:`Estimate` then has ``interval=None``.

Student's t needs no library: for a whole number of degrees of freedom its distribution is a finite
sum (Abramowitz and Stegun, 26.7.3 and 26.7.4), which is inverted by bisection.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist, fmean, stdev

import numpy as np

from gateskip.errors import ConfigError, DataError

__all__ = [
    "EXACT_PAIRS",
    "STUDENT",
    "WILSON",
    "Estimate",
    "Interval",
    "PairedDifference",
    "estimate",
    "holm",
    "overlap",
    "paired_difference",
    "sign_flip_p",
    "student_p",
    "student_quantile",
    "t_interval",
    "wilson_interval",
]

STUDENT = "Student's t over seeds"
WILSON = "Wilson score over questions"
#: Up to so many pairs all sign flips are counted; beyond, so many are drawn.
EXACT_PAIRS, DRAWS = 12, 20_000


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval.

    Attributes:
        low, high: its ends. kind: how it was made. confidence: its coverage, such as 0.95.
        n: seeds, or questions, that it is of.
    """

    low: float
    high: float
    kind: str
    confidence: float
    n: int


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds; ``interval`` is None where there is one seed only."""

    mean: float
    n: int
    interval: Interval | None


@dataclasses.dataclass(frozen=True, slots=True)
class PairedDifference:
    """The first method less the second, over the seeds that both have.

    Attributes:
        mean: of the differences. n: pairs. interval: None for one pair.
        p_student: two-sided p-value of the paired t test; p_sign_flip: of the sign-flip test. Both
            None for one pair.
    """

    mean: float
    n: int
    interval: Interval | None
    p_student: float | None
    p_sign_flip: float | None


def _finite(values: Sequence[float], least: int, what: str) -> None:
    if len(values) < least:
        raise DataError(f"{what} needs at least {least} values; there are {len(values)}.")
    if not all(math.isfinite(value) for value in values):
        raise DataError(f"{what}: {[v for v in values if not math.isfinite(v)]} is not finite.")


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise ConfigError(f"confidence={confidence!r} must be in (0, 1), such as 0.95.")


def student_p(t: float, freedom: int) -> float:
    """P(|T| ≥ |t|) of Student's t with ``freedom`` ≥ 1 degrees of freedom, ν below.

    With θ = arctan(|t| / √ν) the probability within ±t is, for odd ν,
    2/π · (θ + sin θ · (cos θ + 2/3 cos³ θ + … + 2·4⋯(ν−3) / (3·5⋯(ν−2)) cos^(ν−2) θ)), and for even
    ν sin θ · (1 + 1/2 cos² θ + … + 1·3⋯(ν−3) / (2·4⋯(ν−2)) cos^(ν−2) θ).
    """
    if freedom < 1:
        raise ConfigError(f"freedom={freedom!r} must be at least 1.")
    theta = math.atan(abs(t) / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for power in range(1 if odd else 0, freedom - 1, 2):  # term holds this power of the cosine
        total += term
        term *= math.cos(theta) ** 2 * (power + 1) / (power + 2)
    within = math.sin(theta) * total
    if odd:
        within = 2.0 / math.pi * (theta + within)
    return min(1.0, max(0.0, 1.0 - within))


def student_quantile(confidence: float, freedom: int) -> float:
    """The t that |T| stays below with probability ``confidence``: 12.706 for 0.95 and 1."""
    _check_confidence(confidence)
    low, high = 0.0, 1.0
    while student_p(high, freedom) > 1.0 - confidence:
        low, high = high, 2.0 * high
    for _ in range(200):
        middle = (low + high) / 2.0
        if middle in (low, high):
            break
        low, high = (
            (middle, high) if student_p(middle, freedom) > 1.0 - confidence else (low, middle)
        )
    return (low + high) / 2.0


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean ± t_{n−1} · s / √n, s the standard deviation with n − 1.

    Raises:
        DataError: fewer than two values, or one that is not finite. ConfigError: bad confidence.
    """
    _finite(values, 2, "an interval over seeds")
    n = len(values)
    half = student_quantile(confidence, n - 1) * stdev(values) / math.sqrt(n)
    mean = fmean(values)
    return Interval(mean - half, mean + half, STUDENT, confidence, n)


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean and t interval over seeds; no interval for one seed. Raises DataError for none."""
    _finite(values, 1, "a mean")
    interval = t_interval(values, confidence) if len(values) > 1 else None
    return Estimate(fmean(values), len(values), interval)


def wilson_interval(right: float, questions: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval (1927) of one run's accuracy: what its number of questions allows.

    With p = right / n and the normal quantile z:
    (p + z²/2n ± z · √(p(1−p)/n + z²/4n²)) / (1 + z²/n).

    Args:
        right: answers that are right, between 0 and ``questions``.

    Raises:
        DataError: no questions, or more right answers than questions. ConfigError: bad confidence.
    """
    _check_confidence(confidence)
    if questions < 1 or not 0 <= right <= questions:
        raise DataError(f"right={right!r} of questions={questions!r} is no share of answers.")
    z = NormalDist().inv_cdf(0.5 + confidence / 2.0)
    n, p = questions, right / questions
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return Interval(max(0.0, low), min(1.0, high), WILSON, confidence, n)


def overlap(one: Interval | None, other: Interval | None) -> bool | None:
    """Whether two intervals share a point; None, undecided, where one is missing."""
    if one is None or other is None:
        return None
    return one.low <= other.high and other.low <= one.high


def paired_difference(
    one: Mapping[int, float], other: Mapping[int, float], confidence: float = 0.95
) -> PairedDifference:
    """``one`` less ``other`` over their common seeds.

    Args:
        one, other: a figure by seed.

    Raises:
        DataError: no common seed, or a figure that is not finite. ConfigError: bad confidence.
    """
    seeds = sorted(set(one) & set(other))
    if not seeds:
        raise DataError(f"no common seed: {sorted(one)} and {sorted(other)}.")
    differences = [one[seed] - other[seed] for seed in seeds]
    found = estimate(differences, confidence)
    if found.interval is None:
        return PairedDifference(found.mean, 1, None, None, None)
    spread = stdev(differences)
    if spread > 0.0:
        p = student_p(found.mean / (spread / math.sqrt(found.n)), found.n - 1)
    else:  # the same in every seed
        p = 1.0 if found.mean == 0.0 else 0.0
    return PairedDifference(found.mean, found.n, found.interval, p, sign_flip_p(differences))


def sign_flip_p(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value of "each difference is as likely with the other sign" (Fisher, 1935).

    The share of sign patterns whose |sum| is at least the one found: all 2ⁿ of up to 12
    differences, else 20,000 drawn ones, the one found counted among them. It is never below
    2^(1−n): with five seeds 0.0625.

    Raises:
        DataError: fewer than two differences, or one that is not finite.
    """
    _finite(differences, 2, "a sign-flip test")
    d_N = np.asarray(differences, dtype=np.float64)
    if len(d_N) <= EXACT_PAIRS:
        signs_SN = np.array(list(itertools.product((1.0, -1.0), repeat=len(d_N))))
        extra = 0
    else:
        signs_SN = np.random.default_rng(seed).choice((1.0, -1.0), size=(DRAWS, len(d_N)))
        extra = 1
    found = abs(d_N.sum())
    slack = 1e-12 * np.abs(d_N).sum()  # rounding must not part patterns that are equal
    as_far = int((np.abs(signs_SN @ d_N) >= found - slack).sum())
    return (as_far + extra) / (len(signs_SN) + extra)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979), in the order given: valid however the tests depend.

    The i-th smallest of m becomes the largest of min(1, (m − j + 1) · p_(j)) over j ≤ i; those at
    most α are significant with a chance of at most α of any error.

    Raises:
        DataError: a value outside [0, 1].
    """
    if not all(0.0 <= p <= 1.0 for p in p_values):
        raise DataError(f"p_values={list(p_values)!r} must lie in [0, 1].")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
