"""``measure_latency``: how long this machine takes at the budgets of a calibration.

Arms alternate and every figure is a median, as in the benchmark; the dense model runs beside them.
"""

from __future__ import annotations

import statistics
from typing import Any

from rich.progress import Progress
from torch import Tensor, nn

from gateskip.config import Budget
from gateskip.data import text_windows
from gateskip.errors import BudgetError, ConfigError
from gateskip.execution.api import dense
from gateskip.execution.timing import clock, decode, keep_freed_memory, prefill
from gateskip.fitting.passes import eval_mode
from gateskip.retrofit.devices import device_of
from gateskip.skipping.latency import LatencyRecord, this_machine
from gateskip.skipping.state import override, state_of

__all__ = ["measure_latency"]

POINTS = 6


def measure_latency(
    model: nn.Module,
    data: Any,
    tokenizer: Any = None,
    *,
    prompt: int = 512,
    new: int = 32,
    batch: int = 1,
    repeats: int = 5,
    progress: bool = False,
) -> LatencyRecord:
    """Time prefill and decoding at budgets of the calibration, so that ``latency=`` can be asked.

    Leave the machine alone meanwhile. The record is kept in the model and saved with it; another
    machine, or another number of threads, needs its own.

    Args:
        model: a calibrated gated model, where it is to serve and in its dtype.
        data: real text (see ``gateskip.data``), at least ``batch * (prompt + new)`` tokens; random
            ids would be skipped unlike text.
        prompt, new, batch: tokens of a prompt, tokens decoded, rows.
        repeats: measurements of each, of which the median counts.

    Returns:
        The record, which replaces one of the same machine.

    Raises:
        BudgetError: not calibrated. ConfigError: a number below 1. DataError: too little text.
    """
    state = state_of(model)
    for name, value in {"prompt": prompt, "new": new, "batch": batch, "repeats": repeats}.items():
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1.")
    if state.policy is None:
        raise BudgetError("latency needs thresholds: call gateskip.calibrate(model, data) first.")
    ids = text_windows(data, tokenizer, (batch, prompt + new), repeats).to(device_of(model))
    if not ids.is_cuda:
        keep_freed_memory()
    grid = state.policy.keep
    picked = sorted({round(i * (len(grid) - 1) / (POINTS - 1)) for i in range(POINTS)})
    budgets = [Budget(keep=1.0), *(Budget(keep=grid[i]) for i in picked if i)]
    dense_times: list[tuple[float, float]] = []
    times: list[list[tuple[float, float]]] = [[] for _ in budgets]
    warm = ids.shape[0]
    total = (warm + repeats) * (len(budgets) + 1)
    with eval_mode(model), Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("Timing", total=total)
        for number in range(-warm, repeats):  # the first time on each window warms up
            window = ids[number % ids.shape[0]]
            with dense(model):
                found = _phases(model, window, prompt)
            if number >= 0:
                dense_times.append(found)
            bar.advance(task)
            for budget, kept in zip(budgets, times, strict=True):
                with override(state, budget=budget):
                    found = _phases(model, window, prompt)
                if number >= 0:
                    kept.append(found)
                bar.advance(task)
    per_token = batch * prompt, batch * new
    dense_seconds = _medians(dense_times, per_token)
    seconds = [_medians(kept, per_token) for kept in times]
    record = LatencyRecord(
        machine=this_machine(),
        weight_bytes=state.shape.weight_bytes,
        prompt=prompt,
        new=new,
        batch=batch,
        keep=tuple(budget.value for budget in budgets),
        prefill=tuple(a for a, _ in seconds),
        decode=tuple(b for _, b in seconds),
        dense_prefill=dense_seconds[0],
        dense_decode=dense_seconds[1],
    )
    mine = record.machine, record.weight_bytes
    others = tuple(old for old in state.latency if (old.machine, old.weight_bytes) != mine)
    state.latency = (*others, record)
    return record


def _phases(model: Any, ids: Tensor, prompt: int) -> tuple[float, float]:
    """Seconds of (prefill, all decoding steps)."""
    made: list[Any] = []
    first = clock(lambda: made.append(prefill(model, ids, prompt)), ids)
    cache = made.pop().cache
    return first, clock(lambda: decode(model, ids, prompt, cache), ids)


def _medians(times: list[tuple[float, float]], tokens: tuple[int, int]) -> tuple[float, float]:
    first, second = (statistics.median(column) for column in zip(*times, strict=True))
    return first / tokens[0], second / tokens[1]
