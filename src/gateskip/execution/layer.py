"""The forward pass of one gated decoder layer, masked or compacted.

Shapes: B rows, T new tokens, N gathered tokens, R and Tq the attention's grid, H hidden.

Compacted: decide from the residual stream, gather the kept tokens, run the family's own modules on
them, scatter the results. Prefill gathers tokens, batched decoding gathers rows, batch-1 decoding
does not call the branch at all. Nothing falls back from one execution to the other.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from gateskip.config import BranchKey
from gateskip.errors import UnsupportedError
from gateskip.execution.branch import Branch
from gateskip.execution.fused_attention import attend, takes_kernels
from gateskip.execution.fused_mlp import own_mlp, run_mlp
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
from gateskip.execution.stack import leave_room_to_decode, takes_stack, token_stack
from gateskip.execution.token import YES, token_layer
from gateskip.execution.trained_attention import CausalAttention
from gateskip.skipping.call import Call
from gateskip.skipping.join import gate_value
from gateskip.skipping.key_values import CacheWriter, flat_tokens, project_kv
from gateskip.skipping.masked import masked_join

__all__ = ["layer_forward"]


def layer_forward(layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``forward`` of every gated layer; same signature and result as the family's own."""
    call = kwargs.pop("gateskip_call", None)
    if not isinstance(call, Call):
        raise UnsupportedError(
            "a gated decoder layer was called outside of its decoder; call the model, or "
            "gateskip.detach(model) first."
        )
    if args:
        base: Any = type(layer)._gateskip_base  # type: ignore[attr-defined]
        names = list(inspect.signature(base.forward).parameters)[2:]
        kwargs.update(zip(names, args, strict=False))
    place: Any = layer._gateskip_layer  # an attribute, since a graph cannot read vars()
    index: int = place[1]
    if hidden_states.device != call.device:
        call.move(hidden_states.device)
    h = None
    if index == 0 and takes_stack(call):
        h = token_stack(call.layers, call, hidden_states, kwargs)
        call.stacked = h is not None
    elif call.stacked:
        h = hidden_states
    if h is None and call.ungated:
        plain: Any = type(layer)._gateskip_base  # type: ignore[attr-defined]
        h = plain.forward(layer, hidden_states, **kwargs)
        leave_room_to_decode(layer, call, index, hidden_states, kwargs)
    if h is None and call.single and not call.masked:
        h = token_layer(layer, call, index, hidden_states, kwargs)
    if h is None:
        h = _layer(layer, call, index, hidden_states, kwargs)
        leave_room_to_decode(layer, call, index, hidden_states, kwargs)
    if index == call.state.shape.layers - 1:
        if call.recorder is not None:
            call.recorder.record(call)
            call.recorder = None  # recomputation must not count twice
        if call.held is not None:
            call.held.finish(call)
            call.held = None
    return h


