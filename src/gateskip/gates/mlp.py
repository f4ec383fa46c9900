"""The two-layer gate (an ablation of arXiv 2510.13876): it can bend where the others are linear."""

from __future__ import annotations

import dataclasses
from typing import Self

import torch
from torch import Tensor, nn

from gateskip.config import GateConfig
from gateskip.gates.low_rank import LowRankGate

__all__ = ["MlpGate"]


class MlpGate(LowRankGate):
    """A low-rank gate with a bend in the middle: g = σ(B·silu(A·u) + b), A: r×H, B: H×r.

    silu(x) − silu(−x) = x, so two inner units that mirror each other make any linear score: a
    fitted gate is one, until training moves it.
    """

    @classmethod
    def build(cls, config: GateConfig, hidden: int, generator: torch.Generator) -> Self:
        two = dataclasses.replace(config, rank=max(config.rank, 2))
        return super().build(two, hidden, generator)

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
        return super().channels_alike() and self.linear()

    @torch.no_grad()
    def set_direction(self, w_H: Tensor, shift: float) -> None:
        super().set_direction(w_H, shift)  # the first unit, then its mirror
        self.down[1].copy_(-self.down[0])
        self.up[:, 1] = -1.0
