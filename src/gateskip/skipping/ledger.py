"""The ledger: what calls really computed, in MACs and bytes, net of everything we added.

Shapes: B rows, T new tokens. A ledger is derived from recorded calls and the cost formulas; tests
hold it against hooks on the real modules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from gateskip.config import BranchKey
from gateskip.costs import BranchCost
from gateskip.skipping.call import Call

__all__ = ["CallRecord", "Ledger", "Trace"]


@dataclasses.dataclass(frozen=True, slots=True)
class CallRecord:
    """One decoder call as it happened.

    Attributes:
        keep: decision per gated branch, bool ``[B, T]``.
        computed: rows that entered a branch's projections, per batch row, int64 ``[B]``.
        padding: rows of zeros added to round up a branch's row count; none of them has K/V.
        asked: per branch whose rule costs something: (tokens that it scored ``[B]``, MACs of one).
        valid_BT: real tokens. keys_BT: visible keys per token.
        decided: whether scores were computed. costs: branch costs at the time.
        kv_bytes: bytes of one cached token (K and V) of one layer.
        top_k: keys whose values a query reads; None: all.
    """

    keep: dict[BranchKey, Tensor]
    computed: dict[BranchKey, Tensor]
    padding: dict[BranchKey, int]
    valid_BT: Tensor
    keys_BT: Tensor
    decided: bool
    costs: dict[BranchKey, BranchCost]
    weight_bytes: int
    kv_bytes: int
    asked: dict[BranchKey, tuple[Tensor, int]] = dataclasses.field(default_factory=dict)
    top_k: int | None = None

    @classmethod
    def of(cls, call: Call) -> CallRecord:
        """Freeze a finished call."""
        everyone = call.everyone()
        shape = call.state.shape
        costs = call.state.costs(alike=call.alike)
        if call.ungated:
            costs = {k: dataclasses.replace(c, kept_gate=0, gate_weights=0)
                     for k, c in costs.items()}  # fmt: skip
        where = call.device  # of the last layers
        keep = {key: call.keep.get(key, everyone).to(where) for key in call.state.branches}
        full = torch.full((call.batch,), call.new, device=where)
        computed = {key: call.computed.get(key, full).to(where) for key in costs}
        return cls(
            keep=keep,
            computed=computed,
            padding=dict(call.padding),
            valid_BT=everyone,
            keys_BT=call.visible_keys(),
            decided=call.decides,
            costs=costs,
            weight_bytes=shape.weight_bytes,
            kv_bytes=2 * shape.kv_heads * shape.head_dim * shape.weight_bytes,
            asked=_asked(call, everyone),
            top_k=call.top_k,
        )

    def read(self, keys: Tensor) -> Tensor:
        """Visible keys as pairs of a key and a value that are read."""
        if self.top_k is None:
            return keys
        return (keys + keys.clamp(max=self.top_k)).double() / 2

    def without_padding(self) -> CallRecord:
        """The same call as if every kept token had been computed alone: a policy's cost, which
        does not depend on how tokens are batched."""
        kept = {key: self.keep.get(key, self.valid_BT).sum(1) for key in self.computed}
        return dataclasses.replace(self, computed=kept, padding={})


def _asked(call: Call, everyone: Tensor) -> dict[BranchKey, tuple[Tensor, int]]:
    macs = getattr(call.state.rule, "macs", None)
    if macs is None or not call.decides:
        return {}
    every_B = everyone.sum(1)
    each = {key: int(macs(key, call.state.shape)) for key in call.state.branches}
    return {
        key: (call.asked.get(key, every_B).to(call.device), cost)
        for key, cost in each.items()
        if cost
    }


def _sum(values: Tensor) -> Tensor:
    return values.double().sum(-1)


def macs_of(record: CallRecord) -> tuple[Tensor, Tensor]:
    """(dense, spent) decoder MACs per batch row, float64 ``[B]`` each.

    Dense counts valid tokens; spent counts what entered the modules, padding included.
    """
    valid, keys = record.valid_BT, record.keys_BT
    dense = torch.zeros(valid.shape[0], dtype=torch.float64, device=valid.device)
    spent = torch.zeros_like(dense)
    n_valid, all_keys = _sum(valid), _sum(keys * valid)
    for branch, cost in record.costs.items():
        keep = record.keep.get(branch, valid)
        rows = record.computed[branch].double()
        dense += cost.computed * n_valid + cost.per_key * all_keys
        n_skipped = _sum(valid & ~keep)
        spent += cost.computed * rows + cost.per_key * _sum(record.read(keys) * keep)
        spent += cost.kept_gate * rows + cost.skipped * n_skipped
        # Shared by the batch rows, whose tokens were rounded up together.
        added = record.padding.get(branch, 0) / rows.shape[0]
        spent += (cost.computed - cost.weights_kv) * added
        if record.decided:
            spent += cost.decision * n_valid
    for tokens, macs in record.asked.values():
        spent += macs * tokens.double()
    return dense, spent


def bytes_of(record: CallRecord) -> tuple[float, float]:
    """(dense, spent) bytes read by one call: weights once, gates in float32, cached K and V."""
    dense = spent = 0.0
    valid, keys = record.valid_BT, record.keys_BT
    longest = (keys * valid).amax(-1).double()
    # Queries of one call pick different keys, so several of them read all values.
    seen = record.read(longest) if valid.shape[1] == 1 else longest
    for branch, cost in record.costs.items():
        keep = record.keep.get(branch, valid)
        weights = cost.weights * record.weight_bytes
        cached = record.kv_bytes if branch[1] == "attention" else 0
        dense += weights + cached * float(longest.sum())
        kept_rows = record.computed[branch] > 0
        if bool(kept_rows.any()):
            spent += weights + 4 * cost.gate_weights + cached * float(seen[kept_rows].sum())
        if bool((valid & ~keep).any()):
            spent += cost.skipped_weights * record.weight_bytes
            if not bool(kept_rows.any()):
                spent += cost.weights_kv * record.weight_bytes
        if record.decided:
            spent += 4 * cost.decision_weights
    for tokens, macs in record.asked.values():  # as many weights as products for one token
        spent += macs * record.weight_bytes if bool((tokens > 0).any()) else 0
    return dense, spent


@dataclasses.dataclass(frozen=True, slots=True)
class Ledger:
    """Sums over recorded calls.

    Attributes:
        macs_dense, macs_spent: decoder MACs without the LM head.
        bytes_dense, bytes_spent: bytes read.
        pairs, pairs_kept: valid token×branch pairs of gated branches.
        rows_dense, rows_spent: MACs per batch row of the last batch size seen.
    """

    macs_dense: float
    macs_spent: float
    bytes_dense: float
    bytes_spent: float
    pairs: int
    pairs_kept: int
    rows_dense: tuple[float, ...]
    rows_spent: tuple[float, ...]

    @property
    def skip_rate(self) -> float:
        """Share of token×branch pairs skipped (not a saving)."""
        return 1.0 - self.pairs_kept / self.pairs if self.pairs else 0.0

    @property
    def compute(self) -> float:
        """Share of dense decoder MACs spent, net."""
        return self.macs_spent / self.macs_dense if self.macs_dense else 1.0

    @classmethod
    def of(cls, records: Iterable[CallRecord]) -> Ledger:
        """Add up records."""
        dense = spent = bytes_dense = bytes_spent = 0.0
        pairs = kept = 0
        rows_dense: Tensor | None = None
        rows_spent: Tensor | None = None
        for record in records:
            d, s = (t.cpu() for t in macs_of(record))
            dense += float(d.sum())
            spent += float(s.sum())
            b_dense, b_spent = bytes_of(record)
            bytes_dense += b_dense
            bytes_spent += b_spent
            pairs += int(record.valid_BT.sum()) * len(record.keep)
            kept += sum(int(mask.sum()) for mask in record.keep.values())
            if rows_dense is None or rows_spent is None or rows_dense.shape != d.shape:
                rows_dense, rows_spent = d.clone(), s.clone()
            else:
                rows_dense += d
                rows_spent += s
        return cls(
            macs_dense=dense,
            macs_spent=spent,
            bytes_dense=bytes_dense,
            bytes_spent=bytes_spent,
            pairs=pairs,
            pairs_kept=kept,
            rows_dense=() if rows_dense is None else tuple(rows_dense.tolist()),
            rows_spent=() if rows_spent is None else tuple(rows_spent.tolist()),
        )


class Trace:
    """Decisions of all calls within a ``gateskip.trace`` block."""

    def __init__(self) -> None:
        self.calls: list[CallRecord] = []

    def record(self, call: Call) -> None:
        """Called when a decoder call has ended."""
        self.calls.append(CallRecord.of(call))

    @property
    def keep(self) -> dict[BranchKey, list[Tensor]]:
        """``(layer, kind)`` to one bool ``[B, T]`` per call."""
        keys = self.calls[0].keep if self.calls else {}
        return {key: [call.keep[key] for call in self.calls] for key in keys}

    @property
    def ledger(self) -> Ledger:
        """What the calls cost."""
        return Ledger.of(self.calls)
