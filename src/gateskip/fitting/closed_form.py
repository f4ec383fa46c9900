r"""``fit``: gates that rank tokens, in minutes, without training (ours).

For each branch, ridge regression from its input u to y = log(‖o‖/‖h‖): how much the branch changes
the residual it joins. The prediction ŷ becomes the score through z = z₀ + α·(ŷ − c) on all
channels, with α small enough that gate values stay near σ(z₀); score scale α and a shift make
s = ŷ. Compensation is fitted, with skipping on, to what the dense model's branch adds, and once
more with that compensation in place, because a compensated stream is another one; each time the
gates are fitted again to what a compensated skip loses.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gateskip.config import ROUTERS, BranchKey, GateConfig
from gateskip.data import Batch, count_tokens, encode, take_tokens, to_batches
from gateskip.errors import ConfigError, DataError
from gateskip.fitting.closed_loop import Allocation, closed_loop, keep_all, measure
from gateskip.fitting.observers import (
    CompensationMoments,
    DenseOutputs,
    ScoreMoments,
    Several,
)
from gateskip.fitting.passes import run_pass, shown
from gateskip.fitting.regression import Moments
from gateskip.gates import Gate
from gateskip.retrofit.attach import branch_module, gate_of, layers_of
from gateskip.skipping.compensation import Compensation, compensation_of, set_compensation
from gateskip.skipping.state import GateSkipState, state_of

__all__ = ["FitReport", "fit", "fit_compensation"]

ALPHA = 0.1  # a log ratio moves the logit by a tenth: gates stay within 1 % of σ(z₀)
RIDGE = 1e-4
COMPENSATION_RIDGE = 1e-3
MINIMUM_TOKENS = 1_000
LOOP_TOKENS = 4_000
LOOP_TOLERANCE = 0.01
FIT_KEEP = 0.65
ROUNDS = 2


@dataclasses.dataclass(frozen=True, slots=True)
class FitReport:
    """What ``fit`` did: tokens seen, seconds, and the regression's r² per branch (fitting text)."""

    tokens: int
    seconds: float
    r2: dict[BranchKey, float]


def fit(
    model: nn.Module,
    data: Any,
    tokenizer: Any = None,
    *,
    max_tokens: int | None = 30_000,
    max_length: int = 512,
    batch_tokens: int = 2048,
    fit_keep: float = FIT_KEEP,
    rounds: int = ROUNDS,
    progress: bool = False,
) -> FitReport:
    """Fit gates, and the compensation that the config asks for, in closed form.

    Args:
        model: a gated model; its backbone is not changed.
        data: texts, rows or id tensors (see ``gateskip.data``).
        max_tokens: tokens used; None uses all. max_length: tokens per text.
        fit_keep: share of token×branch pairs kept while the compensation is fitted.
        rounds: how often the compensation is fitted, each time on the trajectory of the last.

    Raises:
        DataError: fewer than 1,000 tokens.
    """
    state = state_of(model)
    if state.config.kind in ("unit", *ROUTERS):
        raise ConfigError(
            f"kind={state.config.kind!r} has nothing to fit; attach with another kind of gate."
        )
    started = time.perf_counter()
    samples = take_tokens(encode(data, tokenizer, max_length), max_tokens)
    tokens = count_tokens(samples)
    if tokens < MINIMUM_TOKENS:
        raise DataError(
            f"data has {tokens} tokens; fitting needs at least {MINIMUM_TOKENS}. Give more text."
        )
    batches = to_batches(samples, batch_tokens)
    modules = _modules(model, state)
    for module in modules.values():
        set_compensation(module, None)
    state.compensated, state.policy, state.default_budget = False, None, None

    def title(text: str) -> str | None:
        return text if progress else None

    scores = ScoreMoments({}, ungated=True)
    run_pass(model, batches, observer=scores, title=title("Fitting gates"))
    r2 = _write_gates(modules, scores.moments, state.config)
    state.fitted = True
    if state.config.compensation != "none":
        short = to_batches(take_tokens(samples, LOOP_TOKENS), batch_tokens)
        compensations: dict[BranchKey, Compensation] = {}
        thresholds = keep_all(state)
        for number in range(1, rounds + 1):
            thresholds = _thresholds(model, state, short, fit_keep, thresholds)
            outputs, scores = CompensationMoments(), ScoreMoments(compensations, ungated=False)
            for batch in shown(batches, title(f"Fitting compensation, {number} of {rounds}")):
                dense = DenseOutputs()
                run_pass(model, [batch], observer=dense)
                outputs.dense = dense.outputs
                # Without a compensation yet, the scores of the first pass stay as they are.
                both = Several(outputs, scores) if compensations else outputs
                run_pass(model, [batch], thresholds=thresholds, observer=both)
            if compensations:
                _write_gates(modules, scores.moments, state.config)
            compensations = _write_compensation(modules, outputs.moments, state)
        thresholds = _thresholds(model, state, short, fit_keep, thresholds)
        scores = ScoreMoments(compensations, ungated=False)
        run_pass(model, batches, thresholds=thresholds, observer=scores,
                 title=title("Fitting gates again"))  # fmt: skip
        r2 = _write_gates(modules, scores.moments, state.config)
    return FitReport(tokens=tokens, seconds=time.perf_counter() - started, r2=r2)


