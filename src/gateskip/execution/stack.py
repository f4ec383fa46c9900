"""One new token of every row through all layers in one kernel call (decoding).

Shapes: L layers, B rows, A query heads, K key/value heads, S cached keys, C room for keys, D head
width, H hidden.

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
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache, StaticLayer

from gateskip.config import BRANCH_KINDS
from gateskip.execution.inputs import CACHE_NAMES
from gateskip.execution.token import additive, layer_plans, record, takes_tokens
from gateskip.skipping.call import Call

__all__ = ["takes_stack", "token_stack"]

ROOM = 128  # keys that a cache can grow by before it is copied
ROWS = 32  # with more, products of matrices are faster than these kernels
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


def takes_stack(call: Call) -> bool:
    """Whether the call is one new token for each of a few rows."""
    few = call.new == 1 and call.batch <= ROWS and call.valid_BT is None
    return few and call.device.type == "cpu" and not call.masked


def token_stack(layers: list[nn.Module], call: Call, h_B1H: Tensor, kwargs: Any) -> Tensor | None:
    """The last layer's output for a token of each row, or None where layers run one by one."""
    cache = next((kwargs[n] for n in CACHE_NAMES if kwargs.get(n) is not None), None)
    if cache is None or not takes_tokens(call, layers[0], h_B1H):
        return None
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):
        return None
    table = _table(layers, call)
    if table is None or table.dtype != h_B1H.dtype:
        return None
    _, kv_heads, width = table.sizes
    shape = (call.batch, kv_heads, width)
    memory: _Memory | None = _Growing.of(cache, len(layers), shape, h_B1H.dtype)
    memory = memory or _Fixed.of(cache, len(layers), shape, h_B1H.dtype)
    if memory is None:
        return None
    return _run(table, call, h_B1H, kwargs, memory)


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


class _Memory:
    """Where a cache keeps its keys and values.

    Attributes:
        addresses: int64 ``[L, 2]`` of the first key and value. strides: elements from a row, a head
            and a position to the next. length: tokens cached.
    """

    addresses: Any
    strides: tuple[int, ...]
    length: int

    def advance(self) -> None:
        """Tell the cache that it holds one token more."""
        raise NotImplementedError


class _Growing(_Memory):
    """A ``DynamicCache`` as views of a buffer ``[L, 2, B, K, C, D]``, one free place at least."""

    def __init__(self, held: list[Any], room: Tensor) -> None:
        self.held, self.room, self.length = held, room, held[0].keys.shape[2]
        size, first = room.element_size(), room.data_ptr()
        ramp = np.arange(len(held), dtype=np.int64)[:, None] * (room.stride(0) * size)
        self.addresses = first + ramp + np.array([0, room.stride(1) * size], dtype=np.int64)
        self.strides = room.stride()[2:5]

    @classmethod
    def of(
        cls, cache: Any, layers: int, shape: tuple[int, int, int], dtype: torch.dtype
    ) -> _Growing | None:
        """Views of an old buffer, or of a new one with the cache's contents."""
        held = cache.layers
        if type(cache) is not DynamicCache or not _uniform(held, layers, DynamicLayer):
            return None
        batch, heads, width = shape
        length = held[0].keys.shape[2]
        full = (batch, heads, length, width)
        if length == 0 or any(
            part.keys.shape != full or part.values.shape != full or part.keys.dtype != dtype
            for part in held
        ):
            return None
        room: Tensor | None = vars(cache).get(ROOM_NAME)
        if room is not None and room.shape[4] > length and room.shape[2] == batch:
            memory = cls(held, room)
            if all(
                part.keys.data_ptr() == k and part.values.data_ptr() == v
                for part, (k, v) in zip(held, memory.addresses.tolist(), strict=True)
            ):
                return memory
        more = ROOM + length // 8
        room = torch.empty(layers, 2, batch, heads, length + more, width, dtype=dtype)
        for i, part in enumerate(held):
            room[i, 0, :, :, :length] = part.keys
            room[i, 1, :, :, :length] = part.values
            part.keys, part.values = room[i, :, :, :, :length].unbind()
        vars(cache)[ROOM_NAME] = room
        return cls(held, room)

    def advance(self) -> None:
        seen = self.room[:, :, :, :, : self.length + 1].unbind()
        for part, both in zip(self.held, seen, strict=True):
            part.keys, part.values = both.unbind()


class _Fixed(_Memory):
    """A ``StaticCache``, in its own memory."""

    def __init__(self, held: list[Any], length: int) -> None:
        self.held, self.length = held, length
        self.strides = tuple(held[0].keys.stride()[:3])
        pairs = [(part.keys.data_ptr(), part.values.data_ptr()) for part in held]
        self.addresses = np.array(pairs, dtype=np.int64)

    @classmethod
    def of(
        cls, cache: Any, layers: int, shape: tuple[int, int, int], dtype: torch.dtype
    ) -> _Fixed | None:
        """The cache's tensors, where all are alike and one place is free."""
        held = cache.layers
        if type(cache) is not StaticCache or not _uniform(held, layers, StaticLayer):
            return None
        batch, heads, width = shape
        full = (batch, heads, held[0].max_cache_len, width)
        if any(
            part.keys.shape != full or part.values.shape != full or part.keys.dtype != dtype
            or not part.keys.is_contiguous() or not part.values.is_contiguous()
            for part in held
        ):  # fmt: skip
            return None
        length = int(held[0].cumulative_length)
        return cls(held, length) if length < held[0].max_cache_len else None

    def advance(self) -> None:
        for part in self.held:
            part.cumulative_length.add_(1)


def _uniform(held: list[Any], layers: int, kind: Any) -> bool:
    """Whether every layer's cache is of one kind and in use."""
    return len(held) == layers and all(type(p) is kind and p.is_initialized for p in held)


def _thresholds(table: _Table, call: Call) -> Any:
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
        free[:, :, call.protected_BT[:, 0].numpy()] = -np.inf
        bits = free.view(np.int64)
    return bits


def _run(table: _Table, call: Call, h_B1H: Tensor, kwargs: Any, memory: _Memory) -> Tensor:
    from gateskip.kernels.pool import integers
    from gateskip.kernels.stack import CHUNK, STACK, WORDS

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
    buffer = torch.empty(sum(sizes.values()))
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
    STACK(h_B1H.dtype, integers(*(given[word] for word in WORDS)), work=table.inner)
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
