"""One token through all layers in one kernel call (batch-1 decoding).

Shapes: L layers, K key/value heads, S cached keys, C room for keys, D head width, H hidden.

What Python does between kernels, and copying the cache to add a token to it, would take as long as
the kernels. So the layers' arguments are rows of one table, and the cache's tensors become views
of a buffer with room to grow. Where anything is not as expected, layers run one by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from gateskip.config import BRANCH_KINDS
from gateskip.execution.inputs import CACHE_NAMES
from gateskip.execution.token import (
    KEPT,
    OUT,
    SCRATCH,
    THRESHOLD,
    H,
    additive,
    layer_plans,
    record,
    takes_tokens,
)
from gateskip.skipping.call import Call

__all__ = ["token_stack"]

ROOM = 128  # keys that a cache can grow by before it is copied
ROOM_NAME = "_gateskip_room"


def _once(named: Iterable[tuple[Any, Any]]) -> list[Any]:
    return list(dict(named).values())


class _Table:
    """Arguments of all layers that stay the same from call to call.

    Attributes:
        template: int64 ``[L, 3, columns]``. sizes, inner: of every layer's branches.
        thresholds: a call's, and their bits ``[L, 2]``.
    """

    def __init__(self, triples: list[Any]) -> None:
        project, _, mlp = triples[0]
        self.dtype, self.sizes, self.inner = project.dtype, project.sizes, mlp.inner
        self.thresholds: tuple[Any, Any] = (None, None)
        plans = [plan for triple in triples for plan in triple]
        columns = max(len(plan.template) for plan in plans)
        self.template = np.zeros((len(triples), 3, columns), dtype=np.int64)
        for cells, plan in zip(self.template.reshape(-1, columns), plans, strict=True):
            cells[: len(plan.template)] = plan.template
        # Checked for every token, so each thing once, and in plain loops.
        self.gates = _once((id(p.gate), (p.gate, p.generation)) for p in plans)
        self.hooks = _once((id(hooks), hooks) for p in plans for hooks in p.hooks)
        self.members = _once(((id(m[0]), m[1]), m) for p in plans for m in p.members)
        self.tensors = _once((id(pair[0]), pair) for p in plans for pair in p.tensors)
        self.versions = _once((id(pair[0]), pair) for p in plans for pair in p.versions)

    def holds(self) -> bool:
        """Whether every address is still right and nobody listens."""
        for gate, generation in self.gates:
            if gate.generation != generation:
                return False
        for hooks in self.hooks:
            if hooks:
                return False
        for place, name, what in self.members:
            if place.get(name) is not what:
                return False
        for t, address in self.tensors:
            if t.data_ptr() != address:
                return False
        for t, version in self.versions:
            if t._version != version:
                return False
        return True


def token_stack(layers: list[nn.Module], call: Call, h_11H: Tensor, kwargs: Any) -> Tensor | None:
    """The last layer's output for one token, or None where layers have to run one by one."""
    cache = next((kwargs[n] for n in CACHE_NAMES if kwargs.get(n) is not None), None)
    if not takes_tokens(call, layers[0], h_11H) or type(cache) is not DynamicCache:
        return None
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):
        return None
    table = _table(layers, call)
    if table is None or table.dtype != h_11H.dtype:
        return None
    heads, kv_heads, width = table.sizes
    room = _room(cache, len(layers), kv_heads, width, h_11H.dtype)
    if room is None:
        return None
    return _run(table, call, h_11H, kwargs, cache, room, heads)


def _table(layers: list[nn.Module], call: Call) -> _Table | None:
    """The layers' plans as one table, made again when any of them no longer holds."""
    owner = vars(layers[0])
    known: _Table | None = owner.get("_gateskip_stack")
    if known is not None and len(known.template) == len(layers) and known.holds():
        return known
    owner.pop("_gateskip_stack", None)
    plans = []
    for layer in layers:
        found = layer_plans(layer, call.state.family)
        if found is None:
            return None
        plans.append(found)
    table = _Table(plans)
    if any(p[0].sizes != table.sizes or p[2].inner != table.inner for p in plans):
        return None
    owner["_gateskip_stack"] = table
    return table


