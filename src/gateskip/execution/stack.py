"""A few new tokens of every row through all layers in one kernel call (decoding, checking drafts).

Shapes: L layers, B rows, T new tokens, R = B·T, A query heads, K key/value heads, S cached keys, C
room for keys, D head width, H hidden.

What Python does between kernels, and copying the cache to add a token to it, would take as long as
the kernels. So the layers' arguments are rows of one table, and the cache's tensors become views
of a buffer with room to grow. Where anything is not as expected, layers run one by one.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gateskip.config import BRANCH_KINDS
from gateskip.execution.inputs import CACHE_NAMES
from gateskip.execution.memory import Memory, leave_room, memory_of
from gateskip.execution.plan import Plans, all_plans, layer_plans
from gateskip.execution.token import additive, record, takes_tokens
from gateskip.kernels import scratch
from gateskip.retrofit.families import FamilySpec
from gateskip.retrofit.listeners import listened
from gateskip.skipping.call import Call
from gateskip.skipping.policy import OFF

__all__ = ["LAST", "leave_room_to_decode", "takes_stack", "token_stack"]


class _Last(threading.local):
    """Whether the thread's last call of a decoder ran here, for the LM head that follows it."""

    stacked = False


LAST = _Last()
ROWS = 32  # tokens; with more, products of matrices are faster than these kernels


def takes_stack(call: Call) -> bool:
    """Whether the call is a few new tokens after cached ones; one of each row on a GPU."""
    if call.device.type == "cpu":
        few = call.batch * call.new <= ROWS and (call.new == 1 or call.past > 0)
    else:
        few = call.device.type == "cuda" and call.new == 1 and call.batch <= ROWS
    scanned = call.held is not None and call.new > 1  # thresholds move from token to token
    return few and call.valid_BT is None and not (call.masked or scanned)


def token_stack(layers: list[nn.Module], call: Call, h_BTH: Tensor, kwargs: Any) -> Tensor | None:
    """The last layer's output for new tokens of each row, or None where layers run one by one."""
    cache = next((kwargs[n] for n in CACHE_NAMES if kwargs.get(n) is not None), None)
    if cache is None or not takes_tokens(call, layers[0], h_BTH):
        return None
    if any(listened(layer) for layer in layers):
        return None
    if not _one_mask(layers[0], call.state.family):
        return None
    table = all_plans(layers, call.state.family)
    if table is None or table.dtype != h_BTH.dtype:
        return None
    if table.backend == "triton" and (call.new > 1 or call.ungated):
        return None
    _, kv_heads, width = table.sizes
    shape = (call.batch, kv_heads, width)
    memory = memory_of(cache, len(layers), shape, h_BTH.dtype, call.new)
    if memory is None:
        return None
    if table.backend == "triton":
        from gateskip.execution.gpu_stack import run_on_gpu

        return run_on_gpu(table, call, h_BTH, kwargs, memory)
    return _run(table, call, h_BTH, kwargs, memory)


def leave_room_to_decode(layer: nn.Module, call: Call, index: int, h: Tensor, kwargs: Any) -> None:
    """After a layer of a prefill: let its cache grow, where decoding will use these kernels."""
    if call.new == 1 or call.batch > ROWS or call.masked or torch.is_grad_enabled():
        return
    cache = next((kwargs[n] for n in CACHE_NAMES if kwargs.get(n) is not None), None)
    if cache is None or not takes_tokens(call, layer, h[:, :1].contiguous()):
        return
    if _one_mask(layer, call.state.family) and layer_plans(layer, call.state.family) is not None:
        leave_room(cache, index, call.new)


def _one_mask(layer: nn.Module, family: FamilySpec) -> bool:
    """Whether all layers see the same keys."""
    config: Any = getattr(layer, family.attention).config
    return len(set(getattr(config, "layer_types", None) or ())) <= 1


