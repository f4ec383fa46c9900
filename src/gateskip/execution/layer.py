"""The forward pass of one gated decoder layer, masked or compacted.

Shapes: B rows, T new tokens, N gathered tokens, R and Tq the attention's grid, H hidden.

Compacted: decide from the residual stream, gather the kept tokens, run the family's own modules on
them, scatter the results. Prefill gathers tokens, batched decoding gathers rows, batch-1 decoding
does not call the branch at all. Nothing falls back from one execution to the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gateskip.config import BranchKey
from gateskip.errors import UnsupportedError
from gateskip.execution.fused_attention import attend, takes_kernels
from gateskip.execution.fused_mlp import run_mlp
from gateskip.execution.grid import Grid, GridAttention
from gateskip.execution.inputs import AttentionInputs, flat_positions, grid_of
from gateskip.execution.rounding import repeated, rounded_rows
from gateskip.execution.token import NO, YES, token_layer
from gateskip.execution.trained_attention import CausalAttention
from gateskip.gates import Gate
from gateskip.retrofit.families import FamilySpec
from gateskip.skipping.call import Call
from gateskip.skipping.compensation import compensation_of
from gateskip.skipping.join import join, join_at
from gateskip.skipping.key_values import CacheWriter, flat_tokens, project_kv
from gateskip.skipping.masked import masked_join
from gateskip.skipping.score import (
    branch_score,
    normed_at,
    random_score,
    scaled_vector,
    single_score,
)

__all__ = ["layer_forward"]


class _Branch:
    """One branch of one layer during one call."""

    __slots__ = (
        "call", "compensation", "family", "gate", "inverse", "key", "module", "norm", "score_N",
    )  # fmt: skip

    def __init__(self, layer: nn.Module, call: Call, kind: str, index: int) -> None:
        family: FamilySpec = call.state.family
        attention = kind == "attention"
        self.call, self.family, self.key = call, family, (index, kind)
        self.module: nn.Module = getattr(layer, family.attention if attention else family.mlp)
        self.norm: nn.Module = getattr(
            layer, family.attention_norm if attention else family.mlp_norm
        )
        gate = self.module._modules.get("skip_gate")
        self.gate = gate if isinstance(gate, Gate) else None
        self.compensation = compensation_of(self.module)
        self.inverse: Tensor | None = None  # 1 / rms(h), where scoring found it
        self.score_N: Tensor | None = None  # mean logits of all tokens, likewise

    @property
    def eps(self) -> float:
        return float(getattr(self.norm, self.family.norm_eps))

    def decide(self, h_BTH: Tensor) -> Tensor | None:
        """The keep mask, or None where nobody can be skipped."""
        call = self.call
        if call.objective is not None and self.gate is not None:
            call.objective.branch(self.key, self.gate, self.norm(h_BTH.detach()).detach(), call)
        if self.gate is None or not call.decides or self.fixed:
            return None
        if self.key in call.keep:
            return call.keep[self.key]
        importance = call.state.config.importance
        plain = call.forced is None and call.scores is None and importance == "mean_logit"
        if call.single and plain:
            return self._decide_single(h_BTH)
        # A hard decision has no gradient; without a graph, recomputation can replay it as it is.
        if importance == "random":
            return call.decide(self.key, random_score(call.visible_keys(), self.key, call.seed))
        with torch.no_grad():
            score_BT, self.inverse = branch_score(h_BTH, self.norm, self.eps, self.gate, importance)
        hooked = self.norm._forward_hooks or self.norm._forward_pre_hooks
        if self.inverse is not None and not hooked:
            self.score_N = score_BT.flatten()
        return call.decide(self.key, score_BT)

    def input_at(self, h_NH: Tensor, index_M: Tensor | None, *, rounded: bool = False) -> Tensor:
        """u of the tokens at flat indices (None: all), ``[M, H]``; more, zero rows if rounded."""
        rows = h_NH.shape[0] if index_M is None else index_M.shape[0]
        if rounded:
            rows = rounded_rows(rows, h_NH.dtype, h_NH.device)
        return normed_at(h_NH, self.norm, self.inverse, index_M, rows)

    @property
    def fixed(self) -> bool:
        """The first attention has no earlier K/V to copy, so ``previous`` never skips it."""
        return self.key == (0, "attention") and self.call.state.config.kv_source == "previous"

    def _decide_single(self, h_11H: Tensor) -> Tensor:
        call, gate = self.call, self.gate
        assert gate is not None
        assert call.thresholds is not None
        w_H, b = scaled_vector(gate, self.norm)
        score = single_score(h_11H.detach().view(-1), w_H, b, self.eps)
        kept = score >= call.thresholds[self.key] or call.protected_BT is not None
        keep_BT = YES if kept else NO
        call.keep[self.key] = keep_BT
        return keep_BT


def layer_forward(layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``forward`` of every gated layer; same signature and result as the family's own."""
    call = kwargs.pop("gateskip_call", None)
    if not isinstance(call, Call):
        raise UnsupportedError(
            "a gated decoder layer was called outside of its decoder; call the model, or "
            "gateskip.detach(model) first."
        )
    if args:
        names = ("attention_mask", "position_ids")
        kwargs.update(zip(names, args, strict=False))
    index = vars(layer)["_gateskip_layer"][1]
    h = None
    if call.single and not call.masked:
        h = token_layer(layer, call, index, hidden_states, kwargs)
    if h is None:
        h = _layer(layer, call, index, hidden_states, kwargs)
    if call.recorder is not None and index == call.state.shape.layers - 1:
        call.recorder.record(call)
        call.recorder = None  # recomputation must not count twice
    return h


