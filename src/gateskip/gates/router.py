"""The router of Mixture-of-Depths (arXiv 2404.02258): a weight r on all that a layer adds."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from gateskip.config import GateConfig
from gateskip.errors import ConfigError
from gateskip.gates.base import Gate, constant, no_autocast, normal

__all__ = ["RouterGate"]


class RouterGate(Gate):
    """r = b + a·(w·u) without a sigmoid; w·u ranks tokens.

    Two forms by ``init_bias``, which is b and stays: at 0 the paper's r = w·u (eq. 1), for training
    from scratch; else (at 1) a retrofit whose learned a is 0 at first, so that the layer is as
    it was while w already ranks.
    """

    def __init__(self, weight_H: Tensor, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_H)
        # The paper's form has no a: a buffer, so that nothing trains it.
        slope = constant(1, 1.0 if offset == 0.0 else 0.0)
        if offset == 0.0:
            self.register_buffer("slope", slope)
        else:
            self.slope = nn.Parameter(slope)
        self.register_buffer("offset", constant(1, offset))

    offset: Tensor

    @classmethod
    def build(cls, config: GateConfig, hidden: int, generator: torch.Generator) -> Self:
        weight = normal(hidden, generator=generator) * config.init_std
        return cls(weight, config.init_bias)

    def logits(self, u_NH: Tensor) -> Tensor:
        return (u_NH @ self.weight)[..., None]

    def forward(self, u_NH: Tensor) -> Tensor:
        """r, float32 ``[..., 1]``, any real number."""
        with no_autocast(u_NH):
            return self.offset + self.slope * self.logits(u_NH.float())

    def mean_logit_weights(self) -> tuple[Tensor, Tensor]:
        return self.weight, torch.zeros_like(self.weight[0])

    def factors(self) -> None:
        return None  # its value is no sigmoid of them

    def channels_alike(self) -> bool:
        return False

    def set_direction(self, w_H: Tensor, shift: float) -> None:
        raise ConfigError("kind='router' is learned, not fitted; train it, or choose another kind.")
