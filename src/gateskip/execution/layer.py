"""The forward pass of one gated decoder layer, masked or compacted.

Shapes: B rows, T new tokens, N gathered tokens, R and Tq the attention's grid, H hidden.

Compacted: decide from the residual stream, gather the kept tokens, run the family's own modules on
them, scatter the results. Prefill gathers tokens, batched decoding gathers rows, batch-1 decoding
does not call the branch at all. Nothing falls back from one execution to the other.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from gateskip.config import BranchKey
from gateskip.errors import UnsupportedError
from gateskip.execution.inputs import AttentionInputs, flat_positions, grid_of, rows_at
from gateskip.gates import Gate
from gateskip.retrofit.families import FamilySpec
from gateskip.skipping.call import Call
from gateskip.skipping.compensation import compensation_of
from gateskip.skipping.key_values import CacheWriter, flat_tokens, project_kv
from gateskip.skipping.masked import join, masked_join
from gateskip.skipping.score import branch_score, single_score

__all__ = ["layer_forward"]


class _Branch:
    """One branch of one layer during one call."""

    __slots__ = ("call", "compensation", "family", "gate", "key", "module", "norm")

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

    @property
    def eps(self) -> float:
        return float(getattr(self.norm, self.family.norm_eps))

    def decide(self, h_BTH: Tensor) -> Tensor | None:
        """The keep mask, or None where nobody can be skipped."""
        call = self.call
        if self.gate is None or not call.decides or self.fixed:
            return None
        if self.key in call.keep:
            return call.keep[self.key]
        importance = call.state.config.importance
        plain = call.forced is None and call.scores is None and importance == "mean_logit"
        if call.single and plain:
            return self._decide_single(h_BTH)
        # A hard decision has no gradient; without a graph, recomputation can replay it as it is.
        with torch.no_grad():
            score_BT = branch_score(h_BTH, self.norm, self.eps, self.gate, importance)
        return call.decide(self.key, score_BT)

    @property
    def fixed(self) -> bool:
        """The first attention has no earlier K/V to copy, so ``previous`` never skips it."""
        return self.key == (0, "attention") and self.call.state.config.kv_source == "previous"

    def _decide_single(self, h_11H: Tensor) -> Tensor:
        call, gate = self.call, self.gate
        assert gate is not None
        assert call.thresholds is not None
        w_H, b = gate.decision_vector()
        weight = cast(Tensor, self.norm.weight)
        stamp = (w_H.data_ptr(), weight.data_ptr(), weight._version)
        cached = vars(gate).get("_scaled")
        if cached is None or cached[0] != stamp:
            cached = (stamp, w_H * weight.detach().float(), w_H)
            vars(gate)["_scaled"] = cached
        score = single_score(h_11H.detach().view(-1), cached[1], b, self.eps)
        kept = score >= call.thresholds[self.key] or call.protected_BT is not None
        keep_BT = _YES if kept else _NO
        call.keep[self.key] = keep_BT
        return keep_BT


_YES = torch.ones(1, 1, dtype=torch.bool)
_NO = torch.zeros(1, 1, dtype=torch.bool)


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
    inputs = AttentionInputs.of(kwargs)
    h = _attention(_Branch(layer, call, "attention", index), hidden_states, inputs)
    h = _mlp(_Branch(layer, call, "mlp", index), h)
    if call.recorder is not None and index == call.state.shape.layers - 1:
        call.recorder.record(call)
        call.recorder = None  # recomputation must not count twice
    return h


def _attention(branch: _Branch, h: Tensor, inputs: AttentionInputs) -> Tensor:
    call = branch.call
    keep = branch.decide(h)
    copies = call.state.config.kv_source == "previous"
    if keep is None or call.masked:
        u = branch.norm(h)
        cache = inputs.cache
        writer = _masked_writer(branch, inputs, keep) if copies else None
        o = branch.module(hidden_states=u, **inputs.whole(writer or cache))[0]
        if writer is not None and writer.written is not None:
            call.kv[branch.key[0]] = writer.written
        return _finish_whole(branch, h, u, o, keep)
    if call.single:
        return _attention_single(branch, h, inputs, keep, copies)
    return _attention_compacted(branch, h, inputs, keep, copies)


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
    return masked_join(h, o, u, gate, keep, call.everyone(), branch.compensation)


def _attention_single(
    branch: _Branch, h: Tensor, inputs: AttentionInputs, keep: Tensor, copies: bool
) -> Tensor:
    call, gate = branch.call, branch.gate
    layer, attention = branch.key[0], branch.module
    assert gate is not None
    if keep is _YES or bool(keep):
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
    position, rows, kept, slots = grid_of(keep)
    if kept.shape[0] == keep.numel():
        u = branch.norm(h)
        writer = CacheWriter(inputs.cache, call.batch, call.new) if copies else None
        o = attention(hidden_states=u, **inputs.whole(writer or inputs.cache))[0]
        if writer is not None and writer.written is not None:
            call.kv[layer] = writer.written
        return join(h, o, u, gate)
    skip = (~keep & call.everyone()).flatten().nonzero()[:, 0]
    flat = h.flatten(0, 1)
    h_skip = flat.index_select(0, skip)
    u_skip = None if copies and branch.compensation is None else branch.norm(h_skip)
    if copies:
        k, v = call.kv[layer - 1]
        fill = (flat_tokens(k, skip), flat_tokens(v, skip))
    else:
        assert u_skip is not None
        cos, sin = inputs.tables(call.batch)
        tables = cos.index_select(0, skip), sin.index_select(0, skip)
        fill = project_kv(attention, u_skip, *tables, branch.family.k_norm)
    writer = CacheWriter(
        inputs.cache, call.batch, call.new,
        kept_N=kept, slots_N=slots, fill_N=skip, fill=fill, rows_R=rows,
    )  # fmt: skip
    out = flat.clone()
    if kept.shape[0]:
        h_q = rows_at(h, flat_positions(position, rows, call.new))
        u_q = branch.norm(h_q)
        arguments = inputs.queries(writer, position, rows, call.past, layer)
        o = attention(hidden_states=u_q, **arguments)[0]
        joined = join(h_q, o, u_q, gate).flatten(0, 1)
        out.index_copy_(0, kept, joined if slots is None else joined[slots])
    else:
        writer.update(None, None, layer)
    if copies:
        assert writer.written is not None
        call.kv[layer] = writer.written
    _count(call, branch.key, position, rows)
    return _compensate(branch, out, skip, h_skip, u_skip).view_as(h)


def _count(call: Call, key: BranchKey, position: Tensor, rows: Tensor | None) -> None:
    """Rows that entered the attention's projections, ragged padding included."""
    if rows is None:
        call.computed[key] = torch.full((call.batch,), position.shape[1], device=call.device)
    else:
        counts = torch.zeros(call.batch, dtype=torch.int64, device=call.device)
        call.computed[key] = counts.index_fill_(0, rows, 1)


