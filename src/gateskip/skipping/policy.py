"""The calibrated policy: thresholds of every branch over a grid of budgets.

One table serves every budget at run time. Knows nothing of how it was calibrated.
"""

from __future__ import annotations

import bisect
import dataclasses
from typing import Any

from gateskip.config import Budget
from gateskip.errors import BudgetError, CheckpointError

__all__ = ["ThresholdTable"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ThresholdTable:
    """Thresholds τ per grid point and gated branch; grid points descend from keep = 1.

    Attributes:
        allocation: ``"global"`` or ``"uniform"``.
        weigh_cost: whether scores were weighed against cost (global only).
        keep: realised share of token×branch pairs kept at each grid point, descending.
        compute: realised share of dense decoder MACs spent, net, at each grid point.
        thresholds: ``[grid][branch]``, rising along the grid (I7), in branch order.
        tokens: tokens of the calibration text.
        mean_keys: mean number of visible keys per token of the calibration text.
    """

    allocation: str
    weigh_cost: bool
    keep: tuple[float, ...]
    compute: tuple[float, ...]
    thresholds: tuple[tuple[float, ...], ...]
    tokens: int
    mean_keys: float

    def floor(self, name: str) -> float:
        """The smallest ``keep`` or ``compute`` that the table reaches."""
        return min(getattr(self, name))

    def resolve(self, budget: Budget) -> tuple[float, ...] | None:
        """Thresholds per branch at ``budget``, or None where nothing is skipped.

        Raises:
            BudgetError: the budget lies below the table's floor.
        """
        if budget.full:
            return None
        name = "keep" if budget.keep is not None else "compute"
        asked = budget.keep if budget.keep is not None else budget.compute
        assert asked is not None
        values = getattr(self, name)
        if asked < values[-1] - 1e-9:
            raise BudgetError(
                f"{name}={asked:g} is below the floor {values[-1]:.3f} of this calibration; ask "
                "for at least that, or calibrate again with a longer grid."
            )
        # Values descend along the grid; a gate that costs more than it saves can start above 1.
        position = bisect.bisect_left([-v for v in values], -asked)
        if position == 0:
            return self.thresholds[0]
        high, low = values[position - 1], values[min(position, len(values) - 1)]
        share = 0.0 if high == low else (high - asked) / (high - low)
        return tuple(
            a if a == b else a + share * (b - a)  # equal infinities have no difference
            for a, b in zip(self.thresholds[position - 1], self.thresholds[position], strict=True)
        )

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
            )
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"thresholds are damaged ({error}); calibrate again.") from error
