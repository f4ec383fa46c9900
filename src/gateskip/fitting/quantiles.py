"""Quantiles of a stream in memory that does not grow with it, exact while the stream is short.

The method is that of Manku, Rajagopalan and Lindsay (SIGMOD 1998): a full buffer is sorted and
every second value kept at twice the weight. It is deterministic, so calibration is, too.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["Quantiles", "Weighted", "pooled"]

Floats = NDArray[np.float64]
CAPACITY = 16_384


class Weighted:
    """Values in rising order, each standing for a number of observations.

    Attributes:
        values, weights: float64 ``[n]``. total: number of observations.
    """

    def __init__(self, values: Floats, weights: Floats) -> None:
        order = np.argsort(values, kind="stable")
        self.values, self.weights = values[order], weights[order]
        self.total = float(weights.sum())
        self._below = np.concatenate([[0.0], np.cumsum(self.weights)])

    def lowest(self, skipped: float) -> float:
        """The value below which at most ``skipped`` observations lie; ties never skip more."""
        at = int(np.searchsorted(self._below, skipped + 1e-9, side="right")) - 1
        return float(self.values[min(max(at, 0), len(self.values) - 1)])

    def below(self, value: float) -> float:
        """Observations strictly below a value."""
        return float(self._below[int(np.searchsorted(self.values, value, side="left"))])


class Quantiles:
    """A stream of numbers: :meth:`add`, then :meth:`weighted`.

    Attributes:
        count: observations so far.
        error: bound of the rank error, in observations; 0 while there are fewer than ``capacity``.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.count = 0
        self.error = 0
        self._levels: list[list[Floats]] = [[]]
        self._odd: list[bool] = [False]
        self._lowest = math.inf
        self._sorted: Weighted | None = None

    def add(self, values: Floats) -> None:
        """More observations, float ``[n]``."""
        if not len(values):
            return
        self.count += len(values)
        self._lowest = min(self._lowest, float(values.min()))
        self._sorted = None
        for start in range(0, len(values), self.capacity):
            part = np.asarray(values[start : start + self.capacity], dtype=np.float64)
            self._levels[0].append(part)
            self._compact(0)

    def _compact(self, level: int) -> None:
        held = self._levels[level]
        n = sum(map(len, held))
        if n < self.capacity:
            return
        values = np.sort(np.concatenate(held))
        even = n - n % 2  # an odd one out stays
        start = int(self._odd[level])
        self._odd[level] = not self._odd[level]
        self.error += 1 << level
        if level + 1 == len(self._levels):
            self._levels.append([])
            self._odd.append(False)
        self._levels[level] = [values[even:]] if n > even else []
        self._levels[level + 1].append(values[start:even:2])
        self._compact(level + 1)

    @property
    def rank_error(self) -> float:
        """Bound of the rank error as a share of the observations."""
        return self.error / max(self.count, 1)

    def weighted(self) -> Weighted:
        """What is held, as weighted values."""
        if self._sorted is None:
            parts = [
                (part, float(1 << level))
                for level, held in enumerate(self._levels)
                for part in held
            ]
            values = np.concatenate([part for part, _ in parts]) if parts else np.zeros(0)
            weights = [np.full(len(part), weight) for part, weight in parts]
            self._sorted = Weighted(values, np.concatenate(weights) if weights else np.zeros(0))
            if len(values):  # below the lowest of all lies nobody, whatever was thinned out
                self._sorted.values[0] = self._lowest
        return self._sorted


def pooled(streams: list[tuple[Quantiles, float]]) -> Weighted:
    """Several streams as one, each shifted by a number; errors add up."""
    held = [(stream.weighted(), shift) for stream, shift in streams]
    values = np.concatenate([w.values + shift for w, shift in held])
    return Weighted(values, np.concatenate([w.weights for w, _ in held]))
