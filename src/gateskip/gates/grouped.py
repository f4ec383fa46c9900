"""The grouped gate (ours): one value per group of neighbouring channels, between scalar and vector.

Without ``groups`` there are as many as attention heads, each as wide as a head.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from gateskip.config import GateConfig
from gateskip.errors import ConfigError
from gateskip.gates.base import constant, normal
from gateskip.gates.vector import VectorGate

__all__ = ["GroupedGate"]


class GroupedGate(VectorGate):
    """A vector gate whose W has one row for each of K groups, of H/K channels each."""

    @classmethod
    def build(cls, config: GateConfig, hidden: int, generator: torch.Generator) -> Self:
        groups = config.groups
        assert groups is not None  # attach fills it in
        if hidden % groups:
            raise ConfigError(f"groups={groups} does not divide the hidden size {hidden}.")
        weight = normal(groups, hidden, generator=generator) * config.init_std
        return cls(weight, constant(groups, config.init_bias))

    def logits(self, u_NH: Tensor) -> Tensor:
        groups, hidden = self.weight.shape
        return super().logits(u_NH).repeat_interleave(hidden // groups, -1)

    def factors(self) -> tuple[Tensor | None, Tensor, Tensor]:
        groups, hidden = self.weight.shape
        eye = torch.eye(groups, dtype=torch.float32, device=self.weight.device)
        spread_HK = eye.repeat_interleave(hidden // groups, 0)
        return self.weight, spread_HK, spread_HK @ self.bias
