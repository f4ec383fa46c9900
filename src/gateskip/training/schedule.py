"""The budget of every training step. A function of the step alone, so resuming needs no state."""

from __future__ import annotations

import random

from gateskip.config import Budget
from gateskip.training.config import GateSkipTrainingConfig

__all__ = ["budget_at"]


def budget_at(config: GateSkipTrainingConfig, step: int, steps: int, seed: int) -> Budget:
    """The budget of optimiser step ``step`` (from 0) of ``steps``.

    The paper's schedule (arXiv 2510.13876, section 3): linear from start to end, then constant.
    """
    fall = max(1.0, steps * config.budget_steps)
    done = min(1.0, step / fall)
    value = config.budget_start + done * (config.budget_end - config.budget_start)
    if config.schedule == "sampled":
        # Stratified over pairs of steps: u and 1 − u, so that short runs see both halves.
        u = random.Random(f"{seed}-{step // 2}").random()
        u = 1.0 - u if step % 2 else u
        value += u * (1.0 - value)
    return Budget(keep=value) if config.budget_unit == "keep" else Budget(compute=value)
