"""The router of FlexiDepth (arXiv 2503.23798): two layers, and one value for a whole token."""

from __future__ import annotations

import dataclasses
from typing import Self

import torch

from gateskip.config import GateConfig
from gateskip.gates.base import constant
from gateskip.gates.mlp import MlpGate

__all__ = ["BottleneckGate"]


class BottleneckGate(MlpGate):
    """g = σ(v·silu(A·u) + b), A: r×H, v: 1×r. The paper's bends by tanh and a norm."""

    @classmethod
    def build(cls, config: GateConfig, hidden: int, generator: torch.Generator) -> Self:
        wide = super().build(dataclasses.replace(config, init_std=1.0), hidden, generator)
        up = wide.up.detach()[:1] * config.init_std
        return cls(wide.down.detach().clone(), up.clone(), constant(1, config.init_bias))
