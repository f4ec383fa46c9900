"""The closed loop: what an early branch skips changes what later ones see, so thresholds are found
with skipping on.

Shapes: B rows, T tokens; scores are pooled per branch over valid, unprotected tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from gateskip.config import BranchKey
from gateskip.costs import saved_macs
from gateskip.data import Batch
from gateskip.fitting.passes import flat_valid, run_pass
from gateskip.skipping.call import Call
from gateskip.skipping.ledger import CallRecord, Ledger
from gateskip.skipping.state import GateSkipState, state_of

__all__ = ["Allocation", "Measured", "closed_loop", "measure"]

Floats = NDArray[np.float64]

#: Exponent of the saved MACs in "harm per cost", e^{2s} / MACs^w. If harm were the squared change
#: of the stream, w = 1 would be right; measured, large changes hurt more (docs/log.md).
COST_WEIGHT = 0.5


class _Scores:
    """Collects scores and, as the recorder, what was kept."""

    def __init__(self) -> None:
        self.scores: dict[BranchKey, list[Floats]] = {}
        self.records: list[CallRecord] = []

    def add(self, key: BranchKey, score_BT: Tensor, call: Call) -> None:
        wanted = score_BT.flatten()[flat_valid(call)]
        self.scores.setdefault(key, []).append(wanted.double().cpu().numpy())

    def record(self, call: Call) -> None:
        self.records.append(CallRecord.of(call).without_padding())


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """One pass under thresholds: pooled scores per branch, realised keep and compute."""

    scores: dict[BranchKey, Floats]
    keep: float
    compute: float
    pairs: int


@dataclasses.dataclass(frozen=True, slots=True)
class Allocation:
    """How a budget is split over branches.

    Attributes:
        name: ``"global"``: one threshold θ on 2·s − w·log(MACs a skip saves), or on s where cost
            is not weighed; ``"uniform"``: every branch keeps the same share.
        offsets: w/2·log(MACs saved) per branch, or zeros.
        pairs: token×branch pairs that one score decides: 2 where it is a layer's.
    """

    name: str
    offsets: dict[BranchKey, float]
    pairs: int = 1

    @classmethod
    def of(cls, state: GateSkipState, name: str, weigh_cost: bool, keys: float) -> Allocation:
        """Offsets from the model's costs at ``keys`` visible keys."""
        costs = state.costs()
        whole = state.config.decision == "layer"
        if not (weigh_cost and name == "global"):
            return cls(name, dict.fromkeys(state.branches, 0.0), 2 if whole else 1)
        saved = {branch: saved_macs(costs[branch], keys) for branch in state.branches}
        if whole:
            saved = {(i, kind): saved[i, "attention"] + saved[i, "mlp"] for i, kind in saved}
        offsets = {b: COST_WEIGHT / 2 * math.log(max(macs, 1.0)) for b, macs in saved.items()}
        return cls(name, offsets, 2 if whole else 1)

    def thresholds(self, measured: Measured, keep: float) -> dict[BranchKey, float]:
        """Thresholds that would keep ``keep`` of the pairs at the measured scores.

        An order statistic, so ties never skip more than was asked.
        """
        if self.name == "uniform":
            decided = self.pairs * sum(len(s) for s in measured.scores.values())
            share = measured.pairs / max(decided, 1)
            return {
                branch: order_statistic(s, (1.0 - keep) * len(s) * share)
                for branch, s in measured.scores.items()
            }
        pooled = np.concatenate([s - self.offsets[b] for b, s in measured.scores.items()])
        theta = order_statistic(pooled, (1.0 - keep) * measured.pairs / self.pairs)
        return {branch: theta + self.offsets[branch] for branch in measured.scores}


def order_statistic(scores: Floats, skipped: float) -> float:
    """The score below which at most ``skipped`` scores lie."""
    index = min(max(math.floor(skipped + 1e-9), 0), len(scores) - 1)
    return float(np.partition(scores, index)[index])


def measure(
    model: nn.Module, batches: Sequence[Batch], thresholds: dict[BranchKey, float]
) -> Measured:
    """One compacted pass under thresholds."""
    collector: Any = _Scores()
    run_pass(model, batches, thresholds=thresholds, scores=collector, recorder=collector,
             execution="compacted")  # fmt: skip
    ledger = Ledger.of(collector.records)
    return Measured(
        scores={key: np.concatenate(parts) for key, parts in collector.scores.items()},
        keep=1.0 - ledger.skip_rate,
        compute=ledger.compute,
        pairs=ledger.pairs,
    )


def keep_all(state: GateSkipState) -> dict[BranchKey, float]:
    """Thresholds below every score: everything kept, and scores still computed."""
    return dict.fromkeys(state.branches, -math.inf)


def closed_loop(
    model: nn.Module,
    batches: Sequence[Batch],
    allocation: Allocation,
    keep: float,
    start: Measured,
    *,
    at_least: dict[BranchKey, float] | None = None,
    tolerance: float = 0.004,
    passes: int = 4,
) -> tuple[dict[BranchKey, float], Measured]:
    """Thresholds whose realised keep is within ``tolerance`` of ``keep``, and what they do.

    Args:
        start: a pass from whose scores to begin. at_least: lower bounds (monotone in the budget).
        passes: at most this many forward passes; the closest is returned.
    """
    state_of(model)
    best: tuple[dict[BranchKey, float], Measured] | None = None
    seen, aim = start, keep
    for _ in range(passes):
        thresholds = allocation.thresholds(seen, min(max(aim, 0.0), 1.0))
        if at_least is not None:
            thresholds = {k: max(v, at_least[k]) for k, v in thresholds.items()}
        seen = measure(model, batches, thresholds)
        if best is None or abs(seen.keep - keep) < abs(best[1].keep - keep):
            best = (thresholds, seen)
        if abs(seen.keep - keep) <= tolerance:
            break
    assert best is not None
    return best
