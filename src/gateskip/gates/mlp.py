"""The two-layer gate (an ablation of arXiv 2510.13876): it can bend where the others are linear."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from gateskip.config import GateConfig
from gateskip.gates.base import Gate, constant, normal

__all__ = ["MlpGate"]


class MlpGate(Gate):
    """g = σ(B·silu(A·u) + b), A: r×H, B: H×r.

    silu(x) − silu(−x) = x, so two inner units that mirror each other make any linear score: a
    fitted gate is one, until training moves it.
    """

    def __init__(self, down_RH: Tensor, up_HR: Tensor, bias_H: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(down_RH)
        self.up = nn.Parameter(up_HR)
        self.bias = nn.Parameter(bias_H)

    @classmethod
    def build(cls, config: GateConfig, hidden: int, generator: torch.Generator) -> Self:
        rank = max(config.rank, 2)
        down = normal(rank, hidden, generator=generator) * hidden**-0.5
        up = normal(hidden, rank, generator=generator) * config.init_std * (hidden / rank) ** 0.5
        return cls(down, up, constant(hidden, config.init_bias))

    def _inner(self, u_NH: Tensor) -> Tensor:
        return nn.functional.silu(nn.functional.linear(u_NH, self.down))

    def logits(self, u_NH: Tensor) -> Tensor:
        return nn.functional.linear(self._inner(u_NH), self.up, self.bias)

    def mean_logit(self, u_NH: Tensor) -> Tensor:
        return self._inner(u_NH) @ self.up.mean(0) + self.bias.mean()

    def linear(self) -> bool:
        """Whether two mirrored units are all that there is."""
        down, up = self.down, self.up
        mirrored = torch.equal(down[1], -down[0]) and torch.equal(up[:, 1], -up[:, 0])
        return mirrored and not bool(up[:, 2:].any())

    def mean_logit_weights(self) -> tuple[Tensor, Tensor]:
        """Where the gate is linear."""
        return self.up[:, 0].mean() * self.down[0], self.bias.mean()

    def factors(self) -> tuple[Tensor | None, Tensor, Tensor] | None:
        return (self.down[:1], self.up[:, :1], self.bias) if self.linear() else None

    def channels_alike(self) -> bool:
        same = torch.equal(self.up, self.up[:1].expand_as(self.up))
        alike = same and torch.equal(self.bias, self.bias[:1].expand_as(self.bias))
        return alike and self.linear()

    @torch.no_grad()
    def set_direction(self, w_H: Tensor, shift: float) -> None:
        # As of a low-rank gate: the other units keep their random weights and add nothing.
        self.down[0].copy_(w_H.to(self.down))
        self.down[1].copy_(-self.down[0])
        self.up.zero_()
        self.up[:, 0], self.up[:, 1] = 1.0, -1.0
        self.bias.fill_(shift)
