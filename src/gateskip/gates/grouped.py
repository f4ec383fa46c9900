"""The grouped gate (ours): one value per group of neighbouring channels, between scalar and vector.

Without ``groups`` there are as many as attention heads, each as wide as a head.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from gateskip.config import GateConfig
from gateskip.errors import ConfigError
from gateskip.gates.base import Gate, constant, normal

__all__ = ["GroupedGate"]


class GroupedGate(Gate):
    """g = σ(W·u + b) with W: K×H ~ N(0, init_std²), each of K values for H/K channels."""

    def __init__(self, weight_KH: Tensor, bias_K: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_KH)
        self.bias = nn.Parameter(bias_K)

    @classmethod
    def build(cls, config: GateConfig, hidden: int, generator: torch.Generator) -> Self:
        groups = config.groups
        assert groups is not None  # attach fills it in
        if hidden % groups:
            raise ConfigError(f"groups={groups} does not divide the hidden size {hidden}.")
        weight = normal(groups, hidden, generator=generator) * config.init_std
        return cls(weight, constant(groups, config.init_bias))

    def _spread(self) -> Tensor:
        """E ``[H, K]``, one 1 in every row."""
        groups, hidden = self.weight.shape
        eye = torch.eye(groups, dtype=torch.float32, device=self.weight.device)
        return eye.repeat_interleave(hidden // groups, 0)

    def logits(self, u_NH: Tensor) -> Tensor:
        z_NK = nn.functional.linear(u_NH, self.weight, self.bias)
        groups, hidden = self.weight.shape
        return z_NK.repeat_interleave(hidden // groups, -1)

    def mean_logit_weights(self) -> tuple[Tensor, Tensor]:
        return self.weight.mean(0), self.bias.mean()

    def factors(self) -> tuple[Tensor | None, Tensor, Tensor]:
        spread = self._spread()
        return self.weight, spread, spread @ self.bias

    def channels_alike(self) -> bool:
        same = torch.equal(self.weight, self.weight[:1].expand_as(self.weight))
        return same and torch.equal(self.bias, self.bias[:1].expand_as(self.bias))

    @torch.no_grad()
    def set_direction(self, w_H: Tensor, shift: float) -> None:
        self.weight.copy_(w_H.to(self.weight).expand_as(self.weight))
        self.bias.fill_(shift)
