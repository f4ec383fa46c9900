"""The scalar gate (an ablation of arXiv 2510.13876): one value per token and branch."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from gateskip.config import GateConfig
from gateskip.gates.base import Gate, constant, normal

__all__ = ["ScalarGate"]


class ScalarGate(Gate):
    """g = σ(w·u + b), w: H ~ N(0, init_std²), b = init_bias; one value for all channels."""

    def __init__(self, weight_1H: Tensor, bias_1: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_1H)
        self.bias = nn.Parameter(bias_1)

    @classmethod
    def build(cls, config: GateConfig, hidden: int, generator: torch.Generator) -> Self:
        weight = normal(1, hidden, generator=generator) * config.init_std
        return cls(weight, constant(1, config.init_bias))

    def logits(self, u_NH: Tensor) -> Tensor:
        return nn.functional.linear(u_NH, self.weight, self.bias)

    def mean_logit_weights(self) -> tuple[Tensor, Tensor]:
        return self.weight[0], self.bias[0]

    def factors(self) -> tuple[Tensor | None, Tensor, Tensor]:
        return None, self.weight, self.bias

    def channels_alike(self) -> bool:
        return True

    @torch.no_grad()
    def set_direction(self, w_H: Tensor, shift: float) -> None:
        self.weight.copy_(w_H.to(self.weight)[None])
        self.bias.fill_(shift)