def _layer(
    layer: nn.Module, call: Call, index: int, hidden_states: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    inputs = AttentionInputs.of(kwargs)
    h = _attention(_Branch(layer, call, "attention", index), hidden_states, inputs)
    owned = not torch.is_grad_enabled() and h.data_ptr() != hidden_states.data_ptr()
    return _mlp(_Branch(layer, call, "mlp", index), h, owned=owned)


def _attention(branch: _Branch, h: Tensor, inputs: AttentionInputs) -> Tensor:
    call = branch.call
    keep = branch.decide(h)
    copies = call.state.config.kv_source == "previous"
    if keep is None or call.masked:
        u = branch.norm(h)
        cache = inputs.cache
        writer = _masked_writer(branch, inputs, keep) if copies else None
        o = _attend_whole(branch, u, inputs, writer or cache)
        if writer is not None and writer.written is not None:
            call.kv[branch.key[0]] = writer.written
        return _finish_whole(branch, h, u, o, keep)
    if call.single:
        return _attention_single(branch, h, inputs, keep, copies)
    return _attention_compacted(branch, h, inputs, keep, copies)


def _attend_whole(branch: _Branch, u: Tensor, inputs: AttentionInputs, cache: Any) -> Tensor:
    """The attention's output for all tokens."""
    call, arguments = branch.call, inputs.whole(cache)
    if torch.is_grad_enabled() and not call.masked and _takes_flat(branch.module, call):
        rows = inputs.mask_rows(call, branch.key[0])
        if rows is not None and rows.plain:
            arguments["attention_mask"] = None
            with CausalAttention():
                return branch.module(hidden_states=u, **arguments)[0]
    return branch.module(hidden_states=u, **arguments)[0]


def _masked_writer(branch: _Branch, inputs: AttentionInputs, keep: Tensor | None) -> CacheWriter:
    """Passes all K/V on, with skipped tokens' replaced by the previous layer's."""
    call, layer = branch.call, branch.key[0]
    fill_N = fill = None
    if keep is not None and layer > 0:
        fill_N = (~keep & call.everyone()).flatten().nonzero()[:, 0]
        k, v = call.kv[layer - 1]
        fill = (flat_tokens(k, fill_N), flat_tokens(v, fill_N))
    return CacheWriter(inputs.cache, call.batch, call.new, fill_N=fill_N, fill=fill)


def _finish_whole(branch: _Branch, h: Tensor, u: Tensor, o: Tensor, keep: Tensor | None) -> Tensor:
    call, gate = branch.call, branch.gate
    if call.observer is not None and gate is not None:
        shown = call.everyone() if keep is None else keep
        call.observer.branch(branch.key, h, u, o, shown, call)
        if call.observer.ungated:
            return h + o
    if gate is None:
        return h + o
    if keep is None:
        return join(h, o, u, gate)
    out = masked_join(h, o, u, gate, keep, call.everyone(), branch.compensation)
    if call.objective is None:
        return out
    kept = keep.flatten().nonzero()[:, 0]
    o_MH, u_MH = (t.flatten(0, 1).index_select(0, kept) for t in (o, u))
    return _learnable(branch, out.flatten(0, 1), o_MH, u_MH, kept).view_as(h)


def _attention_single(
    branch: _Branch, h: Tensor, inputs: AttentionInputs, keep: Tensor, copies: bool
) -> Tensor:
    call, gate = branch.call, branch.gate
    layer, attention = branch.key[0], branch.module
    assert gate is not None
    if keep is YES or bool(keep):
        u = branch.norm(h)
        writer = CacheWriter(inputs.cache, 1, 1) if copies else None
        o = attention(hidden_states=u, **inputs.whole(writer or inputs.cache))[0]
        if writer is not None and writer.written is not None:
            call.kv[layer] = writer.written
        return join(h, o, u, gate)
    call.computed[branch.key] = torch.zeros(1, dtype=torch.int64)
    if copies:
        k, v = call.kv[layer] = call.kv[layer - 1]
        if inputs.cache is not None:
            inputs.cache.update(k, v, layer)
        if branch.compensation is None:
            return h
        return h + branch.compensation(branch.norm(h))
    if inputs.cache is None and branch.compensation is None:
        return h
    u = branch.norm(h)
    if inputs.cache is not None:
        cos, sin = inputs.tables(1)
        k, v = project_kv(attention, u[0], cos, sin, branch.family.k_norm)
        inputs.cache.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], layer)
    return h if branch.compensation is None else h + branch.compensation(u)


