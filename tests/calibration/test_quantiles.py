"""Quantiles of a stream: exact while it is short, within the stated error afterwards."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateskip.fitting.quantiles import Quantiles, pooled


def streamed(values: np.ndarray, capacity: int, part: int = 37) -> Quantiles:
    found = Quantiles(capacity)
    for start in range(0, len(values), part):
        found.add(values[start : start + part])
    return found


def test_exact_while_short() -> None:
    values = np.random.default_rng(0).normal(size=900)
    found = streamed(values, 1024)
    assert found.rank_error == 0.0
    for skipped in (0, 1, 450.5, 899, 5000):
        expected = np.sort(values)[min(int(skipped), 899)]
        assert found.weighted().lowest(skipped) == expected
        assert found.weighted().below(expected) == min(int(skipped), 899)


def test_ties_never_skip_more_than_asked() -> None:
    scores = np.array([1.0] * 50 + [2.0] * 50)
    found = streamed(scores, 1024).weighted()
    for asked in (0, 10, 49.9, 50, 70):
        assert (scores < found.lowest(asked)).sum() <= asked
    assert (np.arange(100.0) < streamed(np.arange(100.0), 1024).weighted().lowest(30)).sum() == 30


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6000), st.sampled_from([16, 64, 256]), st.integers(0, 9),
    st.sampled_from(["normal", "sorted", "reversed", "ties"]),
)  # fmt: skip
def test_ranks_are_within_the_stated_error(n: int, capacity: int, seed: int, kind: str) -> None:
    values = np.random.default_rng(seed).normal(size=n)
    if kind in ("sorted", "reversed"):
        values = np.sort(values)[:: 1 if kind == "sorted" else -1]
    elif kind == "ties":
        values = np.round(values, 1)
    found = streamed(values, capacity)
    held = found.weighted()
    assert held.total == found.count == n
    for value in np.quantile(values, [0.0, 0.1, 0.5, 0.9, 1.0]):
        assert abs(held.below(value) - (values < value).sum()) <= found.error + 1e-9
    assert held.lowest(0.0) == values.min()


def test_memory_does_not_grow_with_the_stream() -> None:
    found = Quantiles(256)
    for _ in range(400):
        found.add(np.random.default_rng(0).normal(size=1000))
    assert len(found.weighted().values) < 256 * 12
    assert 0 < found.rank_error < 0.05
    again = Quantiles(256)
    for _ in range(400):
        again.add(np.random.default_rng(0).normal(size=1000))
    assert np.array_equal(found.weighted().values, again.weighted().values), "deterministic"


def test_pooled_streams_are_one() -> None:
    a, b = np.arange(10.0), np.arange(20.0, 25.0)
    held = pooled([(streamed(a, 64), 100.0), (streamed(b, 64), 0.0)])
    assert held.total == 15
    assert held.lowest(4.0) == 24.0
    assert held.lowest(5.0) == pytest.approx(100.0)
