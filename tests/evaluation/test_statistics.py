"""Statistics against tables, worked examples and numerical integration."""

from __future__ import annotations

import math
from statistics import fmean

import numpy as np
import pytest

from gateskip.errors import ConfigError, DataError
from gateskip.evaluation import statistics
from gateskip.evaluation.statistics import (
    Interval,
    estimate,
    holm,
    overlap,
    paired_difference,
    sign_flip_p,
    student_p,
    student_quantile,
    t_interval,
    wilson_interval,
)

#: Printed tables of Student's t: (confidence, degrees of freedom, quantile).
TABLE = (
    (0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 3, 3.182), (0.95, 4, 2.776), (0.95, 5, 2.571),
    (0.95, 9, 2.262), (0.95, 30, 2.042), (0.99, 4, 4.604), (0.9, 7, 1.895), (0.95, 120, 1.980),
)  # fmt: skip


def of(low: float, high: float) -> Interval:
    return Interval(low, high, "made up", 0.95, 3)


@pytest.mark.parametrize(("confidence", "freedom", "expected"), TABLE)
def test_quantiles_are_the_tables(confidence: float, freedom: int, expected: float) -> None:
    found = student_quantile(confidence, freedom)
    assert found == pytest.approx(expected, abs=6e-4)
    assert student_p(found, freedom) == pytest.approx(1 - confidence, abs=1e-12)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 11, 40])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.7, -2.5, 6.0])
def test_p_is_the_integral_of_the_density(t: float, freedom: int) -> None:
    x = np.linspace(0.0, abs(t), 20_001)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    scale = math.exp(log_scale) / math.sqrt(freedom * math.pi)
    y = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    within = 2 * float(np.trapezoid(y, x))
    assert student_p(t, freedom) == pytest.approx(1 - within, abs=1e-7)


def test_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 4, 9, 10, 29, 200):
        for confidence in (0.5, 0.9, 0.95, 0.999):
            expected = stats.t.ppf(0.5 + confidence / 2, freedom)
            assert student_quantile(confidence, freedom) == pytest.approx(expected, rel=1e-9)
        assert student_p(2.3, freedom) == pytest.approx(2 * stats.t.sf(2.3, freedom), rel=1e-9)
    one, other = [0.41, 0.47, 0.44, 0.52], [0.40, 0.43, 0.45, 0.46]
    paired = paired_difference(dict(enumerate(one)), dict(enumerate(other)))
    assert paired.p_student == pytest.approx(stats.ttest_rel(one, other).pvalue)
    wilson = stats.binomtest(7, 20).proportion_ci(method="wilson")
    found = wilson_interval(7, 20)
    assert (found.low, found.high) == pytest.approx((wilson.low, wilson.high))


def test_interval_over_seeds() -> None:
    found = t_interval([1.0, 2.0, 3.0])
    half = 4.30265 / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), abs=1e-4)
    assert (found.kind, found.confidence, found.n) == (statistics.STUDENT, 0.95, 3)
    assert t_interval([0.5, 0.5]).low == t_interval([0.5, 0.5]).high == 0.5
    wide, narrow = t_interval([1.0, 2.0, 4.0], 0.99), t_interval([1.0, 2.0, 4.0], 0.9)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_one_seed_has_no_interval() -> None:
    assert estimate([0.4]).interval is None
    assert (estimate([0.4]).mean, estimate([0.4]).n) == (0.4, 1)
    several = estimate([0.4, 0.5, 0.9])
    assert several.interval == t_interval([0.4, 0.5, 0.9])
    assert several.mean == pytest.approx(0.6)
    with pytest.raises(DataError, match="at least 2"):
        t_interval([0.4])
    with pytest.raises(DataError, match="at least 1"):
        estimate([])
    with pytest.raises(DataError, match="not finite"):
        estimate([0.4, math.nan])
    with pytest.raises(ConfigError, match="confidence"):
        t_interval([0.4, 0.5], 95)


def test_intervals_cover_as_promised() -> None:
    random = np.random.default_rng(0)
    means = [t_interval(list(random.normal(3.0, 2.0, 4))) for _ in range(4000)]
    covered = fmean(i.low <= 3.0 <= i.high for i in means)
    assert covered == pytest.approx(0.95, abs=0.011)  # three standard errors


def test_wilson() -> None:
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for right, n, low, high in (
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):  # fmt: skip
        found = wilson_interval(right, n)
        assert (found.low, found.high) == pytest.approx((low, high), abs=6e-5)
        assert (found.kind, found.n) == (statistics.WILSON, n)
    assert wilson_interval(20, 20).high == 1.0
    for right, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(DataError, match="no share"):
            wilson_interval(right, n)


def test_overlap() -> None:
    assert overlap(of(0, 1), of(1, 2)) is True
    assert overlap(of(0, 1), of(1.01, 2)) is False
    assert overlap(of(3, 4), of(1, 2)) is False
    assert overlap(of(0, 9), of(1, 2)) is True
    assert overlap(None, of(1, 2)) is None
    assert overlap(of(1, 2), None) is None


def test_paired_difference_over_common_seeds() -> None:
    found = paired_difference({0: 1.0, 1: 2.0, 2: 4.0, 7: 100.0}, {2: 1.0, 1: 1.0, 0: 1.0, 9: 0.0})
    assert (found.mean, found.n) == (pytest.approx(4 / 3), 3)
    assert found.interval == t_interval([0.0, 1.0, 3.0])
    assert found.p_student == pytest.approx(student_p((4 / 3) / (1.527525 / math.sqrt(3)), 2), 1e-5)
    assert found.p_sign_flip == 0.5  # +++, −++ and their mirrors; the first difference is 0
    single = paired_difference({0: 1.0, 1: 5.0}, {1: 4.0})
    assert (single.mean, single.n) == (1.0, 1)
    assert (single.interval, single.p_student, single.p_sign_flip) == (None, None, None)
    with pytest.raises(DataError, match="no common seed"):
        paired_difference({0: 1.0}, {1: 1.0})


def test_differences_without_spread() -> None:
    same = paired_difference({0: 0.0, 1: 0.0}, {0: 0.0, 1: 0.0})
    assert (same.p_student, same.p_sign_flip) == (1.0, 1.0)
    shifted = paired_difference({0: 1.0, 1: 1.0}, {0: 0.0, 1: 0.0})
    assert (shifted.p_student, shifted.p_sign_flip) == (0.0, 0.5)


def test_sign_flips() -> None:
    assert sign_flip_p([1.0, 2.0, 3.0, 4.0, 5.0]) == 2 / 32
    assert sign_flip_p([-1.0, -2.0, -3.0]) == 2 / 8
    assert sign_flip_p([1.0, -1.0]) == 1.0
    assert sign_flip_p([0.1, 0.2, -0.3]) == 1.0  # their sum is 0 but for rounding
    # Fisher's pairs of cross- and self-fertilised plants: 1,726 of 32,768 patterns, two-sided.
    plants = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    assert sign_flip_p(plants) == pytest.approx(1726 / 32768, abs=0.005)
    assert sign_flip_p(plants) == sign_flip_p(plants)
    assert sign_flip_p([1.0] * 20) == pytest.approx(1 / 20_001, abs=1e-4)
    with pytest.raises(DataError, match="at least 2"):
        sign_flip_p([1.0])


def test_holm() -> None:
    assert holm([]) == []
    assert holm([0.04]) == [0.04]
    # Holm's own ordering: the smallest times 4, then 3, then 2; never decreasing.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8, 0.02]) == pytest.approx([1.0, 1.0, 0.06])
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(DataError, match="p_values"):
            holm([0.5, wrong])