def _attention_compacted(
    branch: _Branch, h: Tensor, inputs: AttentionInputs, keep: Tensor, copies: bool
) -> Tensor:
    call, gate = branch.call, branch.gate
    layer, attention = branch.key[0], branch.module
    assert gate is not None
    flat = h.flatten(0, 1)
    kept = keep.flatten().nonzero()[:, 0]
    if takes_kernels(attention, branch.family, call, flat):
        return _attention_fused(branch, flat, inputs, keep, kept).view_as(h)
    if kept.shape[0] == keep.numel():
        u = branch.input_at(flat, None).view_as(h)
        writer = CacheWriter(inputs.cache, call.batch, call.new) if copies else None
        all_o = _attend_whole(branch, u, inputs, writer or inputs.cache)
        if writer is not None and writer.written is not None:
            call.kv[layer] = writer.written
        out = join(h, all_o, u, gate).flatten(0, 1)
        return _learnable(branch, out, all_o.flatten(0, 1), u.flatten(0, 1), kept).view_as(h)
    skip = (~keep & call.everyone()).flatten().nonzero()[:, 0]
    rounded = torch.is_grad_enabled() and skip.shape[0] > 0
    u_skip = None
    if not copies or branch.compensation is not None:
        u_skip = branch.input_at(flat, skip, rounded=rounded)
    if copies:
        k, v = call.kv[layer - 1]
        fill = (flat_tokens(k, skip), flat_tokens(v, skip))
    else:
        assert u_skip is not None
        cos, sin = inputs.tables(call.batch)
        where, n = repeated(skip, u_skip.shape[0]), skip.shape[0]
        tables = cos.index_select(0, where), sin.index_select(0, where)
        k, v = project_kv(attention, u_skip, *tables, branch.family.k_norm)
        fill = k[:n], v[:n]
    out = flat.clone()
    run = _attend_flat if _takes_flat(attention, call) else _attend_grid
    writer, o, u = run(branch, flat, inputs, keep, kept, (skip, fill))
    if o is not None:
        out = _learnable(branch, join_at(out, flat, o, u, gate, kept), o, u, kept)
    if copies:
        assert writer.written is not None
        call.kv[layer] = writer.written
    return _compensate(branch, out, skip, u_skip).view_as(h)


