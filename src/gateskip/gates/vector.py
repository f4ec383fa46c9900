"""The vector gate of "What Layers When" (arXiv 2510.13876, eq. 1): one value per channel."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from gateskip.config import GateConfig
from gateskip.gates.base import Gate, constant, normal

__all__ = ["VectorGate"]


class VectorGate(Gate):
    """g = σ(W·u + b), W: H×H ~ N(0, init_std²), b = init_bias."""

    def __init__(self, weight_HH: Tensor, bias_H: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_HH)
        self.bias = nn.Parameter(bias_H)

    @classmethod
    def build(cls, config: GateConfig, hidden: int, generator: torch.Generator) -> Self:
        weight = normal(hidden, hidden, generator=generator) * config.init_std
        return cls(weight, constant(hidden, config.init_bias))

    def logits(self, u_NH: Tensor) -> Tensor:
        return nn.functional.linear(u_NH, self.weight, self.bias)

    def mean_logit_weights(self) -> tuple[Tensor, Tensor]:
        return self.weight.mean(0), self.bias.mean()

    def factors(self) -> tuple[Tensor | None, Tensor, Tensor]:
        return None, self.weight, self.bias

    def channels_alike(self) -> bool:
        same = torch.equal(self.weight, self.weight[:1].expand_as(self.weight))
        return same and torch.equal(self.bias, self.bias[:1].expand_as(self.bias))

    @torch.no_grad()
    def set_direction(self, w_H: Tensor, shift: float) -> None:
        self.weight.copy_(w_H.to(self.weight).expand_as(self.weight))
        self.bias.fill_(shift)
