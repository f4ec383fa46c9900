"""An attention branch of a gated layer: whole, of one token, compacted.

Shapes: B rows, T new tokens, N flat tokens, M selected ones, R and Tq the attention's grid,
H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gateskip.config import BranchKey
from gateskip.execution.branch import Branch
from gateskip.execution.finish import compensate, finish_whole, learnable
from gateskip.execution.fused_attention import attend, takes_kernels
from gateskip.execution.grid import Grid, GridAttention
from gateskip.execution.hidden_keys import (
    HidingWriter,
    blank,
    grid_mask,
    hidden_before,
    need_tensor,
    need_zeros,
    whole_mask,
)
from gateskip.execution.inputs import AttentionInputs, flat_positions, grid_of
from gateskip.execution.rounding import repeated
from gateskip.execution.selection import Selection, select
from gateskip.execution.token import YES
from gateskip.execution.trained_attention import CausalAttention
from gateskip.skipping.call import Call
from gateskip.skipping.key_values import CacheWriter, flat_tokens, project_kv

__all__ = ["attention_branch"]

_Attended = tuple[CacheWriter, Tensor | None, Tensor]
_Fill = tuple[Tensor, Tensor]


def attention_branch(branch: Branch, h: Tensor, base: Tensor, inputs: AttentionInputs) -> Tensor:
    """``base`` plus what the branch, which reads ``h``, adds to it."""
    call = branch.call
    keep = branch.decide(h)
    if keep is None or call.masked:
        x, u = branch.inputs(h)
        o = _attend_whole(branch, x, inputs, _masked_writer(branch, x, inputs, keep))
        return finish_whole(branch, h, base, u, o, keep)
    if call.single:
        return _single(branch, h, base, inputs, keep)
    return _compacted(branch, h, base, inputs, keep)


def _attend_whole(
    branch: Branch, x: Tensor, inputs: AttentionInputs, writer: CacheWriter | None
) -> Tensor:
    """What the attention adds for all tokens; a writer's keys and values are remembered."""
    call, layer = branch.call, branch.key[0]
    arguments = inputs.whole(inputs.cache if writer is None else writer)
    if isinstance(writer, HidingWriter):
        writer.mask = arguments["attention_mask"] = whole_mask(inputs, call, layer)
    elif torch.is_grad_enabled() and not call.masked and _takes_flat(branch.module, call):
        rows = inputs.mask_rows(call, layer)
        if rows is not None and rows.plain:
            arguments["attention_mask"] = None
            with CausalAttention():
                return _told(branch, branch.module(hidden_states=x, **arguments)[0], writer)
    return _told(branch, branch.module(hidden_states=x, **arguments)[0], writer)


def _told(branch: Branch, o: Tensor, writer: CacheWriter | None) -> Tensor:
    """What is added; later layers are told what a writer wrote."""
    if writer is not None and writer.written is not None and branch.source_is("previous"):
        branch.call.kv[branch.key[0]] = writer.written
    return branch.out(o)


def _plain_writer(branch: Branch, inputs: AttentionInputs) -> CacheWriter | None:
    """What stands in for the cache where everybody is kept; None: the cache itself."""
    call = branch.call
    if branch.source_is("previous"):
        return CacheWriter(inputs.cache, call.batch, call.new)
    if branch.source_is("none") and hidden_before(inputs.cache, branch.key[0]):
        return HidingWriter(inputs.cache, call.batch, call.new)
    return None


def _masked_writer(
    branch: Branch, x: Tensor, inputs: AttentionInputs, keep: Tensor | None
) -> CacheWriter | None:
    """Passes all K/V on, with skipped tokens' replaced by the previous layer's, or by nothing."""
    call = branch.call
    if keep is None or branch.source_is("project"):
        return _plain_writer(branch, inputs)
    fill_N = (~keep & call.everyone()).flatten().nonzero()[:, 0]
    if branch.source_is("none"):
        fill = blank(call, x, fill_N.shape[0])
        return HidingWriter(inputs.cache, call.batch, call.new, fill_N=fill_N, fill=fill)
    source = branch.source
    if source is None:
        return _plain_writer(branch, inputs)
    k, v = call.kv[source]
    fill = (flat_tokens(k, fill_N), flat_tokens(v, fill_N))
    return CacheWriter(inputs.cache, call.batch, call.new, fill_N=fill_N, fill=fill)


