"""``check_calibration``: whether a calibration keeps its promise on text that it has not seen.

Shapes: T valid tokens, N branches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.progress import Progress
from torch import nn

from gateskip.calibration.thresholds import check_tokens
from gateskip.config import BranchKey, Budget
from gateskip.data import count_tokens, encode, take_tokens, to_batches
from gateskip.errors import BudgetError
from gateskip.fitting.closed_loop import Measured, measure
from gateskip.skipping.state import state_of

__all__ = ["CheckRow", "check_calibration", "default_budgets"]

#: What a calibration promises: within one point of what was asked.
PROMISE = 0.01


@dataclasses.dataclass(frozen=True, slots=True)
class CheckRow:
    """One budget on one kind of text.

    Attributes:
        data: the text's name. tokens: valid tokens.
        budget: what was asked, as text. expected: share of pairs that the table says it keeps.
        keep: share of pairs kept. compute: share of dense MACs spent, net.
        allowed: the promise, or two standard errors of ``keep`` where that is more.
        branch_mean, branch_95, branch_worst: distances of branches from the share that the table
            says they keep: their mean, the 95th percentile, the largest.
        worst: that branch, ``"layer.kind"``.
    """

    data: str
    tokens: int
    budget: str
    expected: float
    keep: float
    compute: float
    allowed: float
    branch_mean: float
    branch_95: float
    branch_worst: float
    worst: str

    @property
    def kept(self) -> bool:
        """Whether the promise was kept."""
        return abs(self.keep - self.expected) <= self.allowed


def default_budgets(floor: float) -> list[Budget]:
    """Shares of pairs from 0.95 down to the floor of a calibration."""
    asked = [Budget(keep=k) for k in (0.95, 0.85, 0.75, 0.6, 0.5) if k >= floor]
    return asked or [Budget(keep=min(floor + 1e-6, 1.0))]


def check_calibration(
    model: nn.Module,
    texts: Mapping[str, Any],
    tokenizer: Any = None,
    *,
    budgets: Sequence[Budget] | None = None,
    max_tokens: int | None = 20_000,
    max_length: int = 512,
    progress: bool = False,
) -> list[CheckRow]:
    """Run the calibrated model on other text and compare what it keeps with what was promised.

    Args:
        model: a calibrated gated model. texts: kinds of text by name, each as ``calibrate`` takes.
        budgets: budgets to check; None takes five. max_tokens: of every kind; None uses all.

    Raises:
        BudgetError: not calibrated, or a budget below the floor. DataError: a kind of fewer than
            1,000 tokens.
    """
    state = state_of(model)
    if state.policy is None:
        raise BudgetError("check needs thresholds: call gateskip.calibrate(model, data) first.")
    chosen = list(budgets or default_budgets(state.policy.floor("keep")))
    expected = {budget: state.expected(budget) for budget in chosen}
    batches = {}
    for name, data in texts.items():
        samples = take_tokens(encode(data, tokenizer, max_length), max_tokens)
        check_tokens(count_tokens(samples))
        batches[name] = (to_batches(samples), len(samples))
    rows = []
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("Checking", total=len(batches) * len(chosen))
        for name, (parts, texts_count) in batches.items():
            for budget in chosen:
                thresholds = state.resolve(budget) or dict.fromkeys(state.branches, -math.inf)
                seen = measure(model, parts, dict(thresholds))
                rows.append(_row(name, budget, expected[budget], seen, texts_count))
                bar.advance(task)
    return rows


def _row(
    name: str, budget: Budget, expected: dict[BranchKey, float], seen: Measured, texts: int
) -> CheckRow:
    distance = {key: abs(seen.shares[key] - share) for key, share in expected.items()}
    ordered = sorted(distance.values())
    layer, kind = max(distance, key=lambda key: distance[key])
    promised = sum(expected.values()) / len(expected)
    return CheckRow(
        data=name,
        tokens=seen.valid,
        budget=str(budget),
        expected=promised,
        keep=seen.keep,
        compute=seen.compute,
        allowed=max(PROMISE, 2.0 * seen.keep_error),
        branch_mean=sum(ordered) / len(ordered),
        branch_95=ordered[math.ceil(0.95 * len(ordered)) - 1],
        branch_worst=ordered[-1],
        worst=f"{layer}.{kind}",
    )
