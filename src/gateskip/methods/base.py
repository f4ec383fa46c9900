"""What all methods share: fields as options, and a model to begin with."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

from torch import nn

from gateskip.config import GateConfig, one_of
from gateskip.execution.api import attach
from gateskip.retrofit.attach import inner_model
from gateskip.skipping.state import GateSkipState, state_of
from gateskip.training.config import GateSkipTrainingConfig

__all__ = ["Method", "bare", "is_gated"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to decide what is computed; subclasses are frozen dataclasses of its options.

    Attributes:
        paper: where it comes from. causal: see :class:`~gateskip.skipping.rule.Rule`.
        trained: whether it is of no use before it is trained.
        calibrated: whether thresholds are found on text, and again after a training; not so where
            branches are removed for good.
    """

    paper: ClassVar[str]
    causal: ClassVar[bool] = True
    trained: ClassVar[bool] = False
    calibrated: ClassVar[bool] = True

    @classmethod
    def of(cls, name: str, options: dict[str, Any]) -> Self:
        """With options by name. Raises ConfigError for an unknown one."""
        known = tuple(field.name for field in dataclasses.fields(cls))
        for option in options:
            one_of(f"option of {name!r}", option, known)
        return cls(**options)

    def training(self, model: nn.Module, compute: float) -> GateSkipTrainingConfig:
        """How a model with the method in place is trained for a budget, ``compute`` of the dense
        MACs; the trainer's arguments are the caller's.

        By default the backbone trains while tokens skip, at budgets drawn between 1 and this one.
        """
        return GateSkipTrainingConfig(budget_end=compute, schedule="sampled")

    @property
    def shares(self) -> tuple[float, ...]:
        """Of all steps, what each of the method's trainings takes; they sum to 1."""
        return (1.0,)

    def stages(
        self, model: nn.Module, compute: float
    ) -> tuple[tuple[float, GateSkipTrainingConfig], ...]:
        """Trainings one after the other, each with its share of all steps."""
        return ((1.0, self.training(model, compute)),)

    @abstractmethod
    def apply(self, model: nn.Module, data: Any, tokenizer: Any = None) -> nn.Module:
        """See :func:`gateskip.methods.apply`."""


def is_gated(model: nn.Module) -> bool:
    """Whether a model has gates, or the place for them."""
    return isinstance(vars(inner_model(model)).get("_gateskip"), GateSkipState)


def bare(model: nn.Module, **options: Any) -> GateSkipState:
    """Attach what decides to a plain model, without gates: kept branches are as they were.

    Raises:
        AttachError: the model has gates already.
    """
    given: dict[str, Any] = {"kind": "unit", "compensation": "none", "importance": "random"}
    attach(model, GateConfig(**(given | options)))
    state = state_of(model)
    state.fitted = True  # there is nothing to fit
    return state
