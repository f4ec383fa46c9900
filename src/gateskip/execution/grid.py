"""Attention of kept tokens only, laid out for the attention function.

Shapes: B batch rows, T new tokens, S keys, N kept tokens of all rows one after the other, L the
longest row, D head width, A query heads.

The attention module is given the kept tokens as one sequence ``[1, N]``, so that its projections
compute nothing for ragged padding. Row, position and causality are known only here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from gateskip.errors import UnsupportedError
from gateskip.execution.mask_rows import MaskRows
from gateskip.execution.trained_attention import attend_causally, takes_blocks
from gateskip.skipping.key_values import absent

__all__ = ["Grid", "GridAttention", "attend_rows"]

#: Queries per causal block: keys beyond a block's last query are not computed. Smaller blocks save
#: more of the rectangle and cost more calls; 16-bit products are too fast for the smallest.
BLOCK = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}
#: Likewise where two heads share keys, and where more do, whose queries are rows of one product
#: (see `attend_rows`).
GROUPED = (96, 64)
GPU_BLOCK = 2048  # queries: a launch costs more there than a rectangle's other half
GPU_FULL = 0.15  # likewise: kernels that know causality are several times faster than masks
#: Longest row, as a share of all tokens, from which on a full grid under plain causality is faster
#: than mask rows (projections of skipped tokens are not computed either way).
FULL = {torch.float32: 0.97, torch.bfloat16: 0.8, torch.float16: 0.8}


class Grid:
    """Where the kept tokens of a batch stand in ``[B, L]``.

    Args:
        kept_N: flat indices (row·T + position) of the queries, ascending.
        counts: queries of each batch row, not all 0. new: T.
        plain: every query sees all keys up to its own, and none is cached.

    Attributes:
        slots_BL: index into the N kept tokens of each cell; a ragged row repeats its last one.
        real_BL: False for such repetitions. token_BL: flat token index of each cell.
        cells_N: the cell of each kept token.
        causal: cell l is position l, and attention needs no mask rows.
    """

    def __init__(
        self,
        kept_N: Tensor,
        counts: list[int],
        new: int,
        *,
        plain: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.new, self.longest, self.plain = new, max(counts), plain
        device = kept_N.device
        full = FULL.get(dtype, FULL[torch.float32]) if device.type == "cpu" else GPU_FULL
        self.causal = plain and self.longest >= full * new
        if self.causal:
            cells = len(counts) * new
            self.longest = new
            self.token_BL = torch.arange(cells, device=device).view(-1, new)
            self.ragged, self.cells_N = kept_N.shape[0] != cells, kept_N
            if not self.ragged:
                self.slots_BL = self.token_BL
                self.real_BL = torch.ones_like(self.token_BL, dtype=torch.bool)
                return
            slots = torch.zeros(cells, dtype=torch.int64, device=device)
            slots[kept_N] = torch.arange(kept_N.shape[0], device=device)
            real = torch.zeros(cells, dtype=torch.bool, device=device)
            real[kept_N] = True
            self.slots_BL, self.real_BL = slots.view(-1, new), real.view(-1, new)
            return
        counts_B1 = torch.tensor(counts, device=device)[:, None]
        starts_B1 = counts_B1.cumsum(0) - counts_B1
        ramp_L = torch.arange(self.longest, device=device)
        last_B1 = (counts_B1 - 1).clamp_(min=0)
        self.slots_BL = (starts_B1 + torch.minimum(ramp_L, last_B1)).clamp_(max=kept_N.shape[0] - 1)
        self.real_BL = ramp_L < counts_B1
        self.ragged = kept_N.shape[0] != len(counts) * self.longest
        self.token_BL = kept_N[self.slots_BL]
        row_N = kept_N // new
        place_N = torch.arange(kept_N.shape[0], device=device) - starts_B1[row_N, 0]
        self.cells_N = row_N * self.longest + place_N

    def blocks(
        self, rows: MaskRows, keys: int, dtype: torch.dtype, group: int
    ) -> Iterator[tuple[int, int, int, Tensor]]:
        """(begin, end, visible keys, additive mask ``[B, 1, end − begin, keys]``) in turn.

        Not for a causal grid.

        Args:
            rows: the mask. keys: S. group: query heads for each key head.
        """
        if self.token_BL.device.type != "cpu":
            # Where the last query stands would be a question to the device.
            for begin in range(0, self.longest, GPU_BLOCK):
                end = min(begin + GPU_BLOCK, self.longest)
                yield begin, end, keys, rows.select(self.token_BL[:, begin:end], keys)[:, None]
            return
        last_L = (self.token_BL % self.new).amax(0).tolist()
        block = BLOCK.get(dtype, BLOCK[torch.float32])
        block = block if group == 1 else GROUPED[group > 2]
        for begin in range(0, self.longest, block):
            end = min(begin + block, self.longest)
            seen = min(rows.past_keys + last_L[end - 1] + 1, keys)
            yield begin, end, seen, rows.select(self.token_BL[:, begin:end], seen)[:, None]


class GridAttention(TorchFunctionMode):
    """Steps in where a family's attention module calls ``scaled_dot_product_attention``.

    Args:
        grid: the kept tokens' layout. rows: the mask.
        padding: rows beyond the kept tokens that the module was given; they attend to nothing.
        hides: nobody sees keys of zeros (``kv_source="none"``).
    """

    def __init__(
        self, grid: Grid, rows: MaskRows, padding: int = 0, *, hides: bool = False
    ) -> None:
        super().__init__()
        self.grid, self.rows, self.padding, self.hides = grid, rows, padding, hides
        self.ran = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            self.ran = True
            return self._attend(*args, **kwargs)
        return func(*args, **kwargs)

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        super().__exit__(kind, value, traceback)
        if kind is None and not self.ran:
            raise UnsupportedError(
                "the attention module did not call scaled_dot_product_attention; use "
                "model.set_attn_implementation('eager')."
            )

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        assert attn_mask is None
        assert not is_causal
        grid = self.grid
        (batch, length), (heads, _, width) = grid.slots_BL.shape, query.shape[1:]
        q = query[0].transpose(0, 1).index_select(0, grid.slots_BL.view(-1))
        q_BALD = q.view(batch, length, heads, width).transpose(1, 2)
        if grid.plain and takes_blocks(q, dropout_p):
            last_BL = grid.token_BL % grid.new
            out = attend_causally(
                q_BALD, key, value, last_BL, scale,
                lambda: self._parts(q_BALD, key, value, dropout_p, scale),
            )  # fmt: skip
        else:
            out = self._parts(q_BALD, key, value, dropout_p, scale)
        return self._flat(out.transpose(1, 2).reshape(batch * length, heads, width))

    def _parts(
        self, q_BALD: Tensor, key: Tensor, value: Tensor, dropout_p: float, scale: float | None
    ) -> Tensor:
        """Attention of the grid, ``[B, A, L, D]``."""
        grid, group = self.grid, q_BALD.shape[1] // key.shape[1]
        if grid.causal:
            parts = [
                scaled_dot_product_attention(
                    q_BALD, key, value, None, dropout_p, True, scale=scale, enable_gqa=group > 1
                )
            ]
        else:
            gone_BS = absent(key) if self.hides else None
            parts = [
                attend_rows(
                    q_BALD[:, :, begin:end], key[:, :, :seen], value[:, :, :seen],
                    _hidden(mask, gone_BS), scale, dropout_p,
                )
                for begin, end, seen, mask in grid.blocks(
                    self.rows, key.shape[2], q_BALD.dtype, group
                )
            ]  # fmt: skip
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _flat(self, out_CHD: Tensor) -> Tensor:
        """Real cells as one sequence ``[1, heads, N, D]``."""
        if self.grid.ragged:
            out_CHD = out_CHD.index_select(0, self.grid.cells_N)
        if self.padding:
            out_CHD = torch.nn.functional.pad(out_CHD, (0, 0, 0, 0, 0, self.padding))
        return out_CHD.transpose(0, 1)[None]


def _hidden(mask_B1LS: Tensor, gone_BS: Tensor | None) -> Tensor:
    """An additive mask without some of the first keys."""
    if gone_BS is None:
        return mask_B1LS
    gone = gone_BS[:, None, None, : mask_B1LS.shape[-1]]
    return mask_B1LS.masked_fill(gone, torch.finfo(mask_B1LS.dtype).min)


def attend_rows(
    q_BALD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask_B1LS: Tensor,
    scale: float | None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention ``[B, A, L, D]`` under an additive mask; A may be a multiple of the K key heads.

    On a CPU PyTorch copies keys and values for every query head of a group, and cuts few queries
    into small products. Here queries of a group are rows of one head: 5 to 20 % faster, measured.
    """
    (batch, heads, length, width), kv_heads = q_BALD.shape, k_BKSD.shape[1]
    group = heads // kv_heads
    if group == 1 or q_BALD.device.type != "cpu":
        return scaled_dot_product_attention(
            q_BALD, k_BKSD, v_BKSD, mask_B1LS, dropout_p, scale=scale, enable_gqa=group > 1
        )
    rows = q_BALD.reshape(batch, kv_heads, group * length, width)
    mask = mask_B1LS.repeat(1, 1, group, 1)
    out = scaled_dot_product_attention(rows, k_BKSD, v_BKSD, mask, dropout_p, scale=scale)
    return out.reshape(q_BALD.shape)
