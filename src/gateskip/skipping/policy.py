"""The calibrated policy: thresholds of every branch over a grid of budgets.

One table serves every budget at run time. Knows nothing of how it was calibrated.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from gateskip.config import BranchKey, Budget
from gateskip.costs import BranchCost, net_share
from gateskip.errors import BudgetError, CheckpointError
from gateskip.skipping.latency import LatencyRecord, this_machine

__all__ = ["OFF", "ThresholdTable"]

#: A threshold from here on switches a branch off: it skips protected tokens, too.
OFF = 1e30
#: Shares that differ by less are the same.
ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ThresholdTable:
    """Thresholds τ per grid point and gated branch; grid points descend from keep = 1.

    Attributes:
        allocation: ``"global"``, ``"uniform"`` or ``"searched"``.
        weigh_cost: whether scores were weighed against cost (global only).
        keep: realised share of token×branch pairs kept at each grid point, descending.
        compute: realised share of dense decoder MACs spent, net, at each grid point.
        thresholds: ``[grid][branch]``, rising along the grid (I7), in branch order.
        tokens: tokens of the calibration text.
        mean_keys: mean number of visible keys per token of the calibration text.
        shares: ``[grid][branch]``, share of valid tokens that each branch keeps; empty in tables
            of older versions.
        protected: share of tokens that no branch may skip.
        rank_error: bound of the thresholds' error in share of tokens; 0 on short text.
    """

    allocation: str
    weigh_cost: bool
    keep: tuple[float, ...]
    compute: tuple[float, ...]
    thresholds: tuple[tuple[float, ...], ...]
    tokens: int
    mean_keys: float
    shares: tuple[tuple[float, ...], ...] = ()
    protected: float = 0.0
    rank_error: float = 0.0

    def __hash__(self) -> int:
        # Thresholds are looked up at every call; all their numbers need not be read for it.
        return hash((self.keep, self.compute, self.tokens))

    def floor(self, name: str) -> float:
        """The smallest ``keep`` or ``compute`` that the table reaches."""
        return min(getattr(self, name))

    def resolve(
        self,
        budget: Budget,
        costs: Mapping[BranchKey, BranchCost] | None = None,
        records: Sequence[LatencyRecord] = (),
    ) -> tuple[float, ...] | None:
        """Thresholds per branch at ``budget``, or None where nothing is skipped.

        Args:
            costs: of every branch in order, gated or not, for a workload of its own.
            records: what machines measured, for a latency.

        Raises:
            BudgetError: the budget lies below the floor, or nothing was measured here.
        """
        at = self._place(budget, costs, records)
        return None if at is None else self._between(self.thresholds, *at)

    def expected(
        self,
        budget: Budget,
        costs: Mapping[BranchKey, BranchCost] | None = None,
        records: Sequence[LatencyRecord] = (),
    ) -> tuple[float, ...]:
        """Share of valid tokens that each branch is to keep at ``budget``.

        Raises:
            BudgetError: as :meth:`resolve`, or a table of an older version.
        """
        at = self._place(budget, costs, records)
        if at is None:
            return (1.0,) * len(self.thresholds[0])
        self._need_shares(str(budget))
        return self._between(self.shares, *at)

    @staticmethod
    def _between(
        rows: tuple[tuple[float, ...], ...], position: int, share: float
    ) -> tuple[float, ...]:
        if position == 0:
            return rows[0]
        high, low = rows[position - 1], rows[min(position, len(rows) - 1)]
        if share in (0.0, 1.0):
            return low if share else high
        return tuple(
            a + share * (b - a) if math.isfinite(a) and a != b else _next(a, b)
            for a, b in zip(high, low, strict=True)
        )

    def _place(
        self,
        budget: Budget,
        costs: Mapping[BranchKey, BranchCost] | None,
        records: Sequence[LatencyRecord],
    ) -> tuple[int, float] | None:
        """(index of the grid point below the budget, how far towards it), None for everything."""
        if budget.full:
            return None
        values, asked = self._curve(budget, costs, records), budget.value
        if asked < values[-1] - ROUNDING:
            raise BudgetError(self._too_low(budget, values[-1]))
        if budget.unit == "latency" and asked >= values[0]:
            return None  # nothing needs to be skipped
        # Values descend along the grid; a gate that costs more than it saves can start above 1.
        # Half of the layers is half of the MACs, whatever rounding says.
        position = bisect.bisect_left([-v for v in values], -asked - ROUNDING)
        if position == 0:
            return 0, 0.0
        high, low = values[position - 1], values[min(position, len(values) - 1)]
        return position, 0.0 if high == low else min((high - asked) / (high - low), 1.0)

    def _curve(
        self,
        budget: Budget,
        costs: Mapping[BranchKey, BranchCost] | None,
        records: Sequence[LatencyRecord],
    ) -> Sequence[float]:
        """What every grid point spends in the budget's unit, descending."""
        if budget.unit == "keep":
            return self.keep
        if budget.unit == "latency":
            return self._latency(budget, records)
        if budget.workload is None:
            return self.compute
        self._need_shares(str(budget))
        assert costs is not None
        gated = [key for key, cost in costs.items() if cost.gated]
        by_branch = [dict(zip(gated, row, strict=True)) for row in self.shares]
        keys = (sum(budget.workload) + 1) / 2
        # What was realised, corrected by what the formula says of other lengths.
        found = [
            spent * net_share(costs, row, keys) / net_share(costs, row, self.mean_keys)
            for spent, row in zip(self.compute, by_branch, strict=True)
        ]
        return list(itertools.accumulate(found, min))

    def _latency(self, budget: Budget, records: Sequence[LatencyRecord]) -> list[float]:
        here = this_machine()
        record = next((r for r in records if r.machine == here), None)
        if record is None:
            known = "; ".join(r.machine for r in records) or "none"
            raise BudgetError(
                f"{budget}: nothing was measured on this machine ({here}; known: {known}); call "
                "gateskip.measure_latency(model), or run gateskip latency."
            )
        shares = record.shares(budget.workload)
        points = sorted(zip(record.keep, shares, strict=True))
        return [_interpolate(points, keep) for keep in self.keep]

    def compute_at(self, keep: float) -> float:
        """Share of the dense MACs that was spent where ``keep`` was kept, by calibration."""
        return _interpolate(sorted(zip(self.keep, self.compute, strict=True)), keep)

    def _need_shares(self, what: str) -> None:
        if not self.shares:
            raise BudgetError(
                f"{what}: these thresholds do not say what each branch keeps; calibrate again."
            )

    def _too_low(self, budget: Budget, floor: float) -> str:
        text = f"{budget} is below the floor {floor:.3f} of this calibration; ask for at least that"
        if budget.unit == "keep" and budget.value < self.protected:
            return f"{text} ({self.protected:.1%} of the tokens are protected and always computed)."
        return f"{text}, or calibrate again with a longer grid."

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ThresholdTable:
        """Rebuild from :meth:`to_json`. Raises CheckpointError when fields are missing."""
        try:
            return cls(
                allocation=data["allocation"],
                weigh_cost=data["weigh_cost"],
                keep=tuple(data["keep"]),
                compute=tuple(data["compute"]),
                thresholds=tuple(tuple(row) for row in data["thresholds"]),
                tokens=data["tokens"],
                mean_keys=data["mean_keys"],
                shares=tuple(tuple(row) for row in data.get("shares", ())),
                protected=data.get("protected", 0.0),
                rank_error=data.get("rank_error", 0.0),
            )
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"thresholds are damaged ({error}); calibrate again.") from error


def _next(a: float, b: float) -> float:
    """Between two thresholds that have no between: what was never skipped and then is off is off
    at once, so that the budget is not exceeded."""
    return b if a == -math.inf and b >= OFF else a


def _interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """The value at x of the line through points in rising order, constant outside."""
    at = bisect.bisect_left(points, (x,))
    if at == 0 or at == len(points):
        return points[min(at, len(points) - 1)][1]
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
