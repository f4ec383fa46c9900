"""What happens before a decoder call and around ``generate``."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gateskip.config import Budget, RowBudgets
from gateskip.errors import BudgetError, UnsupportedError
from gateskip.execution.head import head_forward
from gateskip.execution.inputs import CACHE_NAMES
from gateskip.execution.layer import layer_forward
from gateskip.execution.stack import LAST
from gateskip.execution.top_k_attention import TOP_K_ATTENTION, keys_kept
from gateskip.gates import Gate
from gateskip.retrofit.attach import Wiring
from gateskip.skipping.call import Call
from gateskip.skipping.state import Override, current, effective_budget, override, state_of

__all__ = ["THRESHOLDS", "WIRING"]

THRESHOLDS = "gateskip_thresholds"  # what a compiled forward is given instead of a budget

ATTENTION_BACKENDS = ("eager", "sdpa", "flex_attention", TOP_K_ATTENTION)


def check_backend(config: Any) -> None:
    """Raise UnsupportedError unless the attention back-end takes arbitrary mask rows."""
    name = getattr(config, "_attn_implementation", None)
    if name not in ATTENTION_BACKENDS:
        raise UnsupportedError(
            f"attn_implementation={name!r} does not take the mask rows of skipped queries here; "
            f"use {' or '.join(map(repr, ATTENTION_BACKENDS))}: "
            "model.set_attn_implementation('sdpa')."
        )


def _channels_alike(decoder: nn.Module) -> bool:
    return all(gate.one_logit() is not None for gate in decoder.modules() if isinstance(gate, Gate))


def decoder_hook(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of the decoder: reads the 2-D mask while there is one, makes the call."""
    state: Any = decoder._gateskip
    compiling = torch.compiler.is_compiling()
    if args:
        names = [n for n in inspect.signature(type(decoder).forward).parameters if n != "self"]
        kwargs = dict(zip(names, args, strict=False)) | kwargs
    check_backend(decoder.config)
    if kwargs.get("output_attentions") or getattr(decoder.config, "output_attentions", False):
        raise UnsupportedError(
            "output_attentions=True has no weights for skipped queries; leave it off, or call "
            "gateskip.detach(model) first."
        )
    routed = kwargs.get("output_router_logits")
    routed = getattr(decoder.config, "output_router_logits", False) if routed is None else routed
    if routed and not compiling and current(state).execution != "masked":
        raise UnsupportedError(
            "output_router_logits=True has no logits of tokens that skip their experts; use "
            "gateskip.execution(model, 'masked') around the call, or leave it off."
        )
    tokens = kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs["inputs_embeds"]
    cache = next((kwargs[n] for n in CACHE_NAMES if kwargs.get(n) is not None), None)
    if compiling:
        over, thresholds = Override(execution="masked"), kwargs.pop(THRESHOLDS, None)
        if thresholds is None or cache is not None:
            raise UnsupportedError(
                "torch.compile(model) would freeze the budget that it meets, and a cache's length; "
                "use gateskip.compile_masked(model), without a cache."
            )
        rows = dict(zip(state.branches, thresholds.split(1), strict=True))
        over = dataclasses.replace(over, thresholds=rows)
    else:
        over = current(state)
    call = Call(
        state,
        over,
        batch=tokens.shape[0],
        new=tokens.shape[1],
        past=int(cache.get_seq_length()) if cache is not None else 0,
        attention_mask=kwargs.get("attention_mask"),
        position_ids=kwargs.get("position_ids"),
        device=tokens.device,
        input_ids=kwargs.get("input_ids"),
        # Only a ledger asks; under a graph gates compute every channel.
        alike=not compiling
        and over.recorder is not None
        and not torch.is_grad_enabled()
        and _channels_alike(decoder),
    )
    if over.controller is not None and over.thresholds is None and call.forced is None:
        call.held = over.controller.begin(call, effective_budget(state), cache)
    LAST.stacked = False
    call.layers = list(getattr(decoder, state.family.layers))
    call.top_k = keys_kept(decoder.config)
    return (), kwargs | {"gateskip_call": call}


def generate(model: nn.Module, *args: Any, gateskip_budget: Any = None, **kwargs: Any) -> Any:
    """Hugging Face ``generate``; the budget is captured when it starts.

    Args:
        gateskip_budget: a Budget or ``{"keep": k}`` / ``{"compute": c}`` for this call, k or c one
            number or one for every row of the batch; None takes this thread's budget or the
            model's default.
    """
    state = state_of(model)
    budget = Budget.of(gateskip_budget) or effective_budget(state) or Budget(keep=1.0)
    state.resolve(budget)  # a bad budget must fail before any work
    prompts = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
    prompts = kwargs.get("inputs_embeds") if prompts is None else prompts
    if isinstance(budget, RowBudgets) and prompts is not None and len(budget.rows) != len(prompts):
        raise BudgetError(
            f"budget has {len(budget.rows)} rows, the prompts {len(prompts)}; give one number for "
            "every prompt."
        )
    if current(state).controller is not None and _beams(model, kwargs) > 1:
        raise UnsupportedError(
            "hold_budget keeps one offset per row, which beams exchange; use num_beams=1, or leave "
            "the block."
        )
    with override(state, budget=budget, generating=True):
        return type(model).generate(model, *args, **kwargs)  # type: ignore[attr-defined]


def _beams(model: nn.Module, given: Mapping[str, Any]) -> int:
    """Beams that ``generate`` will use."""
    configs = (given.get("generation_config"), getattr(model, "generation_config", None))
    found = [given.get("num_beams"), *(getattr(config, "num_beams", None) for config in configs)]
    return next((int(beams) for beams in found if beams is not None), 1)


def no_continuous_batching(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands in the place of ``init_continuous_batching``, which ``generate_batch`` calls.

    Raises:
        UnsupportedError: always. Its worker thread would only log what fails in it.
    """
    raise UnsupportedError(
        "continuous batching (generate_batch) keeps keys and values in pages, where those of "
        "skipped queries cannot be read back; use model.generate with padded batches, or call "
        "gateskip.detach(model) first."
    )


WIRING = Wiring(
    layer_forward=layer_forward, decoder_hook=decoder_hook, head_forward=head_forward,
    methods={"generate": generate, "init_continuous_batching": no_continuous_batching},
)  # fmt: skip
