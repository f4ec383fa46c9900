"""Thresholds found again, by the rules of those before: what the model computes has moved."""

from __future__ import annotations

from typing import Any

from torch import nn

from gateskip.calibration.thresholds import calibrate
from gateskip.skipping.policy import ThresholdTable
from gateskip.skipping.state import state_of

__all__ = ["recalibrate"]

#: Floors that differ by less are the same one, realised a little differently.
CLOSE = 0.02


def recalibrate(
    model: nn.Module, data: Any, tokenizer: Any = None, *, grid: tuple[float, ...], **options: Any
) -> ThresholdTable:
    """Calibrate with the allocation of the thresholds before, at least as far down as they reach.

    A searched one keeps how branches differ; searching again takes minutes, and is up to the user.

    Args:
        grid: shares of pairs kept, descending. options: of :func:`gateskip.calibrate`.
    """
    policy = state_of(model).policy
    if policy is not None:
        options |= {"allocation": policy.allocation, "weigh_cost": policy.weigh_cost}
        if policy.allocation == "searched":
            options["searched_before"] = policy
        floor = policy.floor("keep")
        if floor < grid[-1] - CLOSE:
            grid += (floor,)
    return calibrate(model, data, tokenizer, grid=grid, **options)
