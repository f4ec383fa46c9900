"""Public entry points around a gated model: attach, detach, budgets, trace, execution."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from gateskip.config import Budget, GateConfig
from gateskip.errors import UnsupportedError
from gateskip.execution.hooks import WIRING, check_backend
from gateskip.retrofit.attach import (
    find_family,
    head_of,
    inner_model,
    install,
    layers_of,
    resume,
    suspend,
    uninstall,
)
from gateskip.retrofit.fingerprint import fingerprint
from gateskip.skipping.controller import BudgetController
from gateskip.skipping.ledger import Trace
from gateskip.skipping.state import GateSkipState, check_execution, override, state_of

__all__ = ["attach", "budget", "dense", "detach", "execution", "set_budget", "trace"]

M = TypeVar("M", bound=nn.Module)


def attach(model: M, config: GateConfig | None = None) -> M:
    """Give every branch of a Hugging Face causal LM a gate, in place.

    Args:
        model: a supported ``...ForCausalLM``, or PEFT's wrapper of one, whose base is gated.
        config: gate options; the defaults are low-rank gates of rank 16.

    Returns:
        The same object. Its class, its base parameter names and its ``generate`` stay usable.

    Raises:
        UnsupportedError: unknown architecture or attention back-end.
        AttachError: gated already. The model is left as it was after any error.
    """
    _attach(inner_model(model), config or GateConfig())
    return model


def _attach(model: nn.Module, config: GateConfig) -> None:
    hf_config: Any = getattr(model, "config", None)
    family = find_family(hf_config)
    if not hasattr(model, "generate") or head_of(model) is None:
        raise UnsupportedError(
            f"{type(model).__name__} is not a causal language model; load it with "
            "AutoModelForCausalLM."
        )
    check_backend(hf_config)
    shape = family.shape(model)
    if config.kind == "grouped" and config.groups is None:
        config = dataclasses.replace(config, groups=shape.heads)
    state = GateSkipState(config, family, shape)
    state.sources = family.sources(layers_of(model, family))
    state.base = fingerprint(model)
    install(model, family, config, state, WIRING)
    earlier = vars(model).pop("_gateskip_tuned", None)
    if earlier is not None:
        state.tuned, state.backbone_trained, state.base = earlier


def detach(model: M) -> M:
    """Take gates and layer subclasses out again; the model is bit for bit what it was.

    What training changed in the backbone stays, and is saved again once gates are attached.

    Raises:
        AttachError: the model is not gated.
    """
    state, inner = state_of(model), inner_model(model)
    uninstall(inner, state.family, WIRING)
    if state.tuned or state.backbone_trained:
        vars(inner)["_gateskip_tuned"] = (state.tuned, state.backbone_trained, state.base)
    return model


def set_budget(
    model: nn.Module,
    *,
    keep: float | None = None,
    compute: float | None = None,
    latency: float | None = None,
    workload: tuple[int, int] | None = None,
) -> None:
    """Set the model's default budget: exactly one of ``keep``, ``compute`` and ``latency``.

    Args:
        keep: share of token×branch pairs computed, in (0, 1].
        compute: share of dense decoder MACs spent, net of gates, in (0, 1].
        latency: share of the dense model's time, in (0, 1], as ``measure_latency`` found it on this
            machine; everything is kept where that is fast enough.
        workload: (prompt tokens, new tokens) of the requests that ``compute`` or ``latency`` is
            about; ``(512, 0)`` is prefill alone. None: the lengths that were calibrated or timed.

    Raises:
        BudgetError: out of range, several or none, below the floor, not calibrated, or not
            measured on this machine.
    """
    state = state_of(model)
    chosen = Budget(keep=keep, compute=compute, latency=latency, workload=workload)
    state.resolve(chosen)
    state.default_budget = chosen


@contextlib.contextmanager
def budget(
    model: nn.Module,
    *,
    keep: float | Sequence[float] | Tensor | None = None,
    compute: float | Sequence[float] | Tensor | None = None,
    latency: float | Sequence[float] | Tensor | None = None,
    workload: tuple[int, int] | None = None,
) -> Iterator[None]:
    """Use a budget within the block, for this thread and context only.

    Args:
        keep, compute, latency: as in :func:`set_budget`, or one number for every row of the batch
            (a list, or a tensor ``[B]``). workload: as there.

    Raises:
        BudgetError: as :func:`set_budget`; in a call whose batch has another number of rows.
    """
    state = state_of(model)
    chosen = Budget.of({"keep": keep, "compute": compute, "latency": latency, "workload": workload})
    state.resolve(chosen)
    with override(state, budget=chosen):
        yield


@contextlib.contextmanager
def hold_budget(model: nn.Module, *, gain: float = 0.05) -> Iterator[BudgetController]:
    """Hold the budget in every request within the block, whatever the text, for this thread.

    Every branch moves its threshold after each token of a row, so that it keeps the share that its
    calibration promised even where text is of another kind. Decisions stay causal and alike in
    prefill and decoding. Off by default: a share held where text asks for another costs quality.

    Args:
        gain: how far a threshold moves after one token, in units of the branch's range; larger
            holds sooner, and ranks tokens less well.

    Raises:
        ConfigError: gain out of (0, 1]. UnsupportedError: in a call, for beams, caches that were
            begun outside, or on a GPU. BudgetError: thresholds of an older version.
    """
    with override(state_of(model), controller=BudgetController(gain)) as held:
        yield held.controller


@contextlib.contextmanager
def trace(model: nn.Module) -> Iterator[Trace]:
    """Record decisions and costs of all calls within the block, in this thread."""
    recorder = Trace()
    with override(state_of(model), recorder=recorder):
        yield recorder


@contextlib.contextmanager
def execution(model: nn.Module, mode: str) -> Iterator[None]:
    """Run ``"masked"`` (the reference) or ``"compacted"`` within the block, in this thread.

    Raises:
        ConfigError: another mode.
    """
    check_execution(mode)
    with override(state_of(model), execution=mode):
        yield


@contextlib.contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Run as the dense Hugging Face model within the block: the same weights, no gates.

    For all threads, since the layers' classes change.
    """
    state, inner = state_of(model), inner_model(model)
    kept = suspend(inner, state.family, WIRING)
    try:
        yield
    finally:
        resume(inner, state.family, WIRING, kept)
