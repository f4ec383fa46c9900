"""What a decoder layer hands to its attention, whole or for some queries only.

Shapes: B rows, T new tokens, S keys, R and Tq the queries' grid, D head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from gateskip.errors import UnsupportedError
from gateskip.skipping.key_values import causal_rows

__all__ = ["AttentionInputs"]

CACHE_NAMES = ("cache", "past_key_values", "layer_past")


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionInputs:
    """Keyword arguments of one attention call, taken apart.

    Attributes:
        mask: what transformers made of the 2-D mask: None (plain causal) or ``[B, 1, T, S]``.
        cos_sin: rotary tables ``[B or 1, T, D]`` each.
        position_ids: ``[B or 1, T]`` or None.
        cache_name: the name under which the family passes the cache. cache: the real one.
        rest: everything else, passed on.
    """

    mask: Tensor | None
    cos_sin: tuple[Tensor, Tensor]
    position_ids: Tensor | None
    cache_name: str
    cache: Any
    rest: dict[str, Any]

    @classmethod
    def of(cls, kwargs: dict[str, Any]) -> AttentionInputs:
        """Take a layer's keyword arguments apart."""
        kwargs = dict(kwargs)
        name = next((n for n in CACHE_NAMES if n in kwargs), CACHE_NAMES[0])
        return cls(
            mask=kwargs.pop("attention_mask", None),
            cos_sin=kwargs.pop("position_embeddings"),
            position_ids=kwargs.pop("position_ids", None),
            cache_name=name,
            cache=kwargs.pop(name, None),
            rest=kwargs,
        )

    def whole(self, cache: Any) -> dict[str, Any]:
        """Arguments for all tokens, with ``cache`` in place of the real one."""
        return {
            "attention_mask": self.mask,
            "position_embeddings": self.cos_sin,
            "position_ids": self.position_ids,
            self.cache_name: cache,
            **self.rest,
        }

    def tables(self, batch: int) -> tuple[Tensor, Tensor]:
        """cos and sin of every token, ``[B·T, D]``."""
        cos, sin = (t.expand(batch, -1, -1).flatten(0, 1) for t in self.cos_sin)
        return cos, sin

    def queries(
        self, cache: Any, position_RT: Tensor, rows_R: Tensor | None, past: int, layer_idx: int
    ) -> dict[str, Any]:
        """Arguments for the queries at ``position_RT`` among the new tokens of ``rows_R``.

        Args:
            cache: the writer. position_RT: int64 ``[R, Tq]``.
            rows_R: batch rows, or None for all. past: cached tokens. layer_idx: for the cache.
        """
        flat_RT = flat_positions(position_RT, rows_R, self.cos_sin[0].shape[1])

        def pick(t: Tensor) -> Tensor:
            return rows_at(t, position_RT if t.shape[0] == 1 else flat_RT)

        ids = self.position_ids
        if ids is not None:
            ids = pick(ids[..., None])[..., 0]
        return {
            "attention_mask": self._mask_rows(position_RT, rows_R, past, layer_idx),
            "position_embeddings": (pick(self.cos_sin[0]), pick(self.cos_sin[1])),
            "position_ids": ids,
            self.cache_name: cache,
            **self.rest,
        }

    def _mask_rows(
        self, position_RT: Tensor, rows_R: Tensor | None, past: int, layer_idx: int
    ) -> Tensor | None:
        new = self.cos_sin[0].shape[1]
        if self.mask is None:
            if new == 1:
                return None
            length, offset = new, 0
            if self.cache is not None:
                length, offset = self.cache.get_mask_sizes(new, layer_idx)
            every = torch.arange(new, device=position_RT.device)[None]
            allowed_TS = causal_rows(every, past, int(length), int(offset))[0, 0]
            # Additive masks: PyTorch would turn a boolean one into this in every call.
            low = torch.finfo(self.cos_sin[0].dtype).min
            blank = torch.zeros(allowed_TS.shape, dtype=self.cos_sin[0].dtype, device=every.device)
            return rows_at(blank.masked_fill_(~allowed_TS, low)[None], position_RT)[:, None]
        mask = self.mask
        if mask.shape[1] != 1:
            raise UnsupportedError(f"attention_mask of shape {tuple(mask.shape)} differs by head.")
        flat_RT = position_RT
        if mask.shape[0] != 1:
            flat_RT = flat_positions(position_RT, rows_R, new)
        return rows_at(mask[:, 0], flat_RT)[:, None]


def flat_positions(position_RT: Tensor, rows_R: Tensor | None, new: int) -> Tensor:
    """Indices into ``[B·T]`` of positions ``[R, Tq]`` of batch rows."""
    if rows_R is None:
        rows_R = torch.arange(position_RT.shape[0], device=position_RT.device)
    return position_RT + (rows_R * new)[:, None]


def rows_at(table_BTD: Tensor, flat_RT: Tensor) -> Tensor:
    """``[R, Tq, D]`` out of ``[B, T, D]``; a gather over the last axis is twenty times slower."""
    rows = table_BTD.reshape(-1, table_BTD.shape[-1]).index_select(0, flat_RT.reshape(-1))
    return rows.view(*flat_RT.shape, table_BTD.shape[-1])


def grid_of(keep_BT: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Lay kept tokens out as a rectangle for the attention.

    Returns:
        (position_RT, rows_R, kept_N, slots_N): positions of the queries; their batch rows (None:
        all); flat indices of kept tokens in ``[B, T]``; flat indices of the same tokens in the
        ``[R, Tq]`` grid (None: all of the grid). Ragged rows are padded with skipped positions.
    """
    batch, new = keep_BT.shape
    kept_N = keep_BT.flatten().nonzero()[:, 0]
    if new == 1:
        return torch.zeros_like(kept_N)[:, None], kept_N, kept_N, None
    if batch == 1:
        return kept_N[None], None, kept_N, None
    counts = keep_BT.sum(1)
    longest = int(counts.max())
    order = torch.argsort(keep_BT.logical_not().to(torch.uint8), dim=1, stable=True)[:, :longest]
    real = torch.arange(longest, device=keep_BT.device) < counts[:, None]
    slots_N = None if bool(real.all()) else real.flatten().nonzero()[:, 0]
    return order, None, kept_N, slots_N
