"""Where a training's thresholds come from, beside calibration.

``"running"``: an average over steps of each branch's own quantile, so that a decision knows of no
later token. ``"learned"``: one parameter per branch, moved by straight-through gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gateskip.calibration.thresholds import table_of
from gateskip.config import BranchKey, Budget
from gateskip.errors import ConfigError
from gateskip.fitting.passes import flat_valid
from gateskip.retrofit.attach import gate_of, gated_branches
from gateskip.skipping.call import Call
from gateskip.skipping.policy import ThresholdTable
from gateskip.skipping.quantile import BatchQuantile, RowDropout, SequenceTopK, lowest
from gateskip.skipping.state import state_of
from gateskip.training.config import GateSkipTrainingConfig

__all__ = ["OwnThresholds", "RunningThresholds", "add_learned", "keep_learned", "learned"]


class RunningThresholds:
    """An exponential average of quantiles; an ``Override.scores`` while training.

    It moves once per optimiser step, over the scores of all micro-batches and processes, so that
    accumulation changes nothing.

    Args:
        momentum: share of the old value in the new one.
        start: thresholds to begin with; branches without one keep everything in the first step.
    """

    def __init__(self, momentum: float, start: Mapping[BranchKey, float]) -> None:
        self.momentum = momentum
        self.values = dict(start)
        self._scores: dict[BranchKey, list[Tensor]] = {}
        self._valid: dict[BranchKey, int] = {}

    def thresholds(self, branches: tuple[BranchKey, ...]) -> dict[BranchKey, float]:
        """τ of every branch now."""
        return {key: self.values.get(key, -math.inf) for key in branches}

    def add(self, key: BranchKey, score_BT: Tensor, call: Call) -> None:
        """Called by every branch that decides."""
        scores = score_BT.detach().flatten()[flat_valid(call)].float().cpu()
        self._scores.setdefault(key, []).append(scores)
        self._valid[key] = self._valid.get(key, 0) + int(call.everyone().sum())

    def step(self, keep: Mapping[BranchKey, float], gather: Callable[[Any], list[Any]]) -> None:
        """An optimiser step has ended.

        Args:
            keep: the share of valid tokens that each branch is to keep.
            gather: the same object of every process, in a list.
        """
        mine = {key: (torch.cat(parts), self._valid[key]) for key, parts in self._scores.items()}
        self._scores, self._valid = {}, {}
        everyone = gather(mine)
        for key in mine:
            scores = torch.cat([theirs[key][0] for theirs in everyone if key in theirs])
            valid = sum(theirs[key][1] for theirs in everyone if key in theirs)
            found = float(lowest(scores, (1.0 - keep[key]) * valid))
            old = self.values.get(key, -math.inf)
            known = math.isfinite(old)
            self.values[key] = (
                self.momentum * old + (1.0 - self.momentum) * found if known else found
            )

    def to_json(self) -> list[list[Any]]:
        """``[layer, kind, τ]`` of every branch seen."""
        return [[*key, value] for key, value in self.values.items()]

    def take(self, rows: list[list[Any]]) -> None:
        """Be where :meth:`to_json` was."""
        self.values = {(layer, kind): value for layer, kind, value in rows}


class OwnThresholds:
    """The thresholds of every step of one training, as overrides of the model's.

    Attributes:
        running: the average, of ``thresholds="running"``.
    """

    def __init__(self, model: nn.Module, config: GateSkipTrainingConfig) -> None:
        state = state_of(model)
        self.model, self.config = model, config
        self.running: RunningThresholds | None = None
        if config.thresholds == "learned":
            end = Budget.by(config.budget_unit, config.budget_end)
            add_learned(model, state.resolve(end) or {})
        if config.thresholds == "running":
            self.running = RunningThresholds(config.threshold_momentum, {})

    def now(self, budgets: Mapping[str, Budget] | None) -> dict[str, Any]:
        """Fields of an ``Override``, beside the budget.

        Args:
            budgets: of this step, by branch kind; None while evaluating.
        """
        state, config = state_of(self.model), self.config
        if config.thresholds == "learned":
            return {"thresholds": learned(self.model)}
        if config.thresholds == "zero":
            return {"thresholds": dict.fromkeys(state.branches, 0.0)}
        if budgets is None:
            return {}
        if config.layer_dropout:
            last = max(state.shape.layers - 1, 1)
            rates = {key: config.layer_dropout * (2.0 ** (key[0] / last) - 1.0)
                     for key in state.branches}  # fmt: skip
            return {"thresholds": {key: RowDropout(rate) for key, rate in rates.items()}}
        if config.thresholds in ("batch", "sequence"):
            made = BatchQuantile if config.thresholds == "batch" else SequenceTopK
            keep = {kind: made(b.keep or 1.0) for kind, b in budgets.items()}
            return {"thresholds": {key: keep[key[1]] for key in state.branches}}
        if self.running is not None:
            return {"thresholds": self.running.thresholds(state.branches), "scores": self.running}
        if config.budget_attention is None and config.budget_mlp is None:
            return {}
        resolved = {kind: state.resolve(budget) for kind, budget in budgets.items()}
        found = {k: (resolved[k[1]] or {}).get(k, -math.inf) for k in state.branches}
        return {"thresholds": found}

    def step(self, keep: Mapping[str, float], gather: Callable[[Any], list[Any]]) -> None:
        """An optimiser step has ended; as :meth:`RunningThresholds.step`, by branch kind."""
        assert self.running is not None
        branches = state_of(self.model).branches
        self.running.step({key: keep[key[1]] for key in branches}, gather)


def add_learned(model: nn.Module, start: Mapping[BranchKey, float]) -> None:
    """Give every gate with a finite threshold a parameter that begins there."""
    state = state_of(model)
    for key, module in gated_branches(model, state.family).items():
        gate, value = gate_of(module), start.get(key, -math.inf)
        if gate.shared:
            raise ConfigError(
                f"thresholds='learned' needs a gate for every branch; kind={state.config.kind!r} "
                "shares one."
            )
        if math.isfinite(value):
            gate.threshold = nn.Parameter(torch.full_like(gate.score_scale, value))


def learned(model: nn.Module) -> dict[BranchKey, Any]:
    """The parameters, ``[]`` each, and −∞ where a branch has none."""
    state = state_of(model)
    gates = {key: gate_of(m) for key, m in gated_branches(model, state.family).items()}
    return {k: -math.inf if g.threshold is None else g.threshold for k, g in gates.items()}


def keep_learned(model: nn.Module, data: Any, tokenizer: Any = None) -> ThresholdTable:
    """Turn learned thresholds into the model's policy, with what they realise on ``data``.

    The table has two points, full and learned; budgets between them are interpolated.
    """
    state = state_of(model)
    with torch.no_grad():
        found = {key: float(value) for key, value in learned(model).items()}
    for module in gated_branches(model, state.family).values():
        gate_of(module).threshold = None
    state.policy = table_of(model, data, found, tokenizer)
    return state.policy