def fit_compensation(
    model: nn.Module,
    batches: Sequence[Batch],
    thresholds: dict[BranchKey, float],
    *,
    rounds: int = ROUNDS,
) -> None:
    """Fit the compensation that the config asks for under given thresholds; gates stay.

    Branches that nobody skips there get one that adds nothing.
    """
    state = state_of(model)
    modules = _modules(model, state)
    for module in modules.values():
        set_compensation(module, None)
    state.compensated = False
    for _ in range(rounds):
        outputs = CompensationMoments()
        for batch in batches:
            dense = DenseOutputs()
            run_pass(model, [batch], observer=dense)
            outputs.dense = dense.outputs
            run_pass(model, [batch], thresholds=thresholds, observer=outputs)
        _write_compensation(modules, outputs.moments, state)


def _modules(model: nn.Module, state: GateSkipState) -> dict[BranchKey, nn.Module]:
    layers = layers_of(model, state.family)
    return {key: branch_module(layers[key[0]], state.family, key[1]) for key in state.branches}


def _thresholds(
    model: nn.Module,
    state: GateSkipState,
    short: Sequence[Batch],
    keep: float,
    near: dict[BranchKey, float],
) -> dict[BranchKey, float]:
    """Cost-weighed thresholds that keep ``keep`` of the pairs, as the model is now.

    ``near`` is where the search begins: the last thresholds found, or ones that keep everything.
    """
    lengths = [int(n) for batch in short for n in batch.mask.sum(1)]
    keys = sum(n * (n + 1) / 2 for n in lengths) / sum(lengths)
    split = Allocation.of(state, "global", True, keys)
    start = measure(model, short, near)
    if abs(start.keep - keep) <= LOOP_TOLERANCE:
        return near
    return closed_loop(model, short, split, keep, start, tolerance=LOOP_TOLERANCE)[0]


def _write_compensation(
    modules: dict[BranchKey, nn.Module], moments: dict[BranchKey, Moments], state: GateSkipState
) -> dict[BranchKey, Compensation]:
    written = {}
    for key, module in modules.items():
        found = compensation_from(moments[key], state.config) if key in moments else None
        set_compensation(module, found or _zero(state, state.config))
        written[key] = compensation_of(module)
    state.compensated = True
    return {key: c for key, c in written.items() if c is not None}


def compensation_from(moments: Moments, config: GateConfig) -> Compensation | None:
    """The compensation of one branch, or None where too few tokens were skipped to fit one."""
    if moments.count < 1:
        return None
    if config.compensation == "mean" or moments.count < 2 * config.compensation_rank:
        mean = moments.mean_target().float()
        if config.compensation == "mean":
            return Compensation(mean)
        rank, hidden = config.compensation_rank, mean.shape[0]
        return Compensation(mean, torch.zeros(rank, hidden), torch.zeros(hidden, rank))
    down, up, bias = moments.solve_low_rank(COMPENSATION_RIDGE, config.compensation_rank)
    return Compensation(bias.float(), down.float(), up.float())


def _zero(state: GateSkipState, config: GateConfig) -> Compensation:
    hidden, rank = state.shape.hidden, config.compensation_rank
    if config.compensation == "mean":
        return Compensation(torch.zeros(hidden))
    return Compensation(torch.zeros(hidden), torch.zeros(rank, hidden), torch.zeros(hidden, rank))


def _write_gates(
    modules: dict[BranchKey, nn.Module], moments: dict[BranchKey, Moments], config: GateConfig
) -> dict[BranchKey, float]:
    r2: dict[BranchKey, float] = {}
    for gate, keys in _by_gate(modules).items():
        joint = moments[keys[0]]
        if len(keys) > 1:  # one gate for all layers
            joint = Moments(joint.xx.shape[0] - 1, 1, joint.device)
            for key in keys:
                joint.include(moments[key])
        m_F1, intercept = joint.solve(RIDGE)
        r2 |= {key: moments[key].r2(m_F1, intercept) for key in keys}
        centre = float(joint.mean_target()[0])
        write_score(gate, m_F1[:, 0], float(intercept[0]), centre, config.init_bias)
    return r2


def _by_gate(modules: dict[BranchKey, nn.Module]) -> dict[Gate, list[BranchKey]]:
    found: dict[Gate, list[BranchKey]] = {}
    for key, module in modules.items():
        found.setdefault(gate_of(module), []).append(key)
    return found


def write_score(
    gate: Gate, weight_H: torch.Tensor, intercept: float, centre: float, bias: float
) -> None:
    """Make the gate's score w·u + intercept, its logit bias + α·(score − centre).

    A gate with a head gets the score there, and keeps its own weights.
    """
    if gate.score_affine() is None:
        gate.set_head(weight_H.float(), intercept)
        return
    gate.set_direction((ALPHA * weight_H).float(), bias + ALPHA * (intercept - centre))
    with torch.no_grad():
        gate.score_scale.fill_(ALPHA)
        gate.score_shift.fill_(bias - ALPHA * centre)
