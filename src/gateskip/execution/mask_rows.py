"""Rows of the attention mask for some queries.

Shapes: B batch rows, T new tokens, S keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gateskip.errors import UnsupportedError

__all__ = ["MaskRows", "blocked"]

#: Largest table, in elements, that is made additive once per call; larger ones are cut first.
TABLE = 1 << 22


class MaskRows:
    """Additive mask rows of one call: PyTorch would make a boolean mask additive in every layer.

    Args:
        mask: what transformers made of the 2-D mask, ``[1 or B, 1, T, S]``, or a BlockMask of flex
            attention; None: causality.
        new: T. past: cached tokens. length, offset: S, and the index of the first key, as the cache
            says. dtype: of the additive mask. valid_BT: real tokens; None: all are.

    Attributes:
        plain: every real token sees all keys up to its own, and none is cached. Padding on the
            right leaves it so: what padding sees does not count.

    Raises:
        UnsupportedError: a mask that differs by head.
    """

    def __init__(
        self, mask: Any, *, new: int, past: int, length: int, offset: int,
        dtype: torch.dtype, device: torch.device, valid_BT: Tensor | None = None,
    ) -> None:  # fmt: skip
        if mask is not None and not isinstance(mask, Tensor):
            mask = _unblocked(mask, new, length, device)
        if mask is not None and mask.shape[1] != 1:
            raise UnsupportedError(f"attention_mask of shape {tuple(mask.shape)} differs by head.")
        self.new, self.past, self.length, self.offset = new, past, length, offset
        self.dtype = dtype
        self.device = device
        self.plain = length == new
        if self.plain and mask is not None:
            self.plain = mask.dtype == torch.bool and self._only_causal(mask[:, 0], valid_BT)
        if self.plain:
            mask = None
        self.mask = mask
        self.table: Tensor | None = None
        if mask is not None:
            small = mask.numel() <= TABLE
            self.table = self._additive(mask[:, 0]) if small else mask[:, 0]
        elif new * length <= TABLE:
            self.table = self._causal(torch.arange(new, device=device), length)[None]

    def _only_causal(self, mask: Tensor, valid_BT: Tensor | None) -> bool:
        ramp = torch.arange(self.new, device=self.device)
        same = mask == (ramp <= ramp[:, None])
        return bool((same.all(-1) if valid_BT is None else same.all(-1) | ~valid_BT).all())

    @property
    def past_keys(self) -> int:
        """Keys before the first new token among those that attention is given."""
        return self.past - self.offset

    def select(self, token: Tensor, keys: int) -> Tensor:
        """Rows of flat token indices (row·T + position) over the first ``keys`` keys.

        Returns:
            Additive mask ``[*token.shape, keys]``.
        """
        table, flat = self.table, token.reshape(-1)
        if table is None:
            return self._causal(flat % self.new, keys).view(*token.shape, keys)
        index = flat % self.new if table.shape[0] == 1 else flat
        rows = table[..., :keys].flatten(0, 1).index_select(0, index)
        return self._additive(rows).view(*token.shape, keys)

    def _causal(self, position_N: Tensor, keys: int) -> Tensor:
        key_S = torch.arange(self.offset, self.offset + keys, device=self.device)
        return self._additive(key_S <= position_N[:, None] + self.past)

    def _additive(self, mask: Tensor) -> Tensor:
        if mask.dtype != torch.bool:
            return mask
        blank = torch.zeros(mask.shape, dtype=self.dtype, device=mask.device)
        return blank.masked_fill_(~mask, torch.finfo(self.dtype).min)


def _unblocked(mask: Any, new: int, length: int, device: torch.device) -> Tensor:
    """A BlockMask as bool ``[1 or B, 1, T, S]``."""
    from torch.nn.attention.flex_attention import create_mask

    return create_mask(mask.mask_mod, mask.shape[0], 1, new, length, device=str(device))


def blocked(mask_B1TS: Tensor) -> Any:
    """An additive mask ``[B, 1, T, S]`` as flex attention's BlockMask.

    Not as its score_mask: compiled for a CPU by PyTorch 2.13, adding one writes beyond its memory.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    seen_BTS = mask_B1TS[:, 0] >= 0

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return seen_BTS[b, q, k]

    batch, new, length = seen_BTS.shape
    return create_block_mask(seen, batch, None, new, length, device=str(seen_BTS.device))