def _single(
    branch: Branch, h: Tensor, base: Tensor, inputs: AttentionInputs, keep: Tensor
) -> Tensor:
    call, gate = branch.call, branch.gate
    layer, attention = branch.key[0], branch.module
    assert gate is not None
    if keep is YES or bool(keep):
        x, u = branch.inputs(h)
        o = _attend_whole(branch, x, inputs, _plain_writer(branch, inputs))
        return branch.join(base, o, u)
    call.computed[branch.key] = torch.zeros(1, dtype=torch.int64)
    if not branch.source_is("project"):
        if branch.source_is("previous"):
            assert branch.source is not None
            k, v = call.kv[layer] = call.kv[branch.source]
        else:
            need_zeros(inputs.cache)
            k, v = (t.transpose(0, 1)[None] for t in blank(call, h, 1))
        if inputs.cache is not None:
            inputs.cache.update(k, v, layer)
        if branch.compensation is None:
            return base
        return base + branch.compensation(branch.read(h))
    if inputs.cache is None and branch.compensation is None:
        return base
    x, u = branch.inputs(h)
    if inputs.cache is not None:
        k, v = project_kv(attention, x[0], inputs.tables(1), branch.family)
        inputs.cache.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], layer)
    return base if branch.compensation is None else base + branch.compensation(u)


def _compacted(
    branch: Branch, h: Tensor, base: Tensor, inputs: AttentionInputs, keep: Tensor
) -> Tensor:
    call, gate = branch.call, branch.gate
    layer, attention = branch.key[0], branch.module
    assert gate is not None
    flat, flat_base = h.flatten(0, 1), base.flatten(0, 1)
    chosen = select(keep, call)
    kept, skip = chosen.kept, chosen.skipped
    # Before a branch the gate is asked once for a kept token, and once for a skipped one.
    if not branch.before and takes_kernels(attention, branch.family, call, flat):
        return _fused(branch, flat, inputs, chosen).view_as(h)
    if kept.shape[0] == keep.numel():
        x, u = (t.view_as(h) for t in branch.inputs_at(flat, None))
        all_o = _attend_whole(branch, x, inputs, _plain_writer(branch, inputs))
        out = branch.join(base, all_o, u).flatten(0, 1)
        return learnable(branch, out, all_o.flatten(0, 1), u.flatten(0, 1), kept).view_as(h)
    rounded = torch.is_grad_enabled() and skip.shape[0] > 0
    x_skip = u_skip = None
    if branch.source_is("project") or branch.compensation is not None:
        x_skip, u_skip = branch.inputs_at(flat, skip, rounded=rounded)
    if branch.source_is("previous"):
        assert branch.source is not None
        k, v = call.kv[branch.source]
        fill = (flat_tokens(k, skip), flat_tokens(v, skip))
    elif branch.source_is("none"):
        need_zeros(inputs.cache)
        need_tensor(inputs)
        fill = blank(call, flat, skip.shape[0])
    else:
        assert x_skip is not None
        where, n = repeated(skip, x_skip.shape[0]), skip.shape[0]
        tables = inputs.tables(call.batch)
        if tables is not None:
            tables = tables[0].index_select(0, where), tables[1].index_select(0, where)
        k, v = project_kv(attention, x_skip, tables, branch.family)
        fill = k[:n], v[:n]
    out = flat_base.clone()
    if _takes_flat(attention, call):
        writer, o, u = _attend_flat(branch, flat, inputs, chosen, fill)
    else:
        writer, o, u = _attend_grid(branch, flat, inputs, keep, chosen, fill)
    if o is not None:
        out = learnable(branch, branch.join_at(out, flat_base, o, u, kept), o, u, kept)
    if branch.source_is("previous"):
        assert writer.written is not None
        call.kv[layer] = writer.written
    return compensate(branch, out, skip, u_skip).view_as(h)


