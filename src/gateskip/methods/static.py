"""Static masks: branches that no token uses, in an order that serves every budget.

Larger budgets remove fewer, and what one removes every smaller one removes too (I7). The gates are
unit gates, so what is kept is as in the dense model; ``gateskip.export_static`` writes a plain
checkpoint of a budget.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from gateskip.config import BranchKey
from gateskip.costs import net_share
from gateskip.data import Sample, count_tokens, encode, take_tokens
from gateskip.errors import ConfigError
from gateskip.methods.base import Method, bare
from gateskip.skipping.policy import OFF, ThresholdTable
from gateskip.skipping.state import GateSkipState
from gateskip.training.config import GateSkipTrainingConfig

__all__ = ["EverySecond", "Static", "removal_table"]

Group = tuple[BranchKey, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static(Method):
    """Removes groups of branches, the first of :meth:`order` first.

    Attributes:
        max_tokens: tokens of text that the order may look at.
    """

    #: Whether a token decides for whole layers, as training with layer dropout needs.
    decision: ClassVar[str] = "branch"
    calibrated: ClassVar[bool] = False
    max_tokens: int = 12_000

    @abstractmethod
    def order(
        self, model: nn.Module, state: GateSkipState, samples: list[Sample]
    ) -> Sequence[Group]:
        """Groups of branches, what matters least first."""

    def training(self, model: nn.Module, compute: float) -> GateSkipTrainingConfig:
        """What is left trains, with a budget's branches gone from the first step on."""
        return GateSkipTrainingConfig(
            budget_start=compute, budget_end=compute, schedule="constant", train_compensation=False
        )

    def apply(self, model: nn.Module, data: Any, tokenizer: Any = None) -> nn.Module:
        samples = take_tokens(encode(data, tokenizer, 512), self.max_tokens)
        if not samples:
            raise ConfigError("data is empty; give some text.")
        # What is gone has no keys.
        state = bare(model, kv_source="none", decision=self.decision, **self.instead())
        groups = self.order(model, state, samples)
        state.compensated = state.config.compensation != "none"  # which costs something
        state.policy = removal_table(state, groups, samples)
        if state.compensated:
            self.replace(model, state, samples)
        return model

    def instead(self) -> dict[str, Any]:
        """Options of the gates' config that say what takes the place of what is removed."""
        return {}

    def replace(self, model: nn.Module, state: GateSkipState, samples: list[Sample]) -> None:
        """Fit what :meth:`instead` asks for."""


def removal_table(
    state: GateSkipState, groups: Sequence[Group], samples: list[Sample]
) -> ThresholdTable:
    """Thresholds that switch groups off, one more at each point; one group stays.

    Between two points the smaller set stays, so that a budget is never exceeded.
    """
    lengths = [sample.ids.shape[0] for sample in samples]
    mean_keys = sum(n * (n + 1) / 2 for n in lengths) / sum(lengths)
    costs, off = state.costs(), set[BranchKey]()
    rows, shares, compute = [], [], []
    for count in range(len(groups)):
        if count:
            off |= set(groups[count - 1])
        kept = {key: 0.0 if key in off else 1.0 for key in state.branches}
        rows.append(tuple(-math.inf if kept[key] else OFF for key in state.branches))
        shares.append(tuple(kept[key] for key in state.branches))
        compute.append(net_share(costs, kept, mean_keys))
    return ThresholdTable(
        allocation="searched",
        weigh_cost=False,
        keep=tuple(sum(row) / len(row) for row in shares),
        compute=tuple(compute),
        thresholds=tuple(rows),
        tokens=count_tokens(samples),
        mean_keys=mean_keys,
        shares=tuple(shares),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EverySecond(Static):
    """Every second layer, from the middle outwards, whatever text and weights say."""

    paper: ClassVar[str] = "null"

    def order(
        self, model: nn.Module, state: GateSkipState, samples: list[Sample]
    ) -> Sequence[Group]:
        layers = state.shape.layers
        odd, even = range(1, layers, 2), range(0, layers, 2)
        ordered = [
            layer
            for group in (odd, even)
            for layer in sorted(group, key=lambda i: (abs(i - layers // 2), i))
        ]
        return [((layer, "attention"), (layer, "mlp")) for layer in ordered]
