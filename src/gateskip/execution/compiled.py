"""The masked form under ``torch.compile``: one graph for every budget.

A compiled graph cannot look up which budget holds in this thread; it would keep the one that it
met. So thresholds are looked up outside and given to it as a tensor.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from gateskip.config import RowBudgets
from gateskip.errors import UnsupportedError
from gateskip.execution.hooks import THRESHOLDS
from gateskip.skipping.state import current, effective_budget, state_of

__all__ = ["compile_masked"]


def compile_masked(model: nn.Module, **options: Any) -> Any:
    """``torch.compile`` of a gated model's forward in masked execution, without graph breaks.

    For training, evaluation and scoring where a compiler saves more than skipping does: everything
    is computed, skipped outputs are dropped. Budgets change without compiling again.

    Args:
        model: a gated model. options: for ``torch.compile``; ``fullgraph`` is True.

    Returns:
        A function with arguments and result of ``model.forward``, for calls without a cache.

    Raises:
        UnsupportedError: in a call, for budgets by row, a cache, or a trace.
    """
    state = state_of(model)
    if state.config.kv_source != "project":
        raise UnsupportedError(
            f"kv_source={state.config.kv_source!r} writes other keys for whichever tokens are "
            "skipped, which one graph cannot; compile_masked needs kv_source='project'."
        )
    inner = torch.compile(model.forward, fullgraph=True, **options)

    @functools.wraps(model.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        over = current(state)
        changed = (over.recorder, over.observer, over.objective, over.forced, over.thresholds)
        if any(changed) or over.controller:
            raise UnsupportedError(
                "a compiled forward cannot be traced, observed, held to a budget or trained with "
                "an objective; call the model itself there."
            )
        budget = effective_budget(state)
        if isinstance(budget, RowBudgets):
            raise UnsupportedError("a compiled forward takes one budget, not one by row.")
        found = state.resolve(budget)
        values = [float("-inf") if found is None else float(found[key]) for key in state.branches]
        device = next(model.parameters()).device
        table = torch.tensor(values, dtype=torch.float32, device=device)
        return inner(*args, **{"use_cache": False, THRESHOLDS: table} | kwargs)

    return forward