def _thresholds(table: Plans, call: Call) -> Any:
    """Bits of the float64 thresholds ``[L, 2, R or 1]`` (attention, MLP)."""
    layers = len(table.template)
    if call.thresholds is None:
        return np.full((layers, 2, 1), -np.inf).view(np.int64)
    source, bits = table.thresholds
    if source is not call.thresholds:
        values = np.array([
            [np.reshape(np.asarray(call.thresholds[i, kind]), -1) for kind in BRANCH_KINDS]
            for i in range(layers)
        ], dtype=np.float64)  # fmt: skip
        source, bits = call.thresholds, values.view(np.int64)
        table.thresholds = (source, bits)
    if bits.shape[2] > 1 and call.new > 1:  # of rows
        bits = bits.repeat(call.new, axis=2)
    if call.protected_BT is not None:
        shape = (layers, 2, call.batch * call.new)
        free = np.broadcast_to(bits.view(np.float64), shape).copy()
        protected = call.protected_BT.flatten().numpy() & (free < OFF)
        free[protected] = -np.inf
        bits = free.view(np.int64)
    return bits


def _by_token(t: Tensor, batch: int) -> Tensor:
    """``[B or 1, T, D]`` as ``[R, D]``, or as ``[1, D]`` where all tokens share one row."""
    if t.shape[0] != batch and t.shape[1] > 1:
        t = t.expand(batch, -1, -1)
    return t.reshape(-1, t.shape[-1]).contiguous()


def _run(table: Plans, call: Call, h_BTH: Tensor, kwargs: Any, memory: Memory) -> Tensor:
    from gateskip.kernels.pool import integers
    from gateskip.kernels.stack import CHUNK, STACK, STACK_I8, WORDS

    template = table.ungated() if call.ungated else table.template
    layers, batch, new, hidden = len(template), call.batch, call.new, h_BTH.shape[-1]
    rows = batch * new
    heads, _, width = table.sizes
    keys = memory.length + new
    threads = max(torch.get_num_threads(), 1)
    x, between = h_BTH.clone(), torch.empty_like(h_BTH)
    flags = np.zeros((layers, 2, rows), dtype=np.int64)
    thresholds = _thresholds(table, call)
    y_stride = rows * max(width, 2 * CHUNK)
    sizes = {
        "u": rows * hidden, "v": rows * hidden, "g": rows, "q": rows * heads * width,
        "scores": threads * keys, "attended": rows * heads * width, "act": rows * table.inner,
        "y": threads * y_stride,
    }  # fmt: skip
    buffer = scratch(sum(sizes.values()))
    parts = buffer.split(list(sizes.values()))
    lists = np.empty((threads, 2, rows), dtype=np.int64)
    cos, sin = (_by_token(t.to(h_BTH.dtype), batch) for t in kwargs["position_embeddings"])
    mask = kwargs.get("attention_mask")
    mask = None if mask is None else additive(_by_token(mask[:, 0, -new:, :keys], batch))
    row, head, key = memory.strides
    given = {
        "table": template.ctypes.data, "layers": layers, "columns": template.shape[2],
        "rows": rows, "new": new, "x": x.data_ptr(), "between": between.data_ptr(),
        "flags": flags.ctypes.data, "thresholds": thresholds.ctypes.data,
        "threshold_stride": int(thresholds.shape[2] > 1), "y_stride": y_stride,
        "lists": lists.ctypes.data, "cos": cos.data_ptr(), "sin": sin.data_ptr(),
        "table_stride": width if cos.shape[0] > 1 else 0, "cache": memory.addresses.ctypes.data,
        "row_stride": row, "head_stride": head, "key_stride": key, "place": memory.length,
        "mask": 0 if mask is None else mask.data_ptr(),
        "mask_stride": keys if mask is not None and mask.shape[0] > 1 else 0,
        **{name: part.data_ptr() for name, part in zip(sizes, parts, strict=True)},
    }  # fmt: skip
    kernel = STACK_I8 if table.quantised else STACK
    kernel(h_BTH.dtype, integers(*(given[word] for word in WORDS)), work=table.inner)
    memory.advance(new)
    LAST.stacked = True
    if call.recorder is None and call.held is None:
        return x  # nobody asks
    kept = torch.from_numpy(flags)
    if rows == 1:
        for i, (attention, mlp) in enumerate(flags[:, :, 0].tolist()):
            record(call, (i, "attention"), bool(attention))
            record(call, (i, "mlp"), bool(mlp))
        return x
    kept = kept.view(layers, 2, batch, new)
    bools, sums = kept.bool(), kept.sum(3)
    for i in range(layers):
        for j, kind in enumerate(BRANCH_KINDS):
            if call.thresholds is not None:
                call.keep[i, kind] = bools[i, j]
            call.computed[i, kind] = sums[i, j]
    return x