def _attention_fused(
    branch: _Branch, flat: Tensor, inputs: AttentionInputs, keep: Tensor, kept: Tensor
) -> Tensor:
    """The whole branch on the CPU kernels; returns the flat stream after it."""
    call, gate = branch.call, branch.gate
    assert gate is not None
    counts = keep.sum(1)
    call.computed[branch.key] = counts
    index = None if call.valid_BT is None else call.valid_BT.flatten().nonzero()[:, 0]
    u_valid = branch.input_at(flat, index)
    whole = kept.shape[0] == flat.shape[0]
    u = u_valid if whole else branch.input_at(flat, kept, rounded=True)
    given = (u, kept, counts.tolist()) if kept.shape[0] else None
    call.padding[branch.key] = u.shape[0] - kept.shape[0]
    o = attend(branch.module, branch.family, call, inputs, branch.key[0], (u_valid, index), given)
    if whole:
        assert o is not None
        return join(flat, o, u, gate, branch.score_N)
    out = flat.clone()
    if o is not None:
        n = kept.shape[0]
        out = join_at(out, flat, o[:n], u[:n], gate, kept, branch.score_N)
    if branch.compensation is None:
        return out
    skip = (~keep & call.everyone()).flatten().nonzero()[:, 0]
    return _compensate(branch, out, skip, branch.input_at(flat, skip, rounded=True))


def _takes_flat(attention: nn.Module, call: Call) -> bool:
    config: Any = attention.config
    return call.new > 1 and config._attn_implementation == "sdpa"


_Attended = tuple[CacheWriter, Tensor | None, Tensor]
_Fill = tuple[Tensor, tuple[Tensor, Tensor]]


def _attend_flat(
    branch: _Branch, flat: Tensor, inputs: AttentionInputs, keep: Tensor, kept: Tensor, fill: _Fill
) -> _Attended:
    """Kept tokens of all rows as one sequence; returns (writer, o [M, H], u [M, H])."""
    call, layer, n = branch.call, branch.key[0], kept.shape[0]
    rounded = torch.is_grad_enabled() and n > 0
    u = branch.input_at(flat, kept, rounded=rounded)
    padding = u.shape[0] - n
    writer = CacheWriter(
        inputs.cache, call.batch, call.new, kept_N=kept, fill_N=fill[0], fill=fill[1],
        slots_N=torch.arange(n, device=kept.device) if padding else None,
    )  # fmt: skip
    counts = keep.sum(1)
    call.computed[branch.key] = counts
    if n == 0:
        writer.update(None, None, layer)
        return writer, None, flat[:0]
    call.padding[branch.key] = padding
    mask_rows = inputs.mask_rows(call, layer)
    assert mask_rows is not None
    grid = Grid(kept, counts.tolist(), call.new, plain=mask_rows.plain, dtype=flat.dtype)
    where = repeated(kept, u.shape[0])
    arguments = inputs.flat_queries(writer, where, call.batch)
    with GridAttention(grid, mask_rows, padding):
        o = branch.module(hidden_states=u[None], **arguments)[0]
    return writer, o[0, :n], u[:n]