def _fused(branch: Branch, flat: Tensor, inputs: AttentionInputs, chosen: Selection) -> Tensor:
    """The whole branch on the CPU kernels; returns the flat stream after it."""
    call, kept = branch.call, chosen.kept
    chosen.note(call, branch.key)
    index = call.valid_N
    x_valid, u_valid = branch.inputs_at(flat, index)
    whole = kept.shape[0] == flat.shape[0]
    x, u = (x_valid, u_valid) if whole else branch.inputs_at(flat, kept, rounded=True)
    given = (x, kept, chosen.counts) if kept.shape[0] else None
    call.padding[branch.key] = u.shape[0] - kept.shape[0]
    o = attend(branch.module, branch.family, call, inputs, branch.key[0], (x_valid, index), given)
    if whole:
        assert o is not None
        return branch.join(flat, o, u, branch.score_N)
    out = flat.clone()
    if o is not None:
        n = kept.shape[0]
        out = branch.join_at(out, flat, o[:n], u[:n], kept)
    if branch.compensation is None:
        return out
    skip = chosen.skipped
    return compensate(branch, out, skip, branch.read_at(flat, skip, rounded=True))


def _takes_flat(attention: nn.Module, call: Call) -> bool:
    config: Any = attention.config
    return call.new > 1 and config._attn_implementation == "sdpa"


def _attend_flat(
    branch: Branch, flat: Tensor, inputs: AttentionInputs, chosen: Selection, fill: _Fill
) -> _Attended:
    """Kept tokens of all rows as one sequence; returns (writer, o [M, H], u [M, H])."""
    kept = chosen.kept
    call, layer, n = branch.call, branch.key[0], kept.shape[0]
    rounded = torch.is_grad_enabled() and n > 0
    x, u = branch.inputs_at(flat, kept, rounded=rounded)
    padding = u.shape[0] - n
    hides = branch.source_is("none")
    writer = (HidingWriter if hides else CacheWriter)(
        inputs.cache, call.batch, call.new, kept_N=kept, fill_N=chosen.skipped, fill=fill,
        slots_N=torch.arange(n, device=kept.device) if padding else None,
    )  # fmt: skip
    chosen.note(call, branch.key)
    if n == 0:
        writer.update(None, None, layer)
        return writer, None, flat[:0]
    call.padding[branch.key] = padding
    mask_rows = inputs.mask_rows(call, layer)
    assert mask_rows is not None
    plain = mask_rows.plain and not hides
    grid = Grid(kept, chosen.counts, call.new, plain=plain, dtype=flat.dtype)
    where = repeated(kept, u.shape[0])
    arguments = inputs.flat_queries(writer, where, call.batch)
    with GridAttention(grid, mask_rows, padding, hides=hides):
        o = branch.module(hidden_states=x[None], **arguments)[0]
    return writer, branch.out(o)[0, :n], u[:n]


def _attend_grid(
    branch: Branch,
    flat: Tensor,
    inputs: AttentionInputs,
    keep: Tensor,
    chosen: Selection,
    fill: _Fill,
) -> _Attended:
    """Kept tokens as a rectangle of rows, ragged ones padded; returns as :func:`_attend_flat`."""
    call, layer, kept = branch.call, branch.key[0], chosen.kept
    position, rows, slots = grid_of(keep, kept)
    hides = branch.source_is("none")
    writer = (HidingWriter if hides else CacheWriter)(
        inputs.cache, call.batch, call.new,
        kept_N=kept, slots_N=slots, fill_N=chosen.skipped, fill=fill, rows_R=rows,
    )  # fmt: skip
    _count(call, branch.key, position, rows)
    if kept.shape[0] == 0:
        writer.update(None, None, layer)
        return writer, None, flat[:0]
    index_RT = flat_positions(position, rows, call.new)
    x, u = branch.inputs_at(flat, index_RT.view(-1))
    arguments = inputs.queries(writer, position, rows, call, layer)
    if isinstance(writer, HidingWriter):
        mask = grid_mask(arguments["attention_mask"], inputs, call, layer, position.shape[0])
        writer.mask = arguments["attention_mask"] = mask
    o = branch.module(hidden_states=x.view(*index_RT.shape, -1), **arguments)[0]
    o = branch.out(o).flatten(0, 1)
    return writer, *((o, u) if slots is None else (o[slots], u[slots]))


def _count(call: Call, key: BranchKey, position: Tensor, rows: Tensor | None) -> None:
    """Rows that entered the attention's projections, ragged padding included."""
    if rows is None:
        call.computed[key] = torch.full((call.batch,), position.shape[1], device=call.device)
    else:
        counts = torch.zeros(call.batch, dtype=torch.int64, device=call.device)
        call.computed[key] = counts.index_fill_(0, rows, 1)
