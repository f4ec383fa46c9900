"""``calibrate``: one table of thresholds over a grid of budgets."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any

from rich.progress import Progress
from torch import nn

from gateskip.calibration.search import SEARCHES, passes_of
from gateskip.calibration.search import search as searched
from gateskip.config import ALLOCATIONS, BranchKey, one_of
from gateskip.costs import net_share
from gateskip.data import Batch, Sample, count_tokens, encode, take_tokens, to_batches
from gateskip.errors import BudgetError, ConfigError, DataError
from gateskip.fitting.closed_loop import Allocation, Measured, closed_loop, keep_all, measure
from gateskip.skipping.policy import OFF, ThresholdTable
from gateskip.skipping.state import GateSkipState, state_of

__all__ = ["calibrate"]

GRID = (0.95, 0.9, 0.84, 0.77, 0.7, 0.6, 0.5, 0.4, 0.32, 0.25)
MINIMUM_TOKENS = 1_000
SEARCH_TOKENS = 3_072
#: Skipped tokens of a branch that tell two neighbouring grid points apart.
TOKENS_PER_STEP = 10
#: Share of tokens, beside the protected ones, below which a searched split switches a branch off.
IDLE = 0.005
#: Rows of the table from one measured grid point to the next.
ROWS_PER_STEP = 4


def calibrate(
    model: nn.Module,
    data: Any,
    tokenizer: Any = None,
    *,
    allocation: str = "global",
    weigh_cost: bool = True,
    search: str = "lagrangian",
    max_tokens: int | None = 12_000,
    max_length: int = 512,
    grid: tuple[float, ...] = GRID,
    searched_before: ThresholdTable | None = None,
    progress: bool = False,
) -> ThresholdTable:
    """Find thresholds for every budget at once, with skipping on, and store them in the model.

    One pass over the text for every grid point, each with the thresholds that the scores of the
    one before suggest; the table says what was realised. Between two grid points lie rows from the
    scores of both. Memory does not grow with the text: quantiles are exact up to 16,384 tokens,
    from there on within ``rank_error`` of the table.

    Args:
        model: a gated model. data: texts, rows or id tensors (see ``gateskip.data``).
        allocation: ``"global"``: one threshold for all branches on scores weighed against cost;
            ``"uniform"``: every branch keeps the same share; ``"searched"``: thresholds of branches
            differ by what a search on the first 3,000 tokens finds (minutes).
        weigh_cost: weigh scores against saved MACs. search: ``"lagrangian"`` or ``"greedy"``.
        max_tokens: tokens used; None uses all. max_length: tokens per text.
        grid: shares of token×branch pairs to calibrate at, descending.
        searched_before: for ``"searched"``, how the branches of this table differ is kept, instead
            of a search.

    Returns:
        The table, also kept in the model and saved with it.

    Raises:
        DataError: fewer than 1,000 tokens, or too few for the grid's steps; scores that are not
            finite. ConfigError: an unknown allocation, a grid that does not descend.
    """
    state = state_of(model)
    one_of("allocation", allocation, ALLOCATIONS)
    one_of("search", search, SEARCHES)
    nested = bool(getattr(state.rule, "nested", False))
    if nested and (allocation != "global" or weigh_cost):
        raise ConfigError(
            f"allocation={allocation!r}, weigh_cost={weigh_cost!r}: exits have one threshold for "
            "all layers; pass allocation='global', weigh_cost=False."
        )
    step = _smallest_step(grid)
    samples, mean_keys = _text(data, tokenizer, max_tokens, max_length, step)
    batches, tokens = to_batches(samples), count_tokens(samples)
    if not state.fitted:
        warnings.warn(
            "the gates were never fitted or trained, so they rank tokens at random; call "
            "gateskip.fit(model, data) first.",
            stacklevel=2,
        )
    split = Allocation.of(state, allocation, weigh_cost, mean_keys)
    with Progress(disable=not progress, transient=True) as bar:
        if allocation == "searched" and searched_before is not None:
            split = _split_of(state, split, searched_before)
        elif allocation == "searched":
            first = to_batches(take_tokens(samples, SEARCH_TOKENS))
            task = bar.add_task("Searching", total=passes_of(search, len(state.branches)))
            split = searched(
                model, first, split, method=search, advance=functools.partial(bar.advance, task)
            )
        task = bar.add_task("Calibrating", total=len(grid) + 1)
        points = []
        for point in _measured(model, batches, split, grid):
            points.append(point)
            bar.advance(task)
    rows = list(_rows(state, split, points, mean_keys))
    table = ThresholdTable(
        allocation=allocation,
        weigh_cost=weigh_cost,
        keep=tuple(r.keep for r in rows),
        compute=tuple(r.compute for r in rows),
        thresholds=tuple(_in_order(state, r.thresholds, -math.inf) for r in rows),
        tokens=tokens,
        mean_keys=mean_keys,
        shares=tuple(_in_order(state, r.shares, 1.0) for r in rows),
        protected=points[0][1].protected / points[0][1].valid,
        rank_error=max(seen.rank_error for _, seen in points),
    )
    state.policy, state.latency = table, ()
    _keep_budget(state)
    return table


Thresholds = dict[BranchKey, float]
Point = tuple[Thresholds, Measured]


@dataclasses.dataclass(frozen=True, slots=True)
class _Row:
    keep: float
    compute: float
    thresholds: Thresholds
    shares: dict[BranchKey, float]


def _split_of(state: GateSkipState, split: Allocation, table: ThresholdTable) -> Allocation:
    """An allocation whose branches differ as those of a table."""
    rows = [dict(zip(state.branches, row, strict=True)) for row in table.thresholds]
    found = tuple(zip(table.keep, rows, strict=True))[1:]  # the first keeps everything
    return dataclasses.replace(split, name="searched", found=found)


def _measured(
    model: nn.Module, batches: list[Batch], split: Allocation, grid: tuple[float, ...]
) -> Iterator[Point]:
    """(thresholds, what they do) with everything kept, then at the grid points."""
    seen = measure(model, batches, keep_all(state_of(model)))
    bound = split.thresholds(seen, 1.0)
    yield bound, seen
    for keep in grid:
        # The last one is the floor that the user gets, so it is met; others need only be known.
        passes = 4 if keep == grid[-1] else 1
        bound, seen = closed_loop(model, batches, split, keep, seen, at_least=bound, passes=passes)
        yield bound, seen
        if split.name == "searched":
            # What (nearly) nobody uses is off from the next point on, for protected tokens, too.
            least = seen.protected / seen.valid + IDLE
            idle = [key for key in bound if seen.shares[key] <= least]
            bound = bound | dict.fromkeys(idle, OFF)


def _rows(
    state: GateSkipState, split: Allocation, points: list[Point], mean_keys: float
) -> Iterator[_Row]:
    """The measured grid points, and between them rows from the scores of both neighbours."""
    costs = state.costs()
    # Of who has left there are no scores at the smaller budget.
    nested = bool(getattr(state.rule, "nested", False))

    def row(thresholds: Thresholds, shares: dict[BranchKey, float], factor: float) -> _Row:
        keep = sum(shares.values()) / len(shares)
        return _Row(keep, factor * net_share(costs, shares, mean_keys), thresholds, shares)

    def factor(seen: Measured) -> float:
        return seen.compute / net_share(costs, seen.shares, mean_keys)

    last, seen = points[0]
    yield row(last, seen.shares, factor(seen))
    lowest = seen.keep, seen.compute
    for thresholds, after in points[1:]:
        if not (after.keep < lowest[0] - 1e-6 and after.compute < lowest[1] - 1e-9):
            continue  # nothing more was skipped
        lowest = after.keep, after.compute
        for number in range(1, ROWS_PER_STEP):
            w = number / ROWS_PER_STEP
            keep = (1.0 - w) * seen.keep + w * after.keep
            before = split.thresholds(seen, keep)
            behind = before if nested else split.thresholds(after, keep)
            between = {
                key: min(max((1.0 - w) * before[key] + w * behind[key], last[key]), bound)
                for key, bound in thresholds.items()
            }
            a = seen.shares_at(between)
            b = a if nested else after.shares_at(between)
            shares = {key: (1.0 - w) * a[key] + w * b[key] for key in a}
            yield row(between, shares, (1.0 - w) * factor(seen) + w * factor(after))
            last = between
        last, seen = thresholds, after
        yield row(last, seen.shares, factor(seen))


def _in_order(
    state: GateSkipState, values: dict[BranchKey, float], missing: float
) -> tuple[float, ...]:
    return tuple(values.get(branch, missing) for branch in state.branches)


def _smallest_step(grid: tuple[float, ...]) -> float:
    """The smallest step of a grid, from 1 and to 0 included. Raises ConfigError."""
    points = (1.0, *grid, 0.0)
    steps = [a - b for a, b in itertools.pairwise(points)]
    if len(grid) < 1 or min(steps) <= 0.0:
        raise ConfigError(f"grid={grid!r} must descend within (0, 1), such as (0.9, 0.75, 0.5).")
    return min(steps)


def table_of(
    model: nn.Module, data: Any, thresholds: dict[BranchKey, float], tokenizer: Any = None,
    *, max_tokens: int | None = 12_000, max_length: int = 512,
) -> ThresholdTable:  # fmt: skip
    """A table of two points, full and these thresholds, with what they realise on ``data``.

    Raises:
        DataError: fewer than 1,000 tokens. BudgetError: the thresholds skip nobody.
    """
    state = state_of(model)
    samples, mean_keys = _text(data, tokenizer, max_tokens, max_length, 1.0)
    batches, tokens = to_batches(samples), count_tokens(samples)
    every = measure(model, batches, keep_all(state))
    lowest = {key: scores.weighted().lowest(0.0) for key, scores in every.scores.items()}
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
        shares=tuple(_in_order(state, m.shares, 1.0) for m in (every, seen)),
        protected=seen.protected / seen.valid,
        rank_error=max(every.rank_error, seen.rank_error),
    )


def _text(
    data: Any, tokenizer: Any, max_tokens: int | None, max_length: int, step: float
) -> tuple[list[Sample], float]:
    """(samples, mean number of visible keys). Raises DataError where they are too short."""
    samples = take_tokens(encode(data, tokenizer, max_length), max_tokens)
    check_tokens(count_tokens(samples), step)
    lengths = [sample.ids.shape[0] for sample in samples]
    return samples, sum(n * (n + 1) / 2 for n in lengths) / sum(lengths)


def check_tokens(tokens: int, step: float = 1.0) -> None:
    """Raise DataError where calibration text is too short, for steps of the grid too."""
    if tokens < MINIMUM_TOKENS:
        raise DataError(
            f"data has {tokens} tokens; calibration needs at least {MINIMUM_TOKENS}. "
            "Give more text."
        )
    needed = math.ceil(TOKENS_PER_STEP / step)
    if tokens < needed:
        raise DataError(
            f"data has {tokens} tokens, too few for a grid with steps of {step:.2g}, which needs "
            f"at least {needed}. Give more text, or a coarser grid."
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
