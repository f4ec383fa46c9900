"""The closed loop: what an early branch skips changes what later ones see, so thresholds are found
with skipping on.

Shapes: B rows, T tokens; scores are pooled per branch over valid, unprotected tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gateskip.config import BranchKey
from gateskip.costs import saved_macs
from gateskip.data import Batch
from gateskip.errors import DataError
from gateskip.fitting.passes import flat_valid, run_pass
from gateskip.fitting.quantiles import Quantiles, pooled
from gateskip.skipping.call import Call
from gateskip.skipping.ledger import CallRecord, macs_of
from gateskip.skipping.state import GateSkipState, state_of

__all__ = ["Allocation", "Collector", "Measured", "closed_loop", "measure"]

#: Exponent of the saved MACs in "harm per cost", e^{2s} / MACs^w. If harm were the squared change
#: of the stream, w = 1 would be right; measured, large changes hurt more (docs/log.md).
COST_WEIGHT = 0.5


class Collector:
    """An override's ``scores`` and ``recorder`` in one: scores, and what was kept and spent; sums
    only."""

    def __init__(self) -> None:
        self.scores: dict[BranchKey, Quantiles] = {}
        self.kept: Counter[BranchKey] = Counter()
        self.valid = self.protected = 0
        self.dense = self.spent = 0.0
        self.products = torch.zeros(3, dtype=torch.float64)

    def add(self, key: BranchKey, score_BT: Tensor, call: Call) -> None:
        found = score_BT.flatten()[flat_valid(call)].double().cpu()
        if not bool(torch.isfinite(found).all()):
            raise DataError(
                f"scores of branch {key} are not finite on this text; the gates or the model are "
                "damaged (a training that diverged, float16 overflow). Fit them again."
            )
        self.scores.setdefault(key, Quantiles()).add(found.numpy())

    def record(self, call: Call) -> None:
        record = CallRecord.of(call).without_padding()
        dense, spent = macs_of(record)
        self.dense += float(dense.sum())
        self.spent += float(spent.sum())
        self.valid += int(record.valid_BT.sum())
        if call.protected_BT is not None:
            self.protected += int((call.protected_BT & record.valid_BT).sum())
        rows = torch.zeros(record.valid_BT.shape[0], dtype=torch.float64)
        for key, mask in record.keep.items():
            kept = mask.sum(1).cpu()
            rows += kept
            self.kept[key] += int(kept.sum())
        tokens = record.valid_BT.sum(1).double().cpu()
        self.products += torch.stack([rows @ rows, rows @ tokens, tokens @ tokens])

    def measured(self, state: GateSkipState) -> Measured:
        """What was seen so far."""
        return Measured(
            scores=self.scores,
            shares={key: self.kept[key] / self.valid for key in state.branches},
            compute=self.spent / self.dense,
            valid=self.valid,
            protected=self.protected,
            keep_error=self._keep_error(),
        )

    def _keep_error(self) -> float:
        """Standard error of the kept share, texts drawn as wholes (ratio estimator)."""
        pairs = max(self.valid * len(self.kept), 1)
        ratio = sum(self.kept.values()) / max(self.valid, 1)
        squares = self.products @ torch.tensor([1.0, -2.0 * ratio, ratio**2], dtype=torch.float64)
        return math.sqrt(max(float(squares), 0.0)) / pairs


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """One pass under thresholds.

    Attributes:
        scores: scores of unprotected tokens per branch.
        shares: share of valid tokens that each gated branch kept, protected ones included.
        keep: share of all token×branch pairs kept. compute: share of dense MACs spent, net.
        valid, protected: tokens. pairs: valid token×branch pairs.
        keep_error: standard error of ``keep`` over texts.
    """

    scores: dict[BranchKey, Quantiles]
    shares: dict[BranchKey, float]
    compute: float
    valid: int
    protected: int
    keep_error: float = 0.0

    @property
    def pairs(self) -> int:
        return self.valid * len(self.shares)

    @property
    def keep(self) -> float:
        return sum(self.shares.values()) / max(len(self.shares), 1)

    def shares_at(self, thresholds: dict[BranchKey, float]) -> dict[BranchKey, float]:
        """Share of valid tokens that each branch would keep under other thresholds, if scores
        stayed as they are."""
        found: dict[BranchKey, float] = {}
        for key in self.shares:
            decides = key if key in self.scores else (key[0], "attention")
            scores = self.scores.get(decides)
            if scores is None:  # never skipped
                found[key] = self.shares[key]
                continue
            skipped = scores.weighted().below(thresholds[decides])
            found[key] = 1.0 - skipped / self.valid
        return found

    @property
    def rank_error(self) -> float:
        """Bound of the error of any branch's quantiles, as a share; 0 on short text."""
        return max((s.rank_error for s in self.scores.values()), default=0.0)


@dataclasses.dataclass(frozen=True, slots=True)
class Allocation:
    """How a budget is split over branches.

    Attributes:
        name: ``"global"``: one threshold θ on 2·s − w·log(MACs a skip saves), or on s where cost
            is not weighed; ``"uniform"``: every branch keeps the same share.
        offsets: w/2·log(MACs saved) per branch, or zeros.
        pairs: token×branch pairs that one score decides: 2 where it is a layer's.
        found: offsets that were searched at shares of pairs kept, descending; in between they are
            interpolated, outside the nearest hold.
    """

    name: str
    offsets: dict[BranchKey, float]
    pairs: int = 1
    found: tuple[tuple[float, dict[BranchKey, float]], ...] = ()

    @classmethod
    def of(cls, state: GateSkipState, name: str, weigh_cost: bool, keys: float) -> Allocation:
        """Offsets from the model's costs at ``keys`` visible keys."""
        costs = state.costs()
        whole = state.config.decision == "layer"
        if not weigh_cost or name == "uniform":
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
            decided = self.pairs * sum(s.count for s in measured.scores.values())
            share = measured.pairs / max(decided, 1)
            return {
                branch: s.weighted().lowest((1.0 - keep) * s.count * share)
                for branch, s in measured.scores.items()
            }
        offsets = self.offsets_at(keep)
        everyone = pooled([(s, -offsets[b]) for b, s in measured.scores.items()])
        theta = everyone.lowest((1.0 - keep) * measured.pairs / self.pairs)
        return {branch: theta + offsets[branch] for branch in measured.scores}

    def offsets_at(self, keep: float) -> dict[BranchKey, float]:
        """Offsets per branch where ``keep`` of the pairs are kept."""
        if not self.found:
            return self.offsets
        for (above, high), (below, low) in itertools.pairwise(self.found):
            if above >= keep >= below:
                w = (above - keep) / (above - below)
                return {key: (1.0 - w) * value + w * low[key] for key, value in high.items()}
        return self.found[0][1] if keep > self.found[0][0] else self.found[-1][1]


def measure(
    model: nn.Module, batches: Sequence[Batch], thresholds: dict[BranchKey, float]
) -> Measured:
    """One compacted pass under thresholds."""
    collector: Any = Collector()
    run_pass(model, batches, thresholds=thresholds, scores=collector, recorder=collector,
             execution="compacted")  # fmt: skip
    return collector.measured(state_of(model))


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
