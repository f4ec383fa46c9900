"""Budget, λ and temperature of every training step: functions of the step alone, so that resuming
needs no state."""

from __future__ import annotations

import math
import random

from gateskip.config import Budget
from gateskip.training.config import GateSkipTrainingConfig

__all__ = ["budget_at", "penalty_at", "temperature_at"]


def budget_at(
    config: GateSkipTrainingConfig, step: int, steps: int, seed: int, kind: str | None = None
) -> Budget:
    """The budget of optimiser step ``step`` (from 0) of ``steps``.

    The paper's schedule (arXiv 2510.13876, section 3): linear from start to end, then constant.

    Args:
        kind: of these branches, where they have a budget of their own.
    """
    own = {"attention": config.budget_attention, "mlp": config.budget_mlp}.get(kind or "")
    end = config.budget_end if own is None else own
    start = max(config.budget_start, end)
    fall = max(1.0, steps * config.budget_steps)
    done = min(1.0, step / fall)
    if config.schedule == "constant":
        done = 1.0
    if config.schedule == "cosine":
        done = (1.0 - math.cos(math.pi * done)) / 2.0
    value = start + done * (end - start)
    if config.schedule == "sampled":
        # Stratified over pairs of steps: u and 1 − u, so that short runs see both halves.
        u = random.Random(f"{seed}-{step // 2}").random()
        u = 1.0 - u if step % 2 else u
        value += u * (1.0 - value)
    value = min(1.0, max(value, 1e-9))  # rounding
    return Budget.by(config.budget_unit, value)


def penalty_at(config: GateSkipTrainingConfig, step: int, steps: int) -> float:
    """λ of a step: constant, or linear from ``penalty`` to ``penalty_end`` over all steps."""
    return _line(config.penalty, config.penalty_end, step, steps)


def temperature_at(config: GateSkipTrainingConfig, step: int, steps: int) -> float:
    """T of a step's straight-through gradients: constant, or linear from its start over all
    steps."""
    start = config.decision_gradient_start
    if start is None:
        return config.decision_gradient
    return _line(start, config.decision_gradient, step, steps)


def _line(start: float, end: float | None, step: int, steps: int) -> float:
    if end is None:
        return start
    done = min(1.0, step / max(1, steps - 1))
    return start + done * (end - start)
