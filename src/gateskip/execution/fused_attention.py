"""Attention of kept tokens on the CPU kernels, for Llama-like attention modules.

Shapes: B batch rows, T new tokens, M valid tokens, N kept tokens, H hidden, L longest row, D head
width.

The module's own projections run on exactly the rows that need them; norms on heads, rotary
embedding, and the copies into cache and grid are one pass each instead of a dozen. Keys and values
of kept and skipped tokens come from one product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from gateskip import kernels
from gateskip.execution.grid import Grid, attend_rows
from gateskip.execution.inputs import AttentionInputs
from gateskip.retrofit.devices import comes_and_goes
from gateskip.retrofit.families import FamilySpec
from gateskip.retrofit.listeners import listened
from gateskip.skipping.call import Call

__all__ = ["attend", "takes_kernels"]


def takes_kernels(attention: nn.Module, family: FamilySpec, call: Call, flat: Tensor) -> bool:
    """Whether the kernels may stand in for the module's own forward."""
    config: Any = attention.config
    return (
        family.fused_attention
        and call.new > 1
        and call.state.config.kv_source == "project"
        and config._attn_implementation == "sdpa"
        and kernels.supported(flat)
        and not attention.training
        and not any(comes_and_goes(module) for module in attention.children())
        # Somebody who hooks or replaces the module's forward wants to see it called.
        and not listened(attention)
        and not any(listened(norm) for norm in _head_norms(attention, family))
    )


def _head_norms(attention: nn.Module, family: FamilySpec) -> list[nn.Module]:
    """Norms of queries and keys, where the family has them."""
    names = [name for name in (family.q_norm, family.k_norm) if name is not None]
    found = [getattr(attention, name, None) for name in names]
    return [norm for norm in found if norm is not None]


def attend(
    attention: Any,
    family: FamilySpec,
    call: Call,
    inputs: AttentionInputs,
    layer: int,
    valid: tuple[Tensor, Tensor | None],
    kept: tuple[Tensor, Tensor, list[int]] | None,
) -> Tensor | None:
    """Write all K and V to the cache and attend for the kept tokens.

    Args:
        valid: (u [M, H] of all valid tokens, their flat indices; None: all B·T).
        kept: (u [N or more, H], flat indices [N], count per batch row), or None where nobody is
            kept; rows of u beyond N are passed through.

    Returns:
        The attention's output for every row of u, or None.
    """
    from gateskip.kernels.heads import gather_heads, rotate_heads

    batch, new, width = call.batch, call.new, attention.head_dim
    u_valid, index = valid
    assert inputs.cos_sin is not None
    cos, sin = (t.reshape(-1, t.shape[-1]).to(u_valid.dtype).contiguous() for t in inputs.cos_sin)
    tables = (cos, sin)
    # Kernels read raw memory: whatever a projection returns must be of the stream's dtype.
    k_ME, v_ME = (
        project(u_valid).to(u_valid.dtype).contiguous()
        for project in (attention.k_proj, attention.v_proj)
    )
    kv_heads = k_ME.shape[1] // width
    token_M = torch.arange(batch * new) if index is None else index
    blank = k_ME.new_empty if index is None else k_ME.new_zeros
    k = blank(batch, kv_heads, new, width)
    rotate_heads(
        k_ME, k, tables, source_R=None, token_R=token_M, heads=kv_heads,
        place_R=(token_M // new * kv_heads * new + token_M % new) * width,
        stride=new * width, norm=_norm(attention, family.k_norm, family, k.dtype),
    )  # fmt: skip
    if index is not None:
        v_ME = v_ME.new_zeros(batch * new, v_ME.shape[1]).index_copy_(0, index, v_ME)
    v = v_ME.view(batch, new, kv_heads, width).transpose(1, 2)
    mask_rows = inputs.mask_rows(call, layer)  # before the cache is written
    assert mask_rows is not None
    if inputs.cache is not None:
        k, v = inputs.cache.update(k, v, layer)
    if kept is None:
        return None
    u_NH, kept_N, counts = kept
    grid = Grid(kept_N, counts, new, plain=mask_rows.plain, dtype=u_NH.dtype)
    length = grid.longest
    q_NE = attention.q_proj(u_NH).to(u_NH.dtype).contiguous()
    heads = q_NE.shape[1] // width
    q = q_NE.new_empty(batch, heads, length, width)
    cell_R = torch.arange(batch * length)
    rotate_heads(
        q_NE, q, tables, source_R=grid.slots_BL.view(-1), token_R=grid.token_BL.view(-1),
        place_R=(cell_R // length * (heads * length) + cell_R % length) * width, heads=heads,
        stride=length * width, norm=_norm(attention, family.q_norm, family, q.dtype),
    )  # fmt: skip
    target_BL = torch.where(grid.real_BL, grid.slots_BL, -1)
    out_NE = torch.empty_like(q_NE)
    out_NE[kept_N.shape[0] :].zero_()
    group, scale = heads // kv_heads, attention.scaling
    if grid.causal:
        o = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=group > 1)
        gather_heads(o, out_NE, target_BL)
        return attention.o_proj(out_NE)
    for begin, end, seen, mask in grid.blocks(mask_rows, k.shape[2], q.dtype, group):
        o = attend_rows(q[:, :, begin:end], k[:, :, :seen], v[:, :, :seen], mask, scale)
        gather_heads(o, out_NE, target_BL[:, begin:end].contiguous())
    return attention.o_proj(out_NE)


def _norm(
    attention: nn.Module, name: str | None, family: FamilySpec, dtype: torch.dtype
) -> tuple[Tensor, float] | None:
    if name is None:
        return None
    norm = getattr(attention, name)
    return norm.weight.detach().to(dtype), float(getattr(norm, family.norm_eps))