def _attend_grid(
    branch: _Branch, flat: Tensor, inputs: AttentionInputs, keep: Tensor, kept: Tensor, fill: _Fill
) -> _Attended:
    """Kept tokens as a rectangle of rows, ragged ones padded; returns as :func:`_attend_flat`."""
    call, layer = branch.call, branch.key[0]
    position, rows, slots = grid_of(keep, kept)
    writer = CacheWriter(
        inputs.cache, call.batch, call.new,
        kept_N=kept, slots_N=slots, fill_N=fill[0], fill=fill[1], rows_R=rows,
    )  # fmt: skip
    _count(call, branch.key, position, rows)
    if kept.shape[0] == 0:
        writer.update(None, None, layer)
        return writer, None, flat[:0]
    index_RT = flat_positions(position, rows, call.new)
    u = branch.input_at(flat, index_RT.view(-1))
    arguments = inputs.queries(writer, position, rows, call, layer)
    o = branch.module(hidden_states=u.view(*index_RT.shape, -1), **arguments)[0].flatten(0, 1)
    return writer, *((o, u) if slots is None else (o[slots], u[slots]))


def _count(call: Call, key: BranchKey, position: Tensor, rows: Tensor | None) -> None:
    """Rows that entered the attention's projections, ragged padding included."""
    if rows is None:
        call.computed[key] = torch.full((call.batch,), position.shape[1], device=call.device)
    else:
        counts = torch.zeros(call.batch, dtype=torch.int64, device=call.device)
        call.computed[key] = counts.index_fill_(0, rows, 1)


def _compensate(branch: _Branch, out_NH: Tensor, skip: Tensor, u_skip: Tensor | None) -> Tensor:
    """Add the compensation to skipped tokens of the flat stream; ``u_skip`` may have more rows."""
    compensation = branch.compensation
    if compensation is None or skip.shape[0] == 0:
        return out_NH
    assert u_skip is not None
    return compensation.add_at(out_NH, u_skip, skip)


def _learnable(branch: _Branch, out_NH: Tensor, o_MH: Tensor, u_MH: Tensor, kept: Tensor) -> Tensor:
    """``out``, unchanged in value; in training a kept token's decision may get a gradient."""
    call, gate = branch.call, branch.gate
    if call.objective is None or call.thresholds is None or not torch.is_grad_enabled():
        return out_NH
    assert gate is not None
    threshold = call.thresholds[branch.key]
    change = call.objective.decision(gate, o_MH, u_MH, threshold, branch.compensation)
    return out_NH if change is None else out_NH.index_add(0, kept, change.to(out_NH.dtype))


def _mlp(branch: _Branch, h: Tensor, *, owned: bool) -> Tensor:
    """The MLP branch; ``owned``: nobody else holds ``h``, so it may be changed in place."""
    call, gate = branch.call, branch.gate
    keep = branch.decide(h)
    if keep is None or call.masked:
        u = branch.norm(h)
        return _finish_whole(branch, h, u, branch.module(u), keep)
    assert gate is not None
    if call.single:
        if keep is YES or bool(keep):
            u = branch.norm(h)
            return join(h, branch.module(u), u, gate)
        call.computed[branch.key] = torch.zeros(1, dtype=torch.int64)
        return h if branch.compensation is None else h + branch.compensation(branch.norm(h))
    flat = h.flatten(0, 1)
    kept = keep.flatten().nonzero()[:, 0]
    if kept.shape[0] == keep.numel():
        u = branch.input_at(flat, None)
        o = run_mlp(branch.module, branch.family, u)
        out = join(flat, o, u, gate, branch.score_N)
        return _learnable(branch, out, o, u, kept).view_as(h)
    call.computed[branch.key] = keep.sum(1)
    skip = u_skip = None
    if branch.compensation is not None:
        skip = (~keep & call.everyone()).flatten().nonzero()[:, 0]
        u_skip = branch.input_at(flat, skip, rounded=True)
    out = flat if owned else flat.clone()
    if kept.shape[0]:
        u, n = branch.input_at(flat, kept, rounded=True), kept.shape[0]
        call.padding[branch.key] = u.shape[0] - n
        o = run_mlp(branch.module, branch.family, u)[:n]
        out = join_at(out, flat, o, u[:n], gate, kept, branch.score_N)
        out = _learnable(branch, out, o, u[:n], kept)
    if skip is not None:
        out = _compensate(branch, out, skip, u_skip)
    return out.view_as(h)
