"""No gate: g = 1 for every token, for methods that leave alone what they keep."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from gateskip.config import GateConfig
from gateskip.errors import ConfigError
from gateskip.gates.base import Gate, constant

__all__ = ["UnitGate"]

LOGIT = 30.0  # σ(30) is 1 in float32


class UnitGate(Gate):
    """g = 1 without parameters; a token's score must come from elsewhere."""

    weight: Tensor

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.register_buffer("weight", constant(hidden, 0.0), persistent=False)

    @classmethod
    def build(cls, config: GateConfig, hidden: int, generator: torch.Generator) -> Self:
        return cls(hidden)

    def logits(self, u_NH: Tensor) -> Tensor:
        return torch.full_like(u_NH[..., :1], LOGIT)

    def mean_logit_weights(self) -> tuple[Tensor, Tensor]:
        return self.weight, torch.full_like(self.weight[0], LOGIT)

    def factors(self) -> tuple[Tensor | None, Tensor, Tensor]:
        return None, self.weight[None], torch.full_like(self.weight[:1], LOGIT)

    def channels_alike(self) -> bool:
        return True

    def set_direction(self, w_H: Tensor, shift: float) -> None:
        raise ConfigError("kind='unit' has nothing to fit; attach with another kind.")
