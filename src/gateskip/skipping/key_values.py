"""Keys and values of skipped tokens: where they come from and how they reach the cache.

Shapes: B rows, T new tokens, N gathered tokens, K key/value heads, D head width.

The family's own attention runs on kept tokens only, with a :class:`CacheWriter` in place of its
cache: ``update`` scatters kept K/V into the full K/V, fills skipped positions from the source,
writes all of it to the real cache and hands the full K/V back.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

__all__ = ["CacheWriter", "project_kv"]


def project_kv(
    attention: nn.Module, u_NH: Tensor, cos_ND: Tensor, sin_ND: Tensor, k_norm: str | None
) -> tuple[Tensor, Tensor]:
    """K and V ``[N, K, D]`` of tokens with separate k and v projections, rotary applied."""
    width: int = attention.head_dim  # type: ignore[assignment]
    k_NE: Tensor = attention.k_proj(u_NH)  # type: ignore[operator]
    v_NE: Tensor = attention.v_proj(u_NH)  # type: ignore[operator]
    k_NKD, v_NKD = (t.unflatten(-1, (t.shape[-1] // width, width)) for t in (k_NE, v_NE))
    if k_norm is not None:
        k_NKD = getattr(attention, k_norm)(k_NKD)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    # No query heads are rotated: the token's query does not exist.
    _, k_NKD = rotate(k_NKD[:, :0], k_NKD, cos_ND, sin_ND, unsqueeze_dim=1)
    return k_NKD, v_NKD


class CacheWriter:
    """Stands in for the cache inside one attention call.

    Args:
        cache: the real cache, or None without one.
        batch, new: B and T.
        kept_N: flat indices (row·T + position) of the tokens that the attention is given, or
            None when it is given all of them, in order.
        slots_N: flat indices of the same tokens in the attention's own ``[R, Tq]`` grid, or None
            when all of the grid is real.
        fill_N: flat indices of skipped tokens. fill: their K and V ``[N, K, D]``.
        rows_R: batch rows that the attention is given, or None for all.
    """

    def __init__(
        self,
        cache: Any,
        batch: int,
        new: int,
        *,
        kept_N: Tensor | None = None,
        slots_N: Tensor | None = None,
        fill_N: Tensor | None = None,
        fill: tuple[Tensor, Tensor] | None = None,
        rows_R: Tensor | None = None,
    ) -> None:
        self.cache, self.batch, self.new = cache, batch, new
        self.kept_N, self.slots_N, self.rows_R = kept_N, slots_N, rows_R
        self.fill_N, self.fill = fill_N, fill
        self.written: tuple[Tensor, Tensor] | None = None

    def _full(self, new_RKTD: Tensor | None, which: int) -> Tensor:
        """``[B, K, T, D]`` of all new tokens."""
        if new_RKTD is not None and self.kept_N is None and self.fill_N is None:
            return new_RKTD
        if new_RKTD is not None:
            flat = new_RKTD.transpose(1, 2).flatten(0, 1)  # [R·Tq, K, D]
            if self.slots_N is not None:
                flat = flat[self.slots_N]
            tail, like = flat.shape[1:], flat
        else:
            assert self.fill is not None
            flat, like = None, self.fill[which]
            tail = like.shape[1:]
        total = self.batch * self.new
        given = sum(0 if i is None else i.shape[0] for i in (self.kept_N, self.fill_N))
        # Padding is in neither; whatever stands there is masked, but must be finite.
        full = (like.new_empty if given == total else like.new_zeros)(total, *tail)
        if flat is not None:
            if self.kept_N is None:
                full = flat
            else:
                full = full.index_copy_(0, self.kept_N, flat)
        if self.fill_N is not None and self.fill is not None:
            full = full.index_copy_(0, self.fill_N, self.fill[which].to(full.dtype))
        return full.view(self.batch, self.new, *tail).transpose(1, 2)

    def update(
        self,
        key_states: Tensor | None,
        value_states: Tensor | None,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Write all new tokens' K/V; returns cached and new K/V of the attention's rows."""
        k, v = self._full(key_states, 0), self._full(value_states, 1)
        self.written = (k, v)
        if self.cache is not None:
            k, v = self.cache.update(k, v, layer_idx, *args, **kwargs)
        if self.rows_R is not None and self.rows_R.shape[0] != self.batch:
            k, v = k[self.rows_R], v[self.rows_R]
        return k, v


def flat_tokens(kv_BKTD: Tensor, index_N: Tensor) -> Tensor:
    """Rows ``[N, K, D]`` of flat token indices out of ``[B, K, T, D]``."""
    return kv_BKTD.transpose(1, 2).flatten(0, 1).index_select(0, index_N)
