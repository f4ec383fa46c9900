"""One new token of every row through all layers in one kernel call (decoding).

Shapes: L layers, B rows, A query heads, K key/value heads, S cached keys, C room for keys, D head
width, H hidden.

What Python does between kernels, and copying the cache to add a token to it, would take as long as
the kernels. So the layers' arguments are rows of one table, and the cache's tensors become views
of a buffer with room to grow. Where anything is not as expected, layers run one by one.
"""

from __future__ import annotations

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

__all__ = ["leave_room_to_decode", "takes_stack", "token_stack"]

ROWS = 32  # with more, products of matrices are faster than these kernels


def takes_stack(call: Call) -> bool:
    """Whether the call is one new token for each of a few rows."""
    few = call.new == 1 and call.batch <= ROWS and call.valid_BT is None
    return few and call.device.type in ("cpu", "cuda") and not call.masked


def token_stack(layers: list[nn.Module], call: Call, h_B1H: Tensor, kwargs: Any) -> Tensor | None:
    """The last layer's output for a token of each row, or None where layers run one by one."""
    cache = next((kwargs[n] for n in CACHE_NAMES if kwargs.get(n) is not None), None)
    if cache is None or not takes_tokens(call, layers[0], h_B1H):
        return None
    if any(listened(layer) for layer in layers):
        return None
    if not _one_mask(layers[0], call.state.family):
        return None
    table = all_plans(layers, call.state.family)
    if table is None or table.dtype != h_B1H.dtype:
        return None
    _, kv_heads, width = table.sizes
    shape = (call.batch, kv_heads, width)
    memory = memory_of(cache, len(layers), shape, h_B1H.dtype)
    if memory is None:
        return None
    if table.backend == "triton":
        from gateskip.execution.gpu_stack import run_on_gpu

        return run_on_gpu(table, call, h_B1H, kwargs, memory)
    return _run(table, call, h_B1H, kwargs, memory)


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
    """Bits of the float64 thresholds ``[L, 2, B or 1]`` (attention, MLP)."""
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
    if call.protected_BT is not None:
        free = np.broadcast_to(bits.view(np.float64), (layers, 2, call.batch)).copy()
        protected = call.protected_BT[:, 0].numpy() & (free < OFF)
        free[protected] = -np.inf
        bits = free.view(np.int64)
    return bits


def _run(table: Plans, call: Call, h_B1H: Tensor, kwargs: Any, memory: Memory) -> Tensor:
    from gateskip.kernels.pool import integers
    from gateskip.kernels.stack import CHUNK, STACK, STACK_I8, WORDS

    layers, batch, hidden = len(table.template), call.batch, h_B1H.shape[-1]
    heads, _, width = table.sizes
    keys = memory.length + 1
    threads = max(torch.get_num_threads(), 1)
    x, between = h_B1H.clone(), torch.empty_like(h_B1H)
    flags = np.zeros((layers, 2, batch), dtype=np.int64)
    thresholds = _thresholds(table, call)
    y_stride = batch * max(width, 2 * CHUNK)
    sizes = {
        "u": batch * hidden, "v": batch * hidden, "g": batch, "q": batch * heads * width,
        "scores": threads * keys, "attended": batch * heads * width, "act": batch * table.inner,
        "y": threads * y_stride,
    }  # fmt: skip
    buffer = scratch(sum(sizes.values()))
    parts = buffer.split(list(sizes.values()))
    lists = np.empty((threads, 2, batch), dtype=np.int64)
    cos, sin = (t.to(h_B1H.dtype).contiguous() for t in kwargs["position_embeddings"])
    mask = kwargs.get("attention_mask")
    mask = None if mask is None else additive(mask[:, 0, -1, :keys])
    row, head, key = memory.strides
    given = {
        "table": table.template.ctypes.data, "layers": layers, "columns": table.template.shape[2],
        "rows": batch, "x": x.data_ptr(), "between": between.data_ptr(),
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
    kernel(h_B1H.dtype, integers(*(given[word] for word in WORDS)), work=table.inner)
    memory.advance()
    kept = torch.from_numpy(flags)
    if batch == 1:
        for i, (attention, mlp) in enumerate(flags[:, :, 0].tolist()):
            record(call, (i, "attention"), bool(attention))
            record(call, (i, "mlp"), bool(mlp))
        return x
    for i in range(layers):
        for j, kind in enumerate(BRANCH_KINDS):
            if call.thresholds is not None:
                call.keep[i, kind] = kept[i, j, :, None].bool()
            call.computed[i, kind] = kept[i, j]
    return x
