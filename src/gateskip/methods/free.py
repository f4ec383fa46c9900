"""FREE (arXiv 2310.05424): one shallow exit instead of one after every layer.

A shallow model of the first layers and the whole one share their weights. Both learn to predict,
and the shallow one's states to be like the deep one's (its section 4.1, layers mapped evenly). Who
is sure after the shallow layers leaves.

Ours versus the paper: who has left gives deeper layers keys and values from the state it left with,
as in CALM. The paper computes them exactly, together with the next token that stays: the same MACs
as without exits but for a sequence's end, so what it saves is time. That is a decoder,
``gateskip.generate_synchronised``. Thresholds are calibrated, not estimated from a mixture of Betas
while decoding.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import nn

from gateskip.calibration.thresholds import calibrate
from gateskip.errors import ConfigError
from gateskip.methods.base import Method, bare
from gateskip.methods.exits import GRID, ExitRule
from gateskip.skipping.rule import set_rule
from gateskip.skipping.state import state_of
from gateskip.training.config import GateSkipTrainingConfig

__all__ = ["Free"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Free(Method):
    """Exits after one layer, by the gap between the two most likely tokens.

    Attributes:
        layers: of the shallow model; None: a third of all.
        distill: weight of the distance between shallow and deep states.
    """

    paper: ClassVar[str] = "arXiv 2310.05424"
    layers: int | None = None
    distill: float = 0.5

    def shallow(self, model: nn.Module) -> int:
        """Layers of the shallow model. Raises ConfigError."""
        count = state_of(model).shape.layers
        found = max(1, count // 3) if self.layers is None else self.layers
        if not 1 <= found < count:
            raise ConfigError(f"layers={found!r} must be a number from 1 to {count - 1}.")
        return found

    def training(self, model: nn.Module, compute: float) -> GateSkipTrainingConfig:
        return GateSkipTrainingConfig(
            budget_end=1.0, schedule="constant", train_compensation=False, exit_loss="shallow",
            exit_layers=self.shallow(model), exit_distill=self.distill,
        )  # fmt: skip

    def apply(self, model: nn.Module, data: Any, tokenizer: Any = None) -> nn.Module:
        state = bare(model, decision="layer")
        at = self.shallow(model)
        rule = ExitRule("softmax", decay=0.0, first=at, last=at)
        rule.bind(model)
        set_rule(state, rule)
        calibrate(model, data, tokenizer, weigh_cost=False, grid=GRID)
        return model
