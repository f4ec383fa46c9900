"""Keys of skipped tokens that nobody sees (``kv_source="none"``, as in Mixture-of-Depths).

Shapes: B rows, T new tokens, S keys, R and Tq the queries' grid, K key/value heads, D head width.

A skipped token has keys of zeros in the cache, and what is all zeros is hidden from every query of
the layer. So cropping, reordering and resetting a cache keep the marks where they belong, and
whatever kind of cache hands out the keys, the mask's columns are theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gateskip.errors import UnsupportedError
from gateskip.execution.inputs import AttentionInputs
from gateskip.skipping.call import Call
from gateskip.skipping.key_values import CacheWriter, absent

__all__ = [
    "HidingWriter",
    "blank",
    "grid_mask",
    "hidden_before",
    "need_tensor",
    "need_zeros",
    "whole_mask",
]


def blank(call: Call, like: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """K and V ``[tokens, K, D]`` of zeros."""
    shape = call.state.shape
    zeros = like.new_zeros(1, 1, 1).expand(tokens, shape.kv_heads, shape.head_dim)
    return zeros, zeros


def hidden_before(cache: Any, layer: int) -> bool:
    """Whether a layer's cache has keys that nobody sees.

    Raises:
        UnsupportedError: a cache that does not keep zeros.
    """
    if cache is None or torch.compiler.is_compiling():  # a graph cannot ask
        return cache is not None
    need_zeros(cache)
    layers = getattr(cache, "layers", ())
    keys = getattr(layers[layer], "keys", None) if layer < len(layers) else None
    if keys is None or keys.numel() == 0:
        return False
    return bool(absent(keys[:, :, : int(layers[layer].get_seq_length())]).any())


def need_zeros(cache: Any) -> None:
    """Raise UnsupportedError for a cache that does not keep zeros."""
    if "Quantized" in type(cache).__name__:
        raise UnsupportedError(
            "kv_source='none' marks skipped keys in the cache, and a quantised cache changes "
            "them; use another cache."
        )


def whole_mask(inputs: AttentionInputs, call: Call, layer: int) -> Tensor:
    """The additive mask of every new token ``[B, 1, T, S]``, to be written into.

    Raises:
        UnsupportedError: flex attention, whose mask is made before the keys are known.
    """
    rows = inputs.mask_rows(call, layer)
    if rows is None:
        return _open(inputs, call, layer, call.batch)
    need_tensor(inputs)
    token_BT = torch.arange(call.batch * call.new, device=call.device).view(call.batch, call.new)
    return rows.select(token_BT, rows.length)[:, None]  # a copy


def grid_mask(
    mask: Tensor | None, inputs: AttentionInputs, call: Call, layer: int, rows: int
) -> Tensor:
    """The mask of a grid's queries ``[R, 1, Tq, S]``, to be written into; errors as above."""
    need_tensor(inputs)
    return _open(inputs, call, layer, rows) if mask is None else mask


def need_tensor(inputs: AttentionInputs) -> None:
    """Raise UnsupportedError where a mask is none that can be written into."""
    if inputs.mask is not None and not isinstance(inputs.mask, Tensor):
        raise UnsupportedError(
            "kv_source='none' hides keys that flex attention's mask does not know yet; use "
            "model.set_attn_implementation('sdpa')."
        )


def _open(inputs: AttentionInputs, call: Call, layer: int, rows: int) -> Tensor:
    length = call.new
    if inputs.cache is not None:
        length = int(inputs.cache.get_mask_sizes(call.new, layer)[0])
    return torch.zeros(rows, 1, call.new, length, dtype=inputs.dtype, device=call.device)


class HidingWriter(CacheWriter):
    """A writer that hides absent keys in a mask as soon as the cache has handed out the keys.

    Attributes:
        mask: additive ``[R, 1, Tq, S]``, the one that the attention was given; None leaves hiding
            to :class:`~gateskip.execution.grid.GridAttention`.
    """

    mask: Tensor | None = None

    def update(
        self,
        key_states: Tensor | None,
        value_states: Tensor | None,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        k, v = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self.mask is not None:
            lowest = torch.finfo(self.mask.dtype).min
            self.mask.masked_fill_(absent(k)[:, None, None], lowest)
        return k, v
