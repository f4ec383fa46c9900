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

__all__ = ["Memory", "memory_of"]

ROOM = 32  # keys that a cache can grow by before it is copied, and a sixteenth of its length
ROOM_NAME = "_gateskip_room"


def memory_of(
    cache: Any, layers: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> Memory | None:
    """The cache's memory with a free place, or None where it is not of a kind that can be shared.

    Args:
        shape: rows, key/value heads, head width.
    """
    found: Memory | None = _Growing.of(cache, layers, shape, dtype)
    return found or _Fixed.of(cache, layers, shape, dtype)


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

    def advance(self) -> None:
        """Tell the cache that it holds one token more."""
        raise NotImplementedError


@dataclasses.dataclass(slots=True)
class _Room:
    """A buffer of one cache. Keys that somebody may still look at are not written over.

    Attributes:
        owner: id of the cache; a copy of it, with the same tensors, gets a buffer of its own.
        written: keys in it, those that were cropped since included.
    """

    buffer: Tensor
    owner: int
    written: int

    def serves(self, cache: Any, batch: int, length: int) -> bool:
        """Whether the cache's next key may be written here."""
        shape = self.buffer.shape
        return (
            self.owner == id(cache) and self.written == length
            and shape[4] > length and shape[2] == batch
        )  # fmt: skip


class _Growing(Memory):
    """A ``DynamicCache`` as views of a buffer ``[L, 2, B, K, C, D]``, one free place at least."""

    def __init__(self, held: list[Any], shared: _Room) -> None:
        room = shared.buffer
        self.shared, self.held, self.length = shared, held, held[0].keys.shape[2]
        self.room = room.shape[4]
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
        if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
            return None
        if not _uniform(held, layers, DynamicLayer):
            return None
        batch, heads, width = shape
        length = held[0].keys.shape[2]
        full = (batch, heads, length, width)
        if length == 0 or any(
            part.keys.shape != full or part.values.shape != full or part.keys.dtype != dtype
            for part in held
        ):
            return None
        shared: _Room | None = vars(cache).get(ROOM_NAME)
        if shared is not None and shared.serves(cache, batch, length):
            memory = cls(held, shared)
            if all(
                part.keys.data_ptr() == k and part.values.data_ptr() == v
                for part, (k, v) in zip(held, memory.addresses.tolist(), strict=True)
            ):
                return memory
        more = ROOM + length // 16
        room = held[0].keys.new_empty(layers, 2, batch, heads, length + more, width)
        for i, part in enumerate(held):
            room[i, 0, :, :, :length] = part.keys
            room[i, 1, :, :, :length] = part.values
            part.keys, part.values = room[i, :, :, :, :length].unbind()
        shared = vars(cache)[ROOM_NAME] = _Room(room, id(cache), length)
        return cls(held, shared)

    def advance(self) -> None:
        self.shared.written = self.length + 1
        seen = self.shared.buffer[:, :, :, :, : self.length + 1].unbind()
        for part, both in zip(self.held, seen, strict=True):
            part.keys, part.values = both.unbind()


class _Fixed(Memory):
    """A ``StaticCache``, in its own memory."""

    def __init__(self, held: list[Any], length: int) -> None:
        self.held, self.length, self.room = held, length, held[0].max_cache_len
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
