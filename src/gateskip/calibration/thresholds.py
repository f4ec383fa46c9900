"""``calibrate``: one table of thresholds over a grid of budgets."""

from __future__ import annotations

import math
import warnings
from typing import Any

from rich.progress import Progress
from torch import nn

from gateskip.config import ALLOCATIONS, BranchKey, one_of
from gateskip.data import Batch, count_tokens, encode, take_tokens, to_batches
from gateskip.errors import BudgetError, DataError
from gateskip.fitting.closed_loop import Allocation, closed_loop, keep_all, measure
from gateskip.skipping.policy import ThresholdTable
from gateskip.skipping.state import GateSkipState, state_of

__all__ = ["calibrate"]

GRID = (0.98, 0.95, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.4, 0.32, 0.25)
MINIMUM_TOKENS = 1_000


def calibrate(
    model: nn.Module,
    data: Any,
    tokenizer: Any = None,
    *,
    allocation: str = "global",
    weigh_cost: bool = True,
    max_tokens: int | None = 12_000,
    max_length: int = 512,
    grid: tuple[float, ...] = GRID,
    progress: bool = False,
) -> ThresholdTable:
    """Find thresholds for every budget at once, with skipping on, and store them in the model.

    Args:
        model: a gated model. data: texts, rows or id tensors (see ``gateskip.data``).
        allocation: ``"global"`` or ``"uniform"``. weigh_cost: weigh scores against saved MACs.
        max_tokens: tokens used; None uses all. max_length: tokens per text.
        grid: shares of token×branch pairs to calibrate at, descending.

    Returns:
        The table, also kept in the model and saved with it.

    Raises:
        DataError: fewer than 1,000 tokens. ConfigError: an unknown allocation.
    """
    state = state_of(model)
    one_of("allocation", allocation, ALLOCATIONS)
    batches, tokens, mean_keys = _text(data, tokenizer, max_tokens, max_length)
    if not state.fitted:
        warnings.warn(
            "the gates were never fitted or trained, so they rank tokens at random; call "
            "gateskip.fit(model, data) first.",
            stacklevel=2,
        )
    split = Allocation.of(state, allocation, weigh_cost, mean_keys)
    rows: list[tuple[float, float, tuple[float, ...]]] = []
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("Calibrating", total=len(grid) + 1)
        seen = measure(model, batches, keep_all(state))
        lowest = split.thresholds(seen, 1.0)
        full_row = tuple(lowest.get(b, -math.inf) for b in state.branches)
        rows.append((1.0, seen.compute, full_row))
        bar.advance(task)
        bound = lowest
        for keep in grid:
            bound, seen = closed_loop(model, batches, split, keep, seen, at_least=bound)
            if seen.keep < rows[-1][0] - 1e-6 and seen.compute < rows[-1][1] - 1e-9:
                row = tuple(bound.get(b, -math.inf) for b in state.branches)
                rows.append((seen.keep, seen.compute, row))
            bar.advance(task)
    table = ThresholdTable(
        allocation=allocation,
        weigh_cost=weigh_cost,
        keep=tuple(r[0] for r in rows),
        compute=tuple(r[1] for r in rows),
        thresholds=tuple(r[2] for r in rows),
        tokens=tokens,
        mean_keys=mean_keys,
    )
    state.policy = table
    _keep_budget(state)
    return table


def table_of(
    model: nn.Module, data: Any, thresholds: dict[BranchKey, float], tokenizer: Any = None,
    *, max_tokens: int | None = 12_000, max_length: int = 512,
) -> ThresholdTable:  # fmt: skip
    """A table of two points, full and these thresholds, with what they realise on ``data``.

    Raises:
        DataError: fewer than 1,000 tokens. BudgetError: the thresholds skip nobody.
    """
    state = state_of(model)
    batches, tokens, mean_keys = _text(data, tokenizer, max_tokens, max_length)
    every = measure(model, batches, keep_all(state))
    lowest = {key: float(scores.min()) for key, scores in every.scores.items()}
    seen = measure(model, batches, thresholds)
    if not (seen.keep < every.keep and seen.compute < every.compute):
        raise BudgetError("thresholds skip nobody on data; train longer, or calibrate.")
    rows = [
        tuple(min(lowest.get(b, -math.inf), thresholds[b]) for b in state.branches),
        tuple(thresholds[b] for b in state.branches),
    ]
    return ThresholdTable(
        allocation="global",
        weigh_cost=True,
        keep=(1.0, seen.keep),
        compute=(every.compute, seen.compute),
        thresholds=tuple(rows),
        tokens=tokens,
        mean_keys=mean_keys,
    )


def _text(
    data: Any, tokenizer: Any, max_tokens: int | None, max_length: int
) -> tuple[list[Batch], int, float]:
    """(batches, tokens, mean number of visible keys). Raises DataError where it is too short."""
    samples = take_tokens(encode(data, tokenizer, max_length), max_tokens)
    tokens = count_tokens(samples)
    check_tokens(tokens)
    lengths = [sample.ids.shape[0] for sample in samples]
    return to_batches(samples), tokens, sum(n * (n + 1) / 2 for n in lengths) / sum(lengths)


def check_tokens(tokens: int) -> None:
    """Raise DataError where calibration text is too short."""
    if tokens < MINIMUM_TOKENS:
        raise DataError(
            f"data has {tokens} tokens; calibration needs at least {MINIMUM_TOKENS}. "
            "Give more text."
        )


def _keep_budget(state: GateSkipState) -> None:
    """Drop a default budget that the new thresholds do not reach, and say so."""
    try:
        state.resolve(state.default_budget)
    except BudgetError:
        warnings.warn(
            f"the default budget {state.default_budget} is below the floor of the new thresholds "
            "and was taken back; set another, or calibrate with a longer grid.",
            stacklevel=3,
        )
        state.default_budget = None
