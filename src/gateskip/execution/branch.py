"""One branch of one layer during one call: its modules, its input, its decision, its output.

Shapes: B rows, T new tokens, N flat tokens, M selected ones, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gateskip.config import LINEAR_IMPORTANCES
from gateskip.execution.rounding import rounded_rows
from gateskip.execution.token import NO, YES
from gateskip.gates import Gate
from gateskip.retrofit.families import FamilySpec
from gateskip.skipping.call import Call
from gateskip.skipping.compensation import compensation_of
from gateskip.skipping.join import join, join_at, scale
from gateskip.skipping.policy import OFF
from gateskip.skipping.rule import rule_of
from gateskip.skipping.score import (
    RAW,
    Norm,
    branch_score,
    normed_at,
    random_score,
    scaled_vector,
    single_score,
)

__all__ = ["Branch"]


class Branch:
    """What a gated layer's forward pass asks of an attention or an MLP."""

    __slots__ = (
        "apart", "before", "call", "compensation", "family", "gate", "inverse", "key", "layer",
        "module", "norm", "read", "score_N",
    )  # fmt: skip

    def __init__(self, layer: nn.Module, call: Call, kind: str, index: int) -> None:
        family: FamilySpec = call.state.family
        self.call, self.family, self.key, self.layer = call, family, (index, kind), layer
        self.module: nn.Module = getattr(
            layer, family.attention if kind == "attention" else family.mlp
        )
        self.norm = Norm.of(layer, family, kind)
        config = call.state.config
        self.read = RAW if config.gate_input == "raw" else self.norm  # what the gate reads
        gate = self.module._modules.get("skip_gate")
        self.gate = gate if isinstance(gate, Gate) else None
        self.before = config.placement == "before" and self.gate is not None
        #: Whether the gate acts elsewhere than where the branch joins the stream.
        self.apart = self.before or config.placement == "layer"
        self.compensation = compensation_of(self.module)
        self.inverse: Tensor | None = None  # 1 / rms(h), where scoring found it
        self.score_N: Tensor | None = None  # mean logits of all tokens, likewise

    # -- input and output -------------------------------------------------------------------

    def inputs(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """(the module's input, the gate's) of a residual; mostly one and the same tensor."""
        x = h if self.norm.module is None else self.norm(h)
        u = x if self.read is self.norm and self.norm.module is not None else self.read(h)
        return self._scaled(x, u), u

    def _scaled(self, x: Tensor, u: Tensor) -> Tensor:
        """g(u) ⊙ x where the gate acts before the branch."""
        if not self.before or (self.call.observer is not None and self.call.observer.ungated):
            return x
        assert self.gate is not None
        return scale(x, u, self.gate)

    def inputs_at(
        self, h_NH: Tensor, index_M: Tensor | None, *, rounded: bool = False
    ) -> tuple[Tensor, Tensor]:
        """:meth:`inputs` of the tokens at flat indices (None: all), ``[M, H]`` each.

        More, zero rows if rounded.
        """
        x_MH, u_MH = self._read_at(h_NH, index_M, rounded=rounded)
        return self._scaled(x_MH, u_MH), u_MH

    def read_at(self, h_NH: Tensor, index_M: Tensor | None, *, rounded: bool = False) -> Tensor:
        """The gate's input alone, as in :meth:`inputs_at`."""
        return self._read_at(h_NH, index_M, rounded=rounded)[1]

    def _read_at(
        self, h_NH: Tensor, index_M: Tensor | None, *, rounded: bool
    ) -> tuple[Tensor, Tensor]:
        rows = h_NH.shape[0] if index_M is None else index_M.shape[0]
        if rounded:
            rows = rounded_rows(rows, h_NH.dtype, h_NH.device)
        same = self.read is self.norm
        if self.norm.module is not None and same:
            u_MH = normed_at(h_NH, self.norm, self.inverse, index_M, rows)
            return u_MH, u_MH
        h_MH = h_NH if index_M is None else h_NH.index_select(0, index_M)
        more = rows - h_MH.shape[0]
        h_MH = nn.functional.pad(h_MH, (0, 0, 0, more)) if more else h_MH
        x_MH = h_MH if self.norm.module is None else self.norm(h_MH)
        return x_MH, self.read(h_MH)

    def out(self, o: Tensor) -> Tensor:
        """What a branch's output adds to the residual: post-norm, dropout and multiplier on it."""
        attention = self.key[1] == "attention"
        for name in self.family.attention_out if attention else self.family.mlp_out:
            o = getattr(self.layer, name)(o)
        if self.family.multiplier is not None:
            o = o * getattr(self.layer, self.family.multiplier)
        return o

    def join(self, base: Tensor, o: Tensor, u: Tensor, score_N: Tensor | None = None) -> Tensor:
        """``base`` plus what the branch adds for every token: g(u) ⊙ o, or o."""
        if self.gate is None or self.apart:
            return base + o
        return join(base, o, u, self.gate, score_N)

    def join_at(
        self, out_NH: Tensor, base_NH: Tensor, o_MH: Tensor, u_MH: Tensor, index_M: Tensor
    ) -> Tensor:
        """``out`` with rows ``index_M`` set to what :meth:`join` makes of them."""
        if self.gate is None or self.apart:
            return out_NH.index_copy_(0, index_M, base_NH.index_select(0, index_M) + o_MH)
        return join_at(out_NH, base_NH, o_MH, u_MH, self.gate, index_M, self.score_N)

    # -- decision ---------------------------------------------------------------------------

    def decide(self, h_BTH: Tensor) -> Tensor | None:
        """The keep mask, or None where nobody can be skipped."""
        call = self.call
        if call.objective is not None and self.gate is not None:
            detached = self.gate.detach_input
            u_BTH = self.read(h_BTH.detach() if detached else h_BTH)
            u_BTH = u_BTH.detach() if detached else u_BTH
            call.objective.branch(self.key, self.gate, u_BTH, call)
        if self.gate is None or not call.decides or self.fixed:
            return None
        if self.key in call.keep:
            return call.keep[self.key]
        if self.key[1] == "mlp" and call.state.config.decision == "layer":
            keep_BT = call.keep.get((self.key[0], "attention"))
            if keep_BT is not None:
                call.keep[self.key] = keep_BT
            return keep_BT
        importance = call.state.config.importance
        plain = call.forced is None and call.scores is None and importance in LINEAR_IMPORTANCES
        plain = plain and self.gate.decides_linearly()
        if call.single and plain and self.read.scales:
            return self._decide_single(h_BTH)
        # A hard decision has no gradient; without a graph, recomputation can replay it as it is.
        if importance == "random":
            return call.decide(self.key, random_score(call.visible_keys(), self.key, call.seed))
        if importance == "rule":
            if call.known:  # a rule may be as dear as an LM head
                return call.decide(self.key, h_BTH.new_zeros(h_BTH.shape[:2]))
            with torch.no_grad():
                return call.decide(self.key, rule_of(call.state).score(self.key, h_BTH, call))
        with torch.no_grad():
            score_BT, self.inverse = branch_score(h_BTH, self.read, self.gate, importance)
        if self.inverse is not None and not self.norm.hooked:
            self.score_N = score_BT.flatten()
        return call.decide(self.key, score_BT)

    def source_is(self, name: str) -> bool:
        """Whether skipped tokens have their keys and values from there."""
        return self.call.state.config.kv_source == name

    @property
    def source(self) -> int | None:
        """The layer whose K/V ``previous`` copies: the last one before with the same attention."""
        return self.call.state.sources[self.key[0]]

    @property
    def fixed(self) -> bool:
        """An attention without earlier K/V to copy, so ``previous`` never skips it."""
        if self.key[1] != "attention" or self.call.state.config.kv_source != "previous":
            return False
        return self.source is None

    def _decide_single(self, h_11H: Tensor) -> Tensor:
        call, gate = self.call, self.gate
        assert gate is not None
        assert call.thresholds is not None
        w_H, b = scaled_vector(gate, self.read)
        score = single_score(h_11H.detach().view(-1), w_H, b, self.read.eps)
        threshold = call.thresholds[self.key]
        kept = score >= threshold or (call.protected_BT is not None and threshold < OFF)
        keep_BT = YES if kept else NO
        call.keep[self.key] = keep_BT
        return keep_BT
