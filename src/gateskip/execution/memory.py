"""Where a cache keeps its keys and values, so that kernels may write the next token's in place.

Shapes: L layers, B rows, K key/value heads, C room for keys, D head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache, StaticLayer

__all__ = ["Memory", "leave_room", "memory_of", "realign", "rewind"]

ROOM = 32  # keys that a cache can grow by before it is copied, and a sixteenth of its length
ROOM_NAME = "_gateskip_room"


def memory_of(
    cache: Any, layers: int, shape: tuple[int, int, int], dtype: torch.dtype, new: int = 1
) -> Memory | None:
    """The cache's memory with free places, or None where it is not of a kind that can be shared.

    Args:
        shape: rows, key/value heads, head width. new: places wanted.
    """
    found: Memory | None = _Growing.of(cache, layers, shape, dtype, new)
    return found or _Fixed.of(cache, layers, shape, dtype, new)


def rewind(cache: Any, tokens: int, since: int = 0) -> None:
    """Drop the last tokens of a cache.

    Also to be called with 0 after a call whose tokens stay: caches of windows forget what left it.

    Args:
        since: tokens that the cache held when the caller began; what came later nobody else has
            seen, so its places may be written over without a copy.
    """
    cache.crop(-tokens)
    room: _Room | None = vars(cache).get(ROOM_NAME)
    if room is not None and room.owner == id(cache):
        length = cache.layers[0].keys.shape[2]
        if length >= since:
            room.written = length


def realign(cache: Any, right_B: list[int], drop: int, *, shared: bool) -> None:
    """Move every row by its own number of places, to the right (left where negative), then drop.

    So rows that keep fewer of their last tokens end where the others do. What moves in from
    outside is of no meaning, and for the mask to hide.

    Args:
        right_B: places for each row. drop: places that all lose at the right.
        shared: whether somebody may hold the cache's tensors, so that they have to be copied.
    """
    rows = [(row, by) for row, by in enumerate(right_B) if by]
    for part in cache.layers if rows else ():
        if shared and not isinstance(part, StaticLayer):
            part.keys, part.values = part.keys.clone(), part.values.clone()
        length = part.get_seq_length() if isinstance(part, StaticLayer) else part.keys.shape[2]
        for t in (part.keys, part.values):
            for row, by in rows:
                _move(t[row, :, : int(length)], by)
    rewind(cache, drop)


def _move(t_KSD: Tensor, right: int) -> None:
    if right > 0:
        t_KSD[:, right:] = t_KSD[:, :-right].clone()
    else:
        t_KSD[:, :right] = t_KSD[:, -right:].clone()


class Memory:
    """Where a cache keeps its keys and values.

    Attributes:
        addresses: int64 ``[L, 2]`` of the first key and value. strides: elements from a row, a head
            and a position to the next. length: tokens cached.
    """

    held: list[Any]
    addresses: Any
    strides: tuple[int, ...]
    length: int
    room: int

    def advance(self, new: int = 1) -> None:
        """Tell the cache that it holds ``new`` tokens more."""
        raise NotImplementedError


@dataclasses.dataclass(slots=True)
class _Room:
    """Buffers of one cache. Keys that somebody may still look at are not written over.

    Attributes:
        buffers: ``[2, B, K, C, D]`` of each layer, its own: a layer's old one is free before
            the next is copied, and no cache is there twice.
        owner: id of the cache; a copy of it, with the same tensors, gets buffers of its own.
        written: keys in them, those that were cropped since included.
    """

    buffers: list[Tensor]
    owner: int
    written: int

    def serves(self, cache: Any, layers: int, batch: int, length: int, new: int) -> bool:
        """Whether the cache's next keys may be written here."""
        return (
            self.owner == id(cache) and self.written == length and len(self.buffers) == layers
            and all(b.shape[1] == batch and b.shape[3] >= length + new for b in self.buffers)
        )  # fmt: skip


