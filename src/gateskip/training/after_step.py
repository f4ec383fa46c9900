"""What happens around every optimiser step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback

from gateskip.errors import TrainingError
from gateskip.skipping.state import state_of
from gateskip.training.recalibration import recalibrate

__all__ = ["AfterStep"]

#: Short: training needs thresholds near the truth, the final calibration finds them exactly.
CALIBRATION_GRID = (0.92, 0.84, 0.75, 0.65, 0.55, 0.45, 0.35)
CALIBRATION_TOKENS = 4_000


class AfterStep(TrainerCallback):  # type: ignore[misc]
    """Stops at gradients that are no number, and finds thresholds again while training."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trained = [p for p in self.trainer._gated.parameters() if p.requires_grad]
        for parameter in trained:  # the same step, whether or not a batch had a part for it
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = get_total_norm([p.grad for p in trained if p.grad is not None])
        if not math.isfinite(float(norm)):
            raise TrainingError(self.trainer._not_finite("the gradient's norm", float(norm)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        config = self.trainer.gateskip_args
        self.trainer._after_step()
        gated, every = state_of(self.trainer._gated), config.calibrate_every
        gated.fitted = gated.fitted or config.train_gates
        if every and state.global_step % every == 0 and state.global_step < state.max_steps:
            recalibrate(
                self.trainer._gated, self.trainer.calibration_data, grid=CALIBRATION_GRID,
                max_tokens=CALIBRATION_TOKENS,
            )  # fmt: skip
