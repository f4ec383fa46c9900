"""One token at batch 1 through a layer on the CPU kernels.

Shapes: H hidden, A query heads, K key/value heads, D head width, S cached keys.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gateskip import kernels
from gateskip.config import LINEAR_IMPORTANCES, BranchKey
from gateskip.execution.inputs import CACHE_NAMES
from gateskip.execution.plan import Plan, layer_plans
from gateskip.kernels import scratch
from gateskip.skipping.call import Call
from gateskip.skipping.policy import OFF

__all__ = ["NO", "YES", "additive", "record", "takes_tokens", "token_layer"]

YES = torch.ones(1, 1, dtype=torch.bool)
NO = torch.zeros(1, 1, dtype=torch.bool)
NONE = torch.zeros(1, dtype=torch.int64)


# Positions in a template that change with every call.
H, OUT, THRESHOLD, KEPT, SCRATCH = 3, 4, 8, 10, 11


def takes_tokens(call: Call, layer: nn.Module, h_11H: Tensor) -> bool:
    """Whether the call decides and computes as the kernels do."""
    config = call.state.config
    return (
        call.forced is None
        and call.scores is None
        and config.kv_source == "project"
        and config.importance in LINEAR_IMPORTANCES
        and config.fusible
        and not layer.training
        and _attends_as_sdpa(getattr(layer, call.state.family.attention))
        and kernels.readable(h_11H)
    )


def _attends_as_sdpa(attention: nn.Module) -> bool:
    """Masks of other back-ends have another form; who changes it does so at any time."""
    return getattr(getattr(attention, "config", None), "_attn_implementation", None) == "sdpa"


def token_layer(
    layer: nn.Module, call: Call, index: int, h_11H: Tensor, kwargs: dict[str, Any]
) -> Tensor | None:
    """The layer's output for one token, or None where the kernels cannot stand in.

    Decisions are those of the reference; keys and values reach the cache as always.
    """
    if not takes_tokens(call, layer, h_11H) or (index, "attention") in call.keep:
        return None
    plans = layer_plans(layer, call.state.family)
    if plans is None or plans[0].dtype != h_11H.dtype or any(plan.quantised for plan in plans):
        return None
    project, attend, mlp = plans
    h = _attention(call, index, h_11H, kwargs, project, attend)
    return _mlp(call, index, h, mlp)


def _start(plan: Plan, call: Call, key: Any, h: Tensor) -> tuple[Any, Tensor, Any, Tensor]:
    """(arguments, out, kept flag, scratch) of one call."""
    from gateskip.kernels.pool import Ints

    threshold = -math.inf if call.thresholds is None else call.thresholds[key]
    if call.protected_BT is not None and threshold < OFF:
        threshold = -math.inf
    out = torch.empty_like(h)
    flag = np.zeros(1, dtype=np.int64)
    room = scratch(3 * plan.hidden * max(torch.get_num_threads(), 1))
    arguments: Ints = plan.template.copy()
    arguments[H], arguments[OUT] = h.data_ptr(), out.data_ptr()
    arguments[THRESHOLD] = kernels.real(threshold)
    arguments[KEPT], arguments[SCRATCH] = flag.ctypes.data, room.data_ptr()
    return arguments, out, flag, room


def _attention(
    call: Call,
    index: int,
    h: Tensor,
    kwargs: dict[str, Any],
    project: Plan,
    attend: Plan,
) -> Tensor:
    from gateskip.kernels.token import ATTEND, PROJECT

    key = (index, "attention")
    heads, kv, width = project.sizes
    arguments, out, flag, room = _start(project, call, key, h)
    cos, sin = (t.to(h.dtype).contiguous() for t in kwargs["position_embeddings"])
    q = scratch(heads * width)
    k, v = h.new_empty(2, 1, kv, 1, width).unbind()
    arguments[30], arguments[31] = cos.data_ptr(), sin.data_ptr()
    arguments[35], arguments[36], arguments[37] = q.data_ptr(), k.data_ptr(), v.data_ptr()
    PROJECT(h.dtype, arguments, work=heads + 2 * kv)
    kept = bool(flag[0])
    cache = next((kwargs[n] for n in CACHE_NAMES if kwargs.get(n) is not None), None)
    if cache is not None:
        k, v = cache.update(k, v, index)
    record(call, key, kept)
    if not kept:
        return out
    keys = k.shape[2]
    mask = kwargs.get("attention_mask")
    if mask is not None:
        mask = additive(mask[0, 0, -1])
    if k.stride(3) != 1 or v.stride(3) != 1:
        k, v = k.contiguous(), v.contiguous()
    more = scratch(heads * (keys + width))
    again = attend.template.copy()
    again[H], again[OUT] = h.data_ptr(), out.data_ptr()
    again[KEPT], again[SCRATCH] = flag.ctypes.data, room.data_ptr()
    again[22:26] = q.data_ptr(), k.data_ptr(), v.data_ptr(), keys
    again[29:33] = k.stride(1), k.stride(2), v.stride(1), v.stride(2)
    again[34] = 0 if mask is None else mask.data_ptr()
    again[35], again[36] = more.data_ptr(), more.data_ptr() + 4 * heads * keys
    ATTEND(h.dtype, again, work=heads)
    return out


def additive(mask: Tensor) -> Tensor:
    """A mask as float32 addends."""
    if mask.dtype == torch.bool:
        blank = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        return blank.masked_fill_(~mask, torch.finfo(torch.float32).min)
    return mask.float().contiguous()


def _mlp(call: Call, index: int, h: Tensor, plan: Plan) -> Tensor:
    from gateskip.kernels.token import MLP

    key = (index, "mlp")
    inner = plan.inner
    arguments, out, flag, _room = _start(plan, call, key, h)
    act = scratch(2 * inner)
    arguments[26] = act.data_ptr()
    MLP(h.dtype, arguments, work=inner)
    kept = bool(flag[0])
    record(call, key, kept)
    return out


def record(call: Call, key: BranchKey, kept: bool) -> None:
    """Note a decision as the reference does."""
    if call.thresholds is not None:
        call.keep[key] = YES if kept else NO
    if not kept:
        call.computed[key] = NONE
