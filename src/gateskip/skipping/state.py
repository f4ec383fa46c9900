"""What a gated model remembers (one object per model), and what one thread overrides.

The state travels with ``copy.deepcopy``; overrides are contextvars, so threads do not mix.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gateskip.config import BranchKey, Budget, GateConfig, RowBudgets, one_of
from gateskip.costs import BranchCost, ModelShape, branch_cost
from gateskip.errors import AttachError, BudgetError, ConfigError
from gateskip.retrofit.attach import inner_model
from gateskip.skipping.latency import LatencyRecord
from gateskip.skipping.policy import ThresholdTable
from gateskip.skipping.rule import Rule

__all__ = ["GateSkipState", "Override", "current", "override", "state_of"]

EXECUTIONS = ("compacted", "masked")
Thresholds = Mapping[BranchKey, Any]
"""One number per branch, or one per branch and row of the batch, float32 ``[R]``."""


class GateSkipState:
    """Config, family, costs, policy and default budget of one gated model."""

    def __init__(self, config: GateConfig, family: Any, shape: ModelShape) -> None:
        self.config = config
        self.family = family
        #: For each layer the one whose K/V ``kv_source="previous"`` copies, or None.
        self.sources: tuple[int | None, ...] = ()
        self.shape = shape
        self.policy: ThresholdTable | None = None
        #: What ranks tokens where gates do not (``importance="rule"``).
        self.rule: Rule | None = None
        #: Name of the method that set them up, for results.
        self.method = "random" if config.importance == "random" else "gateskip"
        #: What machines measured with these thresholds, for ``latency=``.
        self.latency: tuple[LatencyRecord, ...] = ()
        self.default_budget: Budget | None = None
        self.fitted = False
        self.compensated = False
        #: Changes of the backbone that training merged into its weights, as low-rank factors.
        self.tuned: dict[str, tuple[Tensor, Tensor]] = {}
        #: Whether the backbone was trained in full, so that its weights are saved as well.
        self.backbone_trained = False
        self.base: dict[str, Any] = {}
        self.branches: tuple[BranchKey, ...] = tuple(
            (layer, kind)
            for layer in range(shape.layers)
            for kind in config.branches
            if config.gates((layer, kind))
        )
        if not self.branches:
            raise ConfigError(
                f"layer_step={config.layer_step} leaves no gate in {shape.layers} layers; lower it."
            )

    def resolve(self, budget: Budget | RowBudgets | None) -> Thresholds | None:
        """Thresholds at ``budget``; None keeps everything. Raises BudgetError.

        Each is a number, or with budgets by row float32 ``[R]``.
        """
        if budget is None or budget.full:
            return None
        if self.policy is None:
            raise BudgetError(
                f"budget {budget} needs thresholds: call gateskip.calibrate(model, data) first."
            )
        known = _Known(self.policy, self.branches, self.shape, self._paid(), self._timed())
        if isinstance(budget, RowBudgets):
            return _row_thresholds(known, budget)
        return _thresholds(known, budget)

    def expected(self, budget: Budget) -> dict[BranchKey, float]:
        """Share of valid tokens that each gated branch is to keep, by the table. BudgetError."""
        if self.policy is None:
            raise BudgetError(f"budget {budget} needs thresholds: call gateskip.calibrate first.")
        shares = self.policy.expected(budget, self.costs(), self._timed())
        return dict(zip(self.branches, shares, strict=True))

    def _timed(self) -> tuple[LatencyRecord, ...]:
        """Records of weights of this size."""
        return tuple(r for r in self.latency if r.weight_bytes == self.shape.weight_bytes)

    def _paid(self) -> GateConfig:
        """The config with what a skip costs as the model is now."""
        if self.compensated:
            return self.config
        return dataclasses.replace(self.config, compensation="none")

    def costs(self, *, alike: bool = False) -> dict[BranchKey, BranchCost]:
        """Cost of every branch, gated or not, as the model is now; ``alike`` as in branch_cost."""
        return _costs(self.shape, self._paid(), alike)


class _Known(NamedTuple):
    """What thresholds depend on."""

    policy: ThresholdTable
    branches: tuple[BranchKey, ...]
    shape: ModelShape
    paid: GateConfig
    records: tuple[LatencyRecord, ...]


def _costs(shape: ModelShape, config: GateConfig, alike: bool) -> dict[BranchKey, BranchCost]:
    return {
        (layer, kind): branch_cost(shape, config, (layer, kind), alike=alike)
        for layer in range(shape.layers)
        for kind in ("attention", "mlp")
    }


@functools.lru_cache(maxsize=64)
def _row_thresholds(known: _Known, budgets: RowBudgets) -> Thresholds:
    keeps_all = dict.fromkeys(known.branches, -math.inf)
    rows = [keeps_all if row.full else _thresholds(known, row) or keeps_all for row in budgets.rows]
    return {key: torch.tensor([row[key] for row in rows]) for key in known.branches}


@functools.lru_cache(maxsize=64)
def _thresholds(known: _Known, budget: Budget) -> dict[BranchKey, float] | None:
    costs = _costs(known.shape, known.paid, False)
    row = known.policy.resolve(budget, costs, known.records)
    return None if row is None else dict(zip(known.branches, row, strict=True))


def state_of(model: nn.Module) -> GateSkipState:
    """The state of a gated model, wrapped or not. Raises AttachError when it is not gated."""
    found = vars(inner_model(model)).get("_gateskip")
    if not isinstance(found, GateSkipState):
        raise AttachError(
            f"this {type(model).__name__} has no gates; call gateskip.attach(model) first."
        )
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class Override:
    """What a context changes for one model in one thread; None leaves the model's own.

    Attributes:
        budget: budget instead of the model's default.
        thresholds: explicit thresholds, before any budget (calibration).
        execution: ``"masked"`` or ``"compacted"``.
        recorder: receives every call when it ends (trace).
        observer: receives every branch's tensors (fitting); implies masked execution.
        scores: receives every branch's scores (calibration).
        forced: decisions to replay, one mapping per coming call.
        objective: receives every gate and its input (training), as ``branch(key, gate, u, call)``.
        generating: within ``generate``, whose ready-made masks are causality and padding.
        controller: moves thresholds so that a budget is held (BudgetController).
        ungated: every layer runs as the dense model's, whatever the budget.
        seed: of random skipping, instead of the config's.
        noise: scale of the logistic noise on scores (training).
    """

    budget: Budget | RowBudgets | None = None
    thresholds: Thresholds | None = None
    execution: str | None = None
    recorder: Any = None
    observer: Any = None
    scores: Any = None
    forced: Iterator[Mapping[BranchKey, Tensor]] | None = None
    objective: Any = None
    generating: bool = False
    controller: Any = None
    ungated: bool = False
    seed: int | None = None
    noise: float = 0.0


_OVERRIDES: contextvars.ContextVar[Mapping[GateSkipState, Override]] = contextvars.ContextVar(
    "gateskip_overrides"
)
_NOTHING = Override()


def current(state: GateSkipState) -> Override:
    """This thread's override for a model."""
    table = _OVERRIDES.get({})
    return table.get(state, _NOTHING)


@contextlib.contextmanager
def override(state: GateSkipState, **changes: Any) -> Iterator[Override]:
    """Change this thread's override for a model within the block."""
    table = dict(_OVERRIDES.get({}))
    table[state] = dataclasses.replace(current(state), **changes)
    token = _OVERRIDES.set(table)
    try:
        yield table[state]
    finally:
        _OVERRIDES.reset(token)


def check_execution(mode: str) -> None:
    """Raise ConfigError unless ``mode`` is an execution."""
    one_of("execution", mode, EXECUTIONS)


def effective_budget(state: GateSkipState) -> Budget | RowBudgets | None:
    """This thread's budget, else the model's default."""
    return current(state).budget or state.default_budget


def replay(state: GateSkipState, decisions: Sequence[Mapping[BranchKey, Tensor]]) -> Any:
    """Context: coming calls take these decisions instead of making their own."""
    return override(state, forced=iter(decisions))
