"""What a decoder may run a call of the model with."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from gateskip.config import BRANCH_KINDS, BranchKey, Budget, RowBudgets
from gateskip.errors import BudgetError, ConfigError
from gateskip.skipping.policy import OFF
from gateskip.skipping.state import GateSkipState, override, state_of

__all__ = ["AtBudget", "Current", "Dense", "ExitLayer", "Policy", "StaticMask", "as_policy"]


class Policy(ABC):
    """A way to run one call of a gated model."""

    @abstractmethod
    def on(self, state: GateSkipState) -> AbstractContextManager[Any]:
        """Context in which calls of the model run this way, in this thread."""

    @abstractmethod
    def share(self, state: GateSkipState) -> float:
        """Expected share of the decoder's MACs per token that it spends."""

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError or BudgetError where the model cannot run this way."""
        state_of(model)


@dataclasses.dataclass(frozen=True)
class Current(Policy):
    """Whatever is in force: the budget of the call, of the thread, or of the model."""

    def on(self, state: GateSkipState) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def share(self, state: GateSkipState) -> float:
        return 1.0


@dataclasses.dataclass(frozen=True)
class AtBudget(Policy):
    """A budget, or one for every row of the batch."""

    budget: Budget | RowBudgets

    def on(self, state: GateSkipState) -> AbstractContextManager[Any]:
        return override(state, budget=self.budget, thresholds=None, ungated=False)

    def share(self, state: GateSkipState) -> float:
        if self.budget.full or isinstance(self.budget, RowBudgets):
            return 1.0
        if self.budget.unit != "keep" or state.policy is None:
            return self.budget.value
        return state.policy.compute_at(self.budget.value)

    def check(self, model: nn.Module) -> None:
        state_of(model).resolve(self.budget)


@dataclasses.dataclass(frozen=True)
class Dense(Policy):
    """The original model: the same weights, gates and compensation out of it."""

    def on(self, state: GateSkipState) -> AbstractContextManager[Any]:
        return override(state, ungated=True)

    def share(self, state: GateSkipState) -> float:
        return 1.0


class StaticMask(Policy):
    """The same branches are skipped for every token, protected ones included.

    Args:
        off: (layer, ``"attention"`` or ``"mlp"``) of what is skipped.
    """

    def __init__(self, off: Iterable[BranchKey]) -> None:
        self.off = frozenset((int(layer), str(kind)) for layer, kind in off)
        self._known: tuple[Any, Any] = (None, None)

    def on(self, state: GateSkipState) -> AbstractContextManager[Any]:
        known, thresholds = self._known
        if known is not state:  # the same object every time, which kernels remember
            thresholds = {k: OFF if k in self.off else -math.inf for k in state.branches}
            self._known = (state, thresholds)
        return override(state, thresholds=thresholds, ungated=False)

    def share(self, state: GateSkipState) -> float:
        costs = state.costs()
        full = sum(cost.computed for cost in costs.values())
        return 1.0 - sum(costs[k].computed - costs[k].skipped for k in self.off) / full

    def check(self, model: nn.Module) -> None:
        state = state_of(model)
        if not self.off:
            raise ConfigError("off=() leaves nothing out; name at least one (layer, kind).")
        for key in sorted(self.off):
            if key not in state.branches:
                raise ConfigError(
                    f"off={key!r} is not a gated branch of this model, which has "
                    f"{state.shape.layers} layers of {' and '.join(state.config.branches)}."
                )
            first = key[1] == "attention" and state.sources[key[0]] is None
            if first and state.config.kv_source == "previous":
                raise ConfigError(
                    f"off={key!r}: kv_source='previous' has nothing to copy its keys and values "
                    "from; leave it in."
                )

    def __repr__(self) -> str:
        return f"StaticMask({sorted(self.off)})"


class ExitLayer(StaticMask):
    """The first layers alone, then the LM head.

    Args:
        layers: how many of them.
    """

    def __init__(self, layers: int) -> None:
        if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
            raise ConfigError(f"layers={layers!r} must be a whole number of at least 1.")
        super().__init__(())
        self.layers = layers

    def on(self, state: GateSkipState) -> AbstractContextManager[Any]:
        self._fill(state)
        return super().on(state)

    def share(self, state: GateSkipState) -> float:
        self._fill(state)
        return super().share(state)

    def check(self, model: nn.Module) -> None:
        count = state_of(model).shape.layers
        if self.layers >= count:
            raise ConfigError(f"layers={self.layers!r} must be below the model's {count}.")
        self._fill(state_of(model))
        super().check(model)

    def _fill(self, state: GateSkipState) -> None:
        self.off = frozenset(
            (layer, kind)
            for layer in range(self.layers, state.shape.layers)
            for kind in BRANCH_KINDS
            if (layer, kind) in state.branches
        )

    def __repr__(self) -> str:
        return f"ExitLayer({self.layers})"


def as_policy(name: str, value: Any) -> Policy:
    """A policy from what users give: None, a share kept, a budget, ``"dense"``, a policy.

    Raises:
        ConfigError: anything else. BudgetError: a share out of range.
    """
    if isinstance(value, Policy):
        return value
    if value is None:
        return Current()
    if isinstance(value, str) and value == "dense":
        return Dense()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return AtBudget(Budget(keep=float(value)))
    if isinstance(value, Budget | RowBudgets | dict):
        budget = Budget.of(value)
        assert budget is not None
        return AtBudget(budget)
    raise ConfigError(
        f"{name}={value!r} must be a share kept, a budget such as {{'compute': 0.5}}, 'dense', or "
        "a policy of gateskip.decoding."
    )


def check_policy(name: str, policy: Policy, model: nn.Module) -> None:
    """:meth:`Policy.check`, with the argument's name. Raises what it raises."""
    try:
        policy.check(model)
    except (BudgetError, ConfigError) as error:
        raise type(error)(f"{name}: {error}") from error
