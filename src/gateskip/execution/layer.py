"""The forward pass of one gated decoder layer, masked or compacted.

Shapes: B rows, T new tokens, N gathered tokens, R and Tq the attention's grid, H hidden.

Compacted: decide from the residual stream, gather the kept tokens, run the family's own modules on
them, scatter the results. Prefill gathers tokens, batched decoding gathers rows, batch-1 decoding
does not call the branch at all. Nothing falls back from one execution to the other.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from gateskip.errors import UnsupportedError
from gateskip.execution.attention_branch import attention_branch
from gateskip.execution.branch import Branch
from gateskip.execution.inputs import AttentionInputs
from gateskip.execution.mlp_branch import mlp_branch
from gateskip.execution.stack import leave_room_to_decode, takes_stack, token_stack
from gateskip.execution.token import token_layer
from gateskip.skipping.call import Call
from gateskip.skipping.join import gate_value

__all__ = ["layer_forward"]


def layer_forward(layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``forward`` of every gated layer; same signature and result as the family's own."""
    call = kwargs.pop("gateskip_call", None)
    if not isinstance(call, Call):
        raise UnsupportedError(
            "a gated decoder layer was called outside of its decoder; call the model, or "
            "gateskip.detach(model) first."
        )
    if args:
        base: Any = type(layer)._gateskip_base  # type: ignore[attr-defined]
        names = list(inspect.signature(base.forward).parameters)[2:]
        kwargs.update(zip(names, args, strict=False))
    place: Any = layer._gateskip_layer  # an attribute, since a graph cannot read vars()
    index: int = place[1]
    if hidden_states.device != call.device:
        call.move(hidden_states.device)
    h = None
    if index == 0 and takes_stack(call):
        h = token_stack(call.layers, call, hidden_states, kwargs)
        call.stacked = h is not None
    elif call.stacked:
        h = hidden_states
    if h is None and call.ungated:
        plain: Any = type(layer)._gateskip_base  # type: ignore[attr-defined]
        h = plain.forward(layer, hidden_states, **kwargs)
        leave_room_to_decode(layer, call, index, hidden_states, kwargs)
    if h is None and call.single and not call.masked:
        h = token_layer(layer, call, index, hidden_states, kwargs)
    if h is None:
        h = _layer(layer, call, index, hidden_states, kwargs)
        leave_room_to_decode(layer, call, index, hidden_states, kwargs)
    if index == call.state.shape.layers - 1:
        if call.recorder is not None:
            call.recorder.record(call)
            call.recorder = None  # recomputation must not count twice
        if call.held is not None:
            call.held.finish(call)
            call.held = None
    return h


def _layer(
    layer: nn.Module, call: Call, index: int, hidden_states: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    inputs = AttentionInputs.of(kwargs, hidden_states)
    attention, mlp = (Branch(layer, call, kind, index) for kind in ("attention", "mlp"))
    if call.state.config.placement == "layer" and attention.gate is not None:
        return _weighed(attention, mlp, hidden_states, inputs)
    return _branches(attention, mlp, hidden_states, inputs)


def _weighed(attention: Branch, mlp: Branch, h: Tensor, inputs: AttentionInputs) -> Tensor:
    """h + r · (layer(h) − h) (arXiv 2404.02258, eq. 1); who skips the layer stays as it is, or gets
    1 − r of what stands in for it (arXiv 2503.23798, section 3)."""
    out = _branches(attention, mlp, h, inputs)
    observer = attention.call.observer
    if observer is not None and observer.ungated:
        return out
    assert attention.gate is not None
    r = gate_value(attention.gate, attention.read(h))
    keep_BT = attention.call.keep.get(attention.key)
    if keep_BT is not None and attention.compensation is not None:
        r = torch.where(keep_BT[..., None], r, 1.0 - r)
    # In this order skipped tokens (out = h) and r = 1 lose nothing to rounding.
    return (out.float() + (r - 1.0) * (out.float() - h.float())).to(h.dtype)


def _branches(
    attention: Branch, mlp: Branch, hidden_states: Tensor, inputs: AttentionInputs
) -> Tensor:
    call = attention.call
    if call.state.family.is_parallel(attention.layer):
        return _parallel(attention, mlp, hidden_states, inputs)
    h = attention_branch(attention, hidden_states, hidden_states, inputs)
    # Masked execution owns nothing, and a graph cannot compare addresses.
    owned = not (call.masked or torch.is_grad_enabled())
    owned = owned and h.data_ptr() != hidden_states.data_ptr()
    return mlp_branch(mlp, h, h, owned=owned)


def _parallel(attention: Branch, mlp: Branch, h: Tensor, inputs: AttentionInputs) -> Tensor:
    """Both branches read the layer's input."""
    if not attention.family.sum_first:
        return mlp_branch(mlp, h, attention_branch(attention, h, h, inputs), owned=False)
    added = attention_branch(attention, h, torch.zeros_like(h), inputs)
    return mlp_branch(mlp, h, added, owned=False) + h