def _layer(
    layer: nn.Module, call: Call, index: int, hidden_states: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    inputs = AttentionInputs.of(kwargs, hidden_states)
    attention, mlp = (Branch(layer, call, kind, index) for kind in ("attention", "mlp"))
    if call.state.config.placement == "layer" and attention.gate is not None:
        return _weighed(attention, mlp, hidden_states, inputs)
    return _branches(attention, mlp, hidden_states, inputs)


def _weighed(attention: Branch, mlp: Branch, h: Tensor, inputs: AttentionInputs) -> Tensor:
    """h + r · (layer(h) − h) (arXiv 2404.02258, eq. 1); who skips the layer stays as it is, or gets
    1 − r of what stands in for it (arXiv 2503.23798, section 3)."""
    out = _branches(attention, mlp, h, inputs)
    observer = attention.call.observer
    if observer is not None and observer.ungated:
        return out
    assert attention.gate is not None
    r = gate_value(attention.gate, attention.read(h))
    keep_BT = attention.call.keep.get(attention.key)
    if keep_BT is not None and attention.compensation is not None:
        r = torch.where(keep_BT[..., None], r, 1.0 - r)
    # In this order skipped tokens (out = h) and r = 1 lose nothing to rounding.
    return (out.float() + (r - 1.0) * (out.float() - h.float())).to(h.dtype)


def _branches(
    attention: Branch, mlp: Branch, hidden_states: Tensor, inputs: AttentionInputs
) -> Tensor:
    call = attention.call
    if call.state.family.is_parallel(attention.layer):
        return _parallel(attention, mlp, hidden_states, inputs)
    h = _attention(attention, hidden_states, hidden_states, inputs)
    # Masked execution owns nothing, and a graph cannot compare addresses.
    owned = not (call.masked or torch.is_grad_enabled())
    owned = owned and h.data_ptr() != hidden_states.data_ptr()
    return _mlp(mlp, h, h, owned=owned)


def _parallel(attention: Branch, mlp: Branch, h: Tensor, inputs: AttentionInputs) -> Tensor:
    """Both branches read the layer's input."""
    if not attention.family.sum_first:
        return _mlp(mlp, h, _attention(attention, h, h, inputs), owned=False)
    added = _attention(attention, h, torch.zeros_like(h), inputs)
    return _mlp(mlp, h, added, owned=False) + h


def _attention(branch: Branch, h: Tensor, base: Tensor, inputs: AttentionInputs) -> Tensor:
    """``base`` plus what the branch, which reads ``h``, adds to it."""
    call = branch.call
    keep = branch.decide(h)
    if keep is None or call.masked:
        x, u = branch.inputs(h)
        o = _attend_whole(branch, x, inputs, _masked_writer(branch, x, inputs, keep))
        return _finish_whole(branch, h, base, u, o, keep)
    if call.single:
        return _attention_single(branch, h, base, inputs, keep)
    return _attention_compacted(branch, h, base, inputs, keep)


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


def _finish_whole(
    branch: Branch, h: Tensor, base: Tensor, u: Tensor, o: Tensor, keep: Tensor | None
) -> Tensor:
    call, gate = branch.call, branch.gate
    if call.observer is not None and gate is not None:
        shown = call.everyone() if keep is None else keep
        call.observer.branch(branch.key, h, u, o, shown, call)
        if call.observer.ungated:
            return base + o
    if gate is None:
        return base + o
    kept_BTH = branch.join(base, o, u)
    if keep is None:
        return kept_BTH
    out = masked_join(base, kept_BTH, u, keep, call.everyone(), branch.compensation)
    if call.objective is None:
        return out
    kept = (call.everyone() if call.objective.everyone else keep).flatten().nonzero()[:, 0]
    o_MH, u_MH = (t.flatten(0, 1).index_select(0, kept) for t in (o, u))
    return _learnable(branch, out.flatten(0, 1), o_MH, u_MH, kept).view_as(h)


def _attention_single(
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


def _attention_compacted(
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
        return _attention_fused(branch, flat, inputs, chosen).view_as(h)
    if kept.shape[0] == keep.numel():
        x, u = (t.view_as(h) for t in branch.inputs_at(flat, None))
        all_o = _attend_whole(branch, x, inputs, _plain_writer(branch, inputs))
        out = branch.join(base, all_o, u).flatten(0, 1)
        return _learnable(branch, out, all_o.flatten(0, 1), u.flatten(0, 1), kept).view_as(h)
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
        out = _learnable(branch, branch.join_at(out, flat_base, o, u, kept), o, u, kept)
    if branch.source_is("previous"):
        assert writer.written is not None
        call.kv[layer] = writer.written
    return _compensate(branch, out, skip, u_skip).view_as(h)


def _attention_fused(
    branch: Branch, flat: Tensor, inputs: AttentionInputs, chosen: Selection
) -> Tensor:
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
    return _compensate(branch, out, skip, branch.read_at(flat, skip, rounded=True))


def _takes_flat(attention: nn.Module, call: Call) -> bool:
    config: Any = attention.config
    return call.new > 1 and config._attn_implementation == "sdpa"


_Attended = tuple[CacheWriter, Tensor | None, Tensor]
_Fill = tuple[Tensor, Tensor]


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


def _compensate(branch: Branch, out_NH: Tensor, skip: Tensor, u_skip: Tensor | None) -> Tensor:
    """Add the compensation to skipped tokens of the flat stream; ``u_skip`` may have more rows."""
    compensation = branch.compensation
    if compensation is None or skip.shape[0] == 0:
        return out_NH
    assert u_skip is not None
    return compensation.add_at(out_NH, u_skip, skip)


def _learnable(branch: Branch, out_NH: Tensor, o_MH: Tensor, u_MH: Tensor, kept: Tensor) -> Tensor:
    """``out``, unchanged in value; in training a kept token's decision may get a gradient."""
    call, gate = branch.call, branch.gate
    if call.objective is None or call.thresholds is None or not torch.is_grad_enabled():
        return out_NH
    assert gate is not None
    threshold = call.thresholds[branch.key]
    gained = o_MH if branch.apart else None
    noise_BT = call.noise(branch.key)
    noise_M = None if noise_BT is None else noise_BT.flatten().index_select(0, kept)
    change = call.objective.decision(
        gate, o_MH, u_MH, threshold, branch.compensation, gained, noise_M
    )
    return out_NH if change is None else out_NH.index_add(0, kept, change.to(out_NH.dtype))


def _mlp(branch: Branch, h: Tensor, base: Tensor, *, owned: bool) -> Tensor:
    """``base`` plus what the branch, which reads ``h``, adds to it.

    Args:
        owned: nobody else holds ``base``, so it may be changed in place.
    """
    call, gate = branch.call, branch.gate
    keep = branch.decide(h)
    if keep is None or call.masked:
        x, u = branch.inputs(h)
        o = branch.out(own_mlp(branch.module, x))
        return _finish_whole(branch, h, base, u, o, keep)
    assert gate is not None
    if call.single:
        if keep is YES or bool(keep):
            x, u = branch.inputs(h)
            return branch.join(base, branch.out(own_mlp(branch.module, x)), u)
        call.computed[branch.key] = torch.zeros(1, dtype=torch.int64)
        if branch.compensation is None:
            return base
        return base + branch.compensation(branch.read(h))
    flat, flat_base = h.flatten(0, 1), base.flatten(0, 1)
    chosen = select(keep, call)
    kept = chosen.kept
    if kept.shape[0] == keep.numel():
        x, u = branch.inputs_at(flat, None)
        o = _run_mlp(branch, x)
        out = branch.join(flat_base, o, u, branch.score_N)
        return _learnable(branch, out, o, u, kept).view_as(h)
    chosen.note(call, branch.key)
    skip = u_skip = None
    if branch.compensation is not None:
        skip = chosen.skipped
        u_skip = branch.read_at(flat, skip, rounded=True)
    if kept.shape[0]:
        x, u = branch.inputs_at(flat, kept, rounded=True)
        n = kept.shape[0]
        call.padding[branch.key] = u.shape[0] - n
        o, u = _run_mlp(branch, x)[:n], u[:n]
        out = flat_base if owned else flat_base.clone()
        out = branch.join_at(out, flat_base, o, u, kept)
        out = _learnable(branch, out, o, u, kept)
    else:
        out = flat_base if owned else flat_base.clone()
    if skip is not None:
        out = _compensate(branch, out, skip, u_skip)
    return out.view_as(h)


def _run_mlp(branch: Branch, x: Tensor) -> Tensor:
    """What the MLP adds for rows ``[M, H]`` or ``[B, T, H]``."""
    return branch.out(run_mlp(branch.module, branch.family, x))
