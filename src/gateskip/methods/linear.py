"""Static methods with a linear map in the place of every branch that is removed.

As in ReplaceMe (arXiv 2505.02819), which replaces a block of layers by one map and needs no
training either. Here it is a map of low rank for each branch, fitted in closed form just as the
compensation of gates is: what gates gain over it is not the compensation's. Its MACs are spent.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from gateskip.config import Budget
from gateskip.data import Sample, to_batches
from gateskip.errors import ConfigError
from gateskip.fitting.closed_form import fit_compensation
from gateskip.methods.gate_norm import GateNorm
from gateskip.methods.llm_drop import LLMDrop
from gateskip.methods.shortgpt import ShortGPT
from gateskip.methods.static import Static
from gateskip.skipping.state import GateSkipState
from gateskip.training.config import GateSkipTrainingConfig

__all__ = ["GateNormLinear", "LLMDropLinear", "ShortGPTLinear"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Linear(Static):
    """A static method's order, and a map instead of what it removes.

    Attributes:
        rank: of the maps. compute: the budget whose removals they are fitted to.
    """

    rank: int = 32
    compute: float = 0.75

    def instead(self) -> dict[str, Any]:
        return {"compensation": "low_rank", "compensation_rank": self.rank}

    def replace(self, model: nn.Module, state: GateSkipState, samples: list[Sample]) -> None:
        thresholds = state.resolve(Budget(compute=self.compute))
        if thresholds is None:
            raise ConfigError(f"compute={self.compute!r} removes nothing; choose a smaller one.")
        fit_compensation(model, to_batches(samples), dict(thresholds))

    def training(self, model: nn.Module, compute: float) -> GateSkipTrainingConfig:
        return dataclasses.replace(super().training(model, compute), train_compensation=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortGPTLinear(_Linear, ShortGPT):
    """Maps instead of layers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LLMDropLinear(_Linear, LLMDrop):
    """Maps instead of branches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateNormLinear(_Linear, GateNorm):
    """Maps instead of attentions."""