def _room(cache: Any, layers: int, kv_heads: int, width: int, dtype: torch.dtype) -> Tensor | None:
    """A buffer ``[L, 2, K, C, D]`` that holds the cache's keys and values, one more at least."""
    held = cache.layers
    if len(held) != layers or any(type(part) is not DynamicLayer for part in held):
        return None
    first = held[0]
    if not first.is_initialized or first.keys is None or first.keys.numel() == 0:
        return None
    length = first.keys.shape[2]
    shape = (1, kv_heads, length, width)
    if any(
        part.keys.shape != shape or part.values.shape != shape or part.keys.dtype != dtype
        for part in held
    ):
        return None
    room: Tensor | None = vars(cache).get(ROOM_NAME)
    if room is not None and room.shape[3] > length:
        step = room.stride(0) * room.element_size()
        half = room.stride(1) * room.element_size()
        at = room.data_ptr()
        if all(
            part.keys.data_ptr() == at + i * step and part.values.data_ptr() == at + i * step + half
            for i, part in enumerate(held)
        ):
            return room
    more = ROOM + length // 8
    room = torch.empty(layers, 2, kv_heads, length + more, width, dtype=dtype)
    for i, part in enumerate(held):
        room[i, 0, :, :length] = part.keys[0]
        room[i, 1, :, :length] = part.values[0]
        part.keys, part.values = room[i, :, None, :, :length].unbind()
    vars(cache)[ROOM_NAME] = room
    return room


def _thresholds(table: _Table, call: Call) -> Any:
    """Bits of the float64 thresholds ``[L, 2]`` (attention, MLP)."""
    layers = len(table.template)
    if call.thresholds is None or call.protected_BT is not None:
        return np.full((layers, 2), -np.inf).view(np.int64)
    source, bits = table.thresholds
    if source is not call.thresholds:
        values = [[call.thresholds[i, kind] for kind in BRANCH_KINDS] for i in range(layers)]
        source, bits = call.thresholds, np.array(values, dtype=np.float64).view(np.int64)
        table.thresholds = (source, bits)
    return bits


def _run(
    table: _Table, call: Call, h_11H: Tensor, kwargs: Any, cache: Any, room: Tensor, heads: int
) -> Tensor:
    from gateskip.kernels.pool import integers
    from gateskip.kernels.token import STACK

    layers, _, _, capacity, width = room.shape
    length = cache.layers[0].keys.shape[2]
    hidden = h_11H.shape[-1]
    threads = max(torch.get_num_threads(), 1)
    cells = table.template.copy()
    between, x = torch.empty_like(h_11H), h_11H.clone()
    flags = np.zeros((layers, 2), dtype=np.int64)
    keys = length + 1
    sizes = (3 * hidden * threads, heads * width, heads * keys, heads * width, 2 * table.inner)
    buffer = torch.empty(sum(sizes))
    scratch, q, scores, attended, inner = (part.data_ptr() for part in buffer.split(sizes))
    cos, sin = (t.to(h_11H.dtype).contiguous() for t in kwargs["position_embeddings"])
    mask = kwargs.get("attention_mask")
    mask = None if mask is None else additive(mask[0, 0, -1])
    ramp = np.arange(layers, dtype=np.int64)
    cells[:, :2, H] = x.data_ptr()
    cells[:, :2, OUT] = between.data_ptr()
    cells[:, 2, H], cells[:, 2, OUT] = between.data_ptr(), x.data_ptr()
    cells[:, :, THRESHOLD] = _thresholds(table, call)[:, (0, 0, 1)]
    flag = flags.ctypes.data + 16 * ramp
    cells[:, 0, KEPT] = cells[:, 1, KEPT] = flag
    cells[:, 2, KEPT] = flag + 8
    cells[:, :, SCRATCH] = scratch
    size = room.element_size()
    k = room.data_ptr() + ramp * (room.stride(0) * size)
    v = k + room.stride(1) * size
    project, attend = cells[:, 0], cells[:, 1]
    project[:, 30], project[:, 31], project[:, 35] = cos.data_ptr(), sin.data_ptr(), q
    project[:, 36], project[:, 37] = k + length * width * size, v + length * width * size
    project[:, 38] = capacity * width
    attend[:, 22], attend[:, 23], attend[:, 24], attend[:, 25] = q, k, v, keys
    attend[:, 29] = attend[:, 31] = capacity * width
    attend[:, 30] = attend[:, 32] = width
    attend[:, 34] = 0 if mask is None else mask.data_ptr()
    attend[:, 35], attend[:, 36] = scores, attended
    cells[:, 2, 26] = inner
    arguments = integers(cells.ctypes.data, layers, cells.shape[2])
    STACK(h_11H.dtype, arguments, work=table.inner)
    for i, part in enumerate(cache.layers):
        part.keys, part.values = room[i, :, None, :, :keys].unbind()
    for i, (attention, mlp) in enumerate(flags.tolist()):
        record(call, (i, "attention"), bool(attention))
        record(call, (i, "mlp"), bool(mlp))
    return x
