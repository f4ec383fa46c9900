"""Learned routers on branches that are otherwise left alone.

A linear score of a branch's input keeps a token where σ(score) ≥ ½, trained with a straight-through
gradient against the loss and the cost. Kept branches are as they were: nothing weighs their output.
Afterwards thresholds are calibrated, so that a model serves more budgets than the one it was
trained for. While they are trained skipped branches are computed, too, so that decisions
learn from what skipped tokens miss.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import nn

from gateskip.calibration.thresholds import calibrate
from gateskip.config import BRANCH_KINDS
from gateskip.errors import BudgetError, ConfigError
from gateskip.methods.base import Method, bare
from gateskip.retrofit.attach import gate_of, gated_branches
from gateskip.skipping.capacity import capacity
from gateskip.skipping.state import state_of
from gateskip.training.config import GateSkipTrainingConfig

__all__ = ["RouterTuning", "SkipGPT"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Routed(Method):
    """Routers, which rank at random until they are trained.

    Attributes:
        branches: which have routers. start: score of a token before training, which the threshold
            of 0 keeps. temperature: of the straight-through gradient. noise: scale of what is added
            to scores in training. cost: weight of the cost. seed: of the routers' first weights.
    """

    trained: ClassVar[bool] = True
    cost_kind: ClassVar[Any] = "absolute"
    branches: tuple[str, ...] = BRANCH_KINDS
    start: float = 0.5
    temperature: float = 1.0
    noise: float = 0.0
    cost: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("start", "noise", "cost"):
            value = getattr(self, name)
            if not value >= 0.0:
                raise ConfigError(f"{name}={value!r} must not be negative.")
        if not self.temperature > 0.0:
            raise ConfigError(f"temperature={self.temperature!r} must be above 0.")

    def apply(self, model: nn.Module, data: Any, tokenizer: Any = None) -> nn.Module:
        state = bare(model, importance="head", branches=tuple(self.branches), seed=self.seed)
        random = torch.Generator().manual_seed(self.seed)
        for module in gated_branches(model, state.family).values():
            gate = gate_of(module)
            width = gate.decision_weights()[0].shape[0]
            gate.set_head(torch.randn(width, generator=random) / width, self.start)
        calibrate(model, data, tokenizer, allocation="global", weigh_cost=False)
        return model

    def training(self, model: nn.Module, compute: float) -> GateSkipTrainingConfig:
        return GateSkipTrainingConfig(
            backbone="frozen", train_gates=True, train_compensation=False, thresholds="zero",
            decision_gradient=self.temperature, decision_noise=self.noise, learn_from_skipped=True,
            cost_weight=self.cost, cost_kind=self.cost_kind,
            cost_target=self.share(model, compute), budget_end=1.0,
        )  # fmt: skip

    def share(self, model: nn.Module, compute: float) -> float:
        """Of the MACs that routers can save, those that a budget spends. Raises BudgetError."""
        try:
            return capacity(state_of(model), compute)
        except BudgetError as error:
            raise BudgetError(
                f"compute={compute:g} is below what routers on {self.branches!r} reach; give "
                "both branches, or a larger budget."
            ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterTuning(_Routed):
    """Router-Tuning (arXiv 2410.13184): a frozen model's attentions get routers (its MindSkip, by
    token), and each is penalised for what it keeps above its capacity."""

    paper: ClassVar[str] = "arXiv 2410.13184"
    cost_kind: ClassVar[Any] = "hinge"
    branches: tuple[str, ...] = ("attention",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipGPT(_Routed):
    """SkipGPT (arXiv 2506.04179): routers of attentions and of MLPs learn first, in a frozen model,
    against a target for all of them together; then LoRA adapts the model to them.

    There decisions are Gumbel-softmax samples while routers learn, at a temperature that falls from
    5 to 1 over 10,000 steps: ``noise=1.0, temperature_start=5.0``. In few steps routers learn
    better without, so it is off. Ours versus the paper, too: the target is of MACs, not of
    branches; an MLP's router reads that MLP's input; inference draws nothing.

    Attributes:
        temperature_start: of the straight-through gradient, at first; None: as later.
        router_steps: share of the training that is the routers'.
    """

    paper: ClassVar[str] = "arXiv 2506.04179"
    temperature_start: float | None = None
    router_steps: float = 0.5

    def __post_init__(self) -> None:
        _Routed.__post_init__(self)
        if self.temperature_start is not None and not self.temperature_start > 0.0:
            raise ConfigError(f"temperature_start={self.temperature_start!r} must be above 0.")
        if not 0.0 < self.router_steps < 1.0:
            raise ConfigError(f"router_steps={self.router_steps!r} must be a share in (0, 1).")

    @property
    def shares(self) -> tuple[float, ...]:
        """See :class:`~gateskip.methods.base.Method`."""
        return (self.router_steps, 1.0 - self.router_steps)

    def stages(
        self, model: nn.Module, compute: float
    ) -> tuple[tuple[float, GateSkipTrainingConfig], ...]:
        adapts = GateSkipTrainingConfig(
            backbone="lora", train_compensation=False, budget_start=compute, budget_end=compute,
            schedule="constant",
        )  # fmt: skip
        routes = dataclasses.replace(
            self.training(model, compute), decision_gradient_start=self.temperature_start
        )
        return tuple(zip(self.shares, (routes, adapts), strict=True))
