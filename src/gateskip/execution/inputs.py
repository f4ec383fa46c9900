"""What a decoder layer hands to its attention, whole or for some queries only.

Shapes: B rows, T new tokens, S keys, R and Tq the queries' grid, D head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from gateskip.execution.mask_rows import MaskRows, blocked
from gateskip.skipping.call import Call

__all__ = ["AttentionInputs", "flat_positions", "grid_of"]

CACHE_NAMES = ("cache", "past_key_values", "layer_past")


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionInputs:
    """Keyword arguments of one attention call, taken apart.

    Attributes:
        mask: what transformers made of the 2-D mask: None (plain causal), ``[B, 1, T, S]``, or for
            flex attention a BlockMask.
        cos_sin: rotary tables ``[B or 1, T, D]`` each, or None. new: T. dtype: of the stream.
        position_ids: ``[B or 1, T]`` or None.
        cache_name: the name under which the family passes the cache. cache: the real one.
        rest: everything else, passed on.
    """

    mask: Any
    cos_sin: tuple[Tensor, Tensor] | None
    new: int
    dtype: torch.dtype
    position_ids: Tensor | None
    cache_name: str
    cache: Any
    rest: dict[str, Any]

    @classmethod
    def of(cls, kwargs: dict[str, Any], hidden_states: Tensor) -> AttentionInputs:
        """Take a layer's keyword arguments apart."""
        kwargs = dict(kwargs)
        name = next((n for n in CACHE_NAMES if n in kwargs), CACHE_NAMES[0])
        return cls(
            mask=kwargs.pop("attention_mask", None),
            cos_sin=kwargs.pop("position_embeddings", None),
            new=hidden_states.shape[1],
            dtype=hidden_states.dtype,
            position_ids=kwargs.pop("position_ids", None),
            cache_name=name,
            cache=kwargs.pop(name, None),
            rest=kwargs,
        )

    def whole(self, cache: Any) -> dict[str, Any]:
        """Arguments for all tokens, with ``cache`` in place of the real one."""
        return self._with(self.mask, self.cos_sin, self.position_ids, cache)

    def _with(
        self, mask: Any, cos_sin: Any, position_ids: Tensor | None, cache: Any
    ) -> dict[str, Any]:
        tables = {} if cos_sin is None else {"position_embeddings": cos_sin}
        return {
            "attention_mask": mask,
            "position_ids": position_ids,
            self.cache_name: cache,
            **tables,
            **self.rest,
        }

    def tables(self, batch: int) -> tuple[Tensor, Tensor] | None:
        """cos and sin of every token, ``[B·T, D]``."""
        if self.cos_sin is None:
            return None
        cos, sin = (t.expand(batch, -1, -1).flatten(0, 1) for t in self.cos_sin)
        return cos, sin

    def queries(
        self, cache: Any, position_RT: Tensor, rows_R: Tensor | None, call: Call, layer_idx: int
    ) -> dict[str, Any]:
        """Arguments for the queries at ``position_RT`` among the new tokens of ``rows_R``.

        Args:
            cache: the writer. position_RT: int64 ``[R, Tq]``.
            rows_R: batch rows, or None for all. layer_idx: for the cache.
        """
        flat_RT = flat_positions(position_RT, rows_R, self.new)

        def pick(t: Tensor) -> Tensor:
            return rows_at(t, position_RT if t.shape[0] == 1 else flat_RT)

        ids = self.position_ids
        if ids is not None:
            ids = pick(ids[..., None])[..., 0]
        rows = self.mask_rows(call, layer_idx)
        mask: Any = None if rows is None else rows.select(flat_RT, rows.length)[:, None]
        if mask is not None and not isinstance(self.mask, Tensor | None):
            mask = blocked(mask)
        cos_sin = None if self.cos_sin is None else tuple(pick(t) for t in self.cos_sin)
        return self._with(mask, cos_sin, ids, cache)

    def flat_queries(self, cache: Any, kept_N: Tensor, batch: int) -> dict[str, Any]:
        """Arguments for the queries at flat indices ``kept_N`` as one sequence ``[1, N]``.

        The mask is left to :class:`~gateskip.execution.grid.GridAttention`.
        """
        tables = self.tables(batch)
        if tables is not None:
            tables = tuple(t.index_select(0, kept_N)[None] for t in tables)  # type: ignore[assignment]
        ids = self.position_ids
        if ids is not None:
            ids = ids.expand(batch, -1).reshape(1, -1).index_select(1, kept_N)
        return {"is_causal": False, **self._with(None, tables, ids, cache)}

    def mask_rows(self, call: Call, layer_idx: int) -> MaskRows | None:
        """The mask's rows, one object per call and kind of layer; None where all keys are seen.

        Ask before the cache is written: its answer on sizes changes with it.
        """
        new, length, offset = self.new, self.new, 0
        if self.cache is not None:
            length, offset = (int(n) for n in self.cache.get_mask_sizes(new, layer_idx))
        if self.mask is None and new == 1:
            return None
        key = (length, offset, id(self.mask))
        if key not in call.masks:
            # With the mask itself, whose id would else be another's.
            rows = MaskRows(
                self.mask, new=new, past=call.past, length=length, offset=offset,
                dtype=self.dtype, device=call.device, valid_BT=call.valid_BT,
            )  # fmt: skip
            call.masks[key] = (self.mask, rows)
        return call.masks[key][1]


def flat_positions(position_RT: Tensor, rows_R: Tensor | None, new: int) -> Tensor:
    """Indices into ``[B·T]`` of positions ``[R, Tq]`` of batch rows."""
    if rows_R is None:
        rows_R = torch.arange(position_RT.shape[0], device=position_RT.device)
    return position_RT + (rows_R * new)[:, None]


def rows_at(table_BTD: Tensor, flat_RT: Tensor) -> Tensor:
    """``[R, Tq, D]`` out of ``[B, T, D]``; a gather over the last axis is twenty times slower."""
    rows = table_BTD.reshape(-1, table_BTD.shape[-1]).index_select(0, flat_RT.reshape(-1))
    return rows.view(*flat_RT.shape, table_BTD.shape[-1])


def grid_of(keep_BT: Tensor, kept_N: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Lay kept tokens out as a rectangle for the attention.

    Args:
        keep_BT: bool. kept_N: its flat indices.

    Returns:
        (position_RT, rows_R, slots_N): positions of the queries; their batch rows (None: all);
        flat indices of the kept tokens in the ``[R, Tq]`` grid (None: all of the grid). Ragged rows
        are padded with skipped positions.
    """
    batch, new = keep_BT.shape
    if new == 1:
        return torch.zeros_like(kept_N)[:, None], kept_N, None
    if batch == 1:
        return kept_N[None], None, None
    counts = keep_BT.sum(1)
    longest = int(counts.max())
    order = torch.argsort(keep_BT.logical_not().to(torch.uint8), dim=1, stable=True)[:, :longest]
    real = torch.arange(longest, device=keep_BT.device) < counts[:, None]
    slots_N = None if bool(real.all()) else real.flatten().nonzero()[:, 0]
    return order, None, slots_N