def leave_room(cache: Any, index: int, new: int) -> None:
    """After a layer's first tokens: its keys and values as views of a buffer that can grow.

    So decoding need not copy the whole cache at its first token. Does nothing for caches of other
    kinds, or that held tokens before.

    Args:
        index: the layer, in ascending order. new: tokens of the call.
    """
    if not _growing(cache) or index >= len(cache.layers):
        return
    part = cache.layers[index]
    if type(part) is not DynamicLayer or not part.is_initialized or part.keys.shape[2] != new:
        return
    room: _Room | None = vars(cache).get(ROOM_NAME)
    if index == 0:
        room = vars(cache)[ROOM_NAME] = _Room([], id(cache), new)
    if room is None or room.owner != id(cache) or len(room.buffers) != index:
        return
    if part.keys.shape == part.values.shape:
        room.buffers.append(_with_room(part, ROOM + new // 16))


def _with_room(part: Any, more: int) -> Tensor:
    """A buffer for ``more`` keys than there are, into which the layer's cache has moved."""
    batch, heads, length, width = part.keys.shape
    buffer: Tensor = part.keys.new_empty(2, batch, heads, length + more, width)
    seen = buffer[:, :, :, :length]
    seen[0] = part.keys
    seen[1] = part.values
    part.keys, part.values = seen.unbind()
    return buffer


class _Growing(Memory):
    """A ``DynamicCache`` as views of a buffer per layer, with free places."""

    def __init__(self, held: list[Any], shared: _Room) -> None:
        self.shared, self.held, self.length = shared, held, held[0].keys.shape[2]
        first = shared.buffers[0]
        self.room, self.strides = first.shape[3], first.stride()[1:4]
        step = first.stride(0) * first.element_size()
        starts = np.array([b.data_ptr() for b in shared.buffers], dtype=np.int64)
        self.addresses = starts[:, None] + np.array([0, step], dtype=np.int64)

    @classmethod
    def of(
        cls, cache: Any, layers: int, shape: tuple[int, int, int], dtype: torch.dtype, new: int
    ) -> _Growing | None:
        """Views of old buffers, or of new ones with the cache's contents."""
        if not _growing(cache) or not _uniform(cache.layers, layers, DynamicLayer):
            return None
        held = cache.layers
        batch, heads, width = shape
        length = held[0].keys.shape[2]
        full = (batch, heads, length, width)
        if length == 0 or any(
            part.keys.shape != full or part.values.shape != full or part.keys.dtype != dtype
            for part in held
        ):
            return None
        shared: _Room | None = vars(cache).get(ROOM_NAME)
        if shared is not None and shared.serves(cache, layers, batch, length, new):
            memory = cls(held, shared)
            if all(
                part.keys.data_ptr() == k and part.values.data_ptr() == v
                for part, (k, v) in zip(held, memory.addresses.tolist(), strict=True)
            ):
                return memory
        shared = vars(cache)[ROOM_NAME] = _Room([], id(cache), length)  # the old buffers go
        for part in held:
            shared.buffers.append(_with_room(part, max(ROOM, new) + length // 16))
        return cls(held, shared)

    def advance(self, new: int = 1) -> None:
        self.shared.written = self.length + new
        for part, buffer in zip(self.held, self.shared.buffers, strict=True):
            part.keys, part.values = buffer[:, :, :, : self.length + new].unbind()


def _growing(cache: Any) -> bool:
    return type(cache) is DynamicCache and not getattr(cache, "offloading", False)


class _Fixed(Memory):
    """A ``StaticCache``, in its own memory."""

    def __init__(self, held: list[Any], length: int) -> None:
        self.held, self.length, self.room = held, length, held[0].max_cache_len
        self.strides = tuple(held[0].keys.stride()[:3])
        pairs = [(part.keys.data_ptr(), part.values.data_ptr()) for part in held]
        self.addresses = np.array(pairs, dtype=np.int64)

    @classmethod
    def of(
        cls, cache: Any, layers: int, shape: tuple[int, int, int], dtype: torch.dtype, new: int
    ) -> _Fixed | None:
        """The cache's tensors, where all are alike and enough places are free."""
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
        return cls(held, length) if length + new <= held[0].max_cache_len else None

    def advance(self, new: int = 1) -> None:
        for part in self.held:
            part.cumulative_length.add_(new)


def _uniform(held: list[Any], layers: int, kind: Any) -> bool:
    """Whether every layer's cache is of one kind and in use."""
    return len(held) == layers and all(type(p) is kind and p.is_initialized for p in held)