def _compensate(
    branch: _Branch, out_NH: Tensor, skip: Tensor, h_skip: Tensor, u_skip: Tensor | None
) -> Tensor:
    """Add the compensation to skipped tokens of the flat stream."""
    compensation = branch.compensation
    if compensation is None or skip.shape[0] == 0:
        return out_NH
    if u_skip is None:
        u_skip = branch.norm(h_skip)
    return out_NH.index_copy_(0, skip, h_skip + compensation(u_skip))


def _mlp(branch: _Branch, h: Tensor) -> Tensor:
    call, gate = branch.call, branch.gate
    keep = branch.decide(h)
    if keep is None or call.masked:
        u = branch.norm(h)
        return _finish_whole(branch, h, u, branch.module(u), keep)
    assert gate is not None
    if call.single:
        if keep is _YES or bool(keep):
            u = branch.norm(h)
            return join(h, branch.module(u), u, gate)
        call.computed[branch.key] = torch.zeros(1, dtype=torch.int64)
        return h if branch.compensation is None else h + branch.compensation(branch.norm(h))
    kept = keep.flatten().nonzero()[:, 0]
    if kept.shape[0] == keep.numel():
        u = branch.norm(h)
        return join(h, branch.module(u), u, gate)
    call.computed[branch.key] = keep.sum(1)
    flat = h.flatten(0, 1)
    out = flat.clone()
    if kept.shape[0]:
        h_k = flat.index_select(0, kept)
        u_k = branch.norm(h_k)
        out.index_copy_(0, kept, join(h_k, branch.module(u_k), u_k, gate))
    if branch.compensation is not None:
        skip = (~keep & call.everyone()).flatten().nonzero()[:, 0]
        out = _compensate(branch, out, skip, flat.index_select(0, skip), None)
    return out.view_as(h)
