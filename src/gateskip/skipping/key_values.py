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
from torch.nn.functional import linear

from gateskip.retrofit.families import FamilySpec
from gateskip.retrofit.families.spec import sliceable

__all__ = ["CacheWriter", "absent", "flat_tokens", "project_kv"]


def project_kv(
    attention: Any, x_NH: Tensor, tables: tuple[Tensor, Tensor] | None, family: FamilySpec
) -> tuple[Tensor, Tensor]:
    """K and V ``[N, K, D]`` of tokens whose queries are not wanted, normed and turned.

    Args:
        x_NH: the attention's input. tables: cos and sin ``[N, D]``, if positions turn heads.
    """
    width: int = getattr(attention, family.head_dim)
    k_NE, v_NE = _projected(attention, x_NH, width, family)
    norm: Any = None if family.k_norm is None else getattr(attention, family.k_norm, None)
    # A norm's weight tells: one of a head (or one per head), or one of all heads together.
    together = norm is not None and norm.weight.dim() == 1 and norm.weight.numel() != width
    if together:
        k_NE = norm(k_NE)
    k_NKD, v_NKD = (t.unflatten(-1, (t.shape[-1] // width, width)) for t in (k_NE, v_NE))
    if norm is not None and not together:
        k_NKD = norm(k_NKD)
    turns = family.rotates is None or bool(getattr(attention, family.rotates))
    if family.rotary is not None and turns:
        assert tables is not None
        rotate = getattr(sys.modules[type(attention).__module__], family.rotary)
        # No query heads are turned: the token's query does not exist.
        _, k_NKD = rotate(k_NKD[:, :0], k_NKD, *tables, unsqueeze_dim=1)
    return k_NKD, v_NKD


def _projected(
    attention: Any, x_NH: Tensor, width: int, family: FamilySpec
) -> tuple[Tensor, Tensor]:
    """Keys and values ``[N, K·D]`` as the projections leave them."""
    if family.kv == "separate":
        return attention.k_proj(x_NH), attention.v_proj(x_NH)
    projection: nn.Module = getattr(attention, family.qkv)
    if family.kv == "interleaved":
        qkv = projection(x_NH).unflatten(-1, (-1, 3, width))
        return qkv[..., 1, :].flatten(-2), qkv[..., 2, :].flatten(-2)
    config: Any = attention.config
    begin = config.num_attention_heads * width
    if not sliceable(projection):  # quantised, or with LoRA: the ledger knows
        return projection(x_NH)[..., begin:].chunk(2, -1)
    weight: Any = projection.weight
    bias: Any = projection.bias
    bias = None if bias is None else bias[begin:]
    if isinstance(projection, nn.Linear):
        return linear(x_NH, weight[begin:], bias).chunk(2, -1)  # type: ignore[return-value]
    return linear(x_NH, weight[:, begin:].t(), bias).chunk(2, -1)  # type: ignore[return-value]


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


def absent(k_BKSD: Tensor) -> Tensor:
    """Keys of zeros, which no token has (``kv_source="none"``), bool ``[B, S]``."""
    return (k_BKSD == 0).all(-1).all(1)
