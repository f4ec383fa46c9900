r"""The loss of a step: cross-entropy, distillation, and the gates' penalty.

Shapes: B rows, T tokens, N labelled positions, H hidden, V vocabulary, G gate channels.

L = (1 − d)·CE + d·KL(dense ‖ gated) + λ·penalty (arXiv 2510.13876, eq. 3; there the penalty counts
padding, here it does not).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gateskip.config import BranchKey
from gateskip.errors import UnsupportedError
from gateskip.gates import Gate, no_autocast
from gateskip.skipping.call import Call
from gateskip.skipping.quantile import FromBatch, SequenceTopK
from gateskip.training.penalty import BY_MEAN

__all__ = ["GateObjective", "SkipMeter", "labelled", "rates_of"]

IGNORED = -100


def _moves(gate: Gate) -> bool:
    return any(p.requires_grad for p in gate.parameters())


class GateObjective:
    """What gates learn from while a forward runs, beside their value; an ``Override.objective``.

    Args:
        penalty: which one, of :mod:`~gateskip.training.penalty`; None for none.
        slopes: per branch, of penalties on the branch's mean.
        temperature: of straight-through decisions, in units of the score; 0: decisions get none.
        costs: MACs that a skip saves, per branch, for the expected cost; None: not asked for.
        everyone: whether decisions learn from skipped tokens, too (masked execution only).
        hard: whether the cost counts decisions, whose gradient the soft ones have.
        predicts: whether scores learn to be above 0 where the sequence's top-k keeps a token.

    Attributes:
        sums: float32 scalars with a graph, one per branch: Σ over valid tokens of the penalty.
        values: without a graph, Σ over valid tokens of the mean g, for penalties on means.
        spent: the same of the soft decision times the branch's share of all MACs.
        missed: the same of the cross-entropy of that prediction.
        tokens: valid tokens of the forward; of all of them where a loss runs several.
    """

    def __init__(
        self,
        *,
        penalty: str | None = "l2",
        slopes: Mapping[BranchKey, float] | None = None,
        temperature: float = 0.0,
        costs: Mapping[BranchKey, float] | None = None,
        everyone: bool = False,
        hard: bool = False,
        predicts: bool = False,
    ) -> None:
        self.everyone, self.hard = everyone, hard
        self.predicts = predicts
        self.missed: dict[BranchKey, Tensor] = {}
        self.penalty, self.slopes, self.temperature = penalty, slopes, temperature
        self.values: dict[BranchKey, Tensor] = {}
        total = sum(costs.values()) if costs else 1.0
        self.shares = {key: cost / total for key, cost in (costs or {}).items()}
        self.sums: dict[BranchKey, Tensor] = {}
        self.spent: dict[BranchKey, Tensor] = {}
        self.tokens = 0

    def branch(self, key: BranchKey, gate: Gate, u_BTH: Tensor, call: Call) -> None:
        """Called by every gated branch, with its detached input."""
        if not torch.is_grad_enabled():
            return  # a reference model's forward, as in DPO, teaches nothing
        valid_BT = call.everyone()
        found: list[tuple[dict[BranchKey, Tensor], Tensor]] = []
        if self.penalty and next(gate.parameters(), None) is not None:  # a unit gate has none
            g = gate(u_BTH)
            each_BT = (g.square() if self.penalty == "l2" else g).mean(-1) * valid_BT
            total = each_BT.sum()
            if self.penalty in BY_MEAN:
                assert self.slopes is not None
                found.append((self.values, total.detach()))
                total = total * self.slopes[key]
            found.append((self.sums, total))
        threshold = None if call.thresholds is None else call.thresholds.get(key)
        known = not isinstance(threshold, FromBatch) and threshold not in (None, -math.inf)
        if self.temperature and self.shares and known:
            assert threshold is not None
            p_BT = self._soft(gate, u_BTH, threshold, call.noise(key))
            if self.hard:
                p_BT = p_BT - p_BT.detach() + (p_BT.detach() >= 0.5)
            found.append((self.spent, (p_BT * valid_BT).sum() * self.shares[key]))
        if self.predicts and isinstance(threshold, SequenceTopK) and _moves(gate):
            found.append((self.missed, self._missed(gate, u_BTH, threshold, call)))
        if key in call.learned:
            return  # gradient checkpointing runs this again, for its graph; it counts once
        for where, total in found:
            if where is not self.values and not total.requires_grad:
                raise UnsupportedError("gates without gradients cannot learn; train_gates=True.")
            where[key] = where[key] + total if key in where else total
        if not call.learned:
            self.tokens += int(valid_BT.sum())
        call.learned.add(key)

    def decision(
        self,
        gate: Gate,
        o_MH: Tensor,
        u_MH: Tensor,
        threshold: float | Tensor,
        instead: nn.Module | None,
        gained_MH: Tensor | None = None,
        noise_M: Tensor | None = None,
    ) -> Tensor | None:
        """Zeros ``[M, H]`` whose gradient is that of keeping a token (straight-through).

        With p = σ((s + noise − τ)/T): (p − p) · (g ⊙ o − c(u)), of kept tokens only where what a
        skipped token would have got was not computed.

        Args:
            gained_MH: what the branch adds, where that is not g ⊙ o.
            noise_M: what was added to the scores that decided.
        """
        if not self.temperature:
            return None
        if not isinstance(threshold, float) and threshold.dim():
            raise UnsupportedError("decision_gradient takes one budget for all rows.")
        p_M = self._soft(gate, u_MH.detach(), threshold, noise_M)
        with torch.no_grad():
            gain_MH = gate(u_MH) * o_MH.float() if gained_MH is None else gained_MH.float()
            if instead is not None:
                gain_MH = gain_MH - instead(u_MH).float()
        return (p_M - p_M.detach())[:, None] * gain_MH

    @staticmethod
    def _missed(gate: Gate, u_BTH: Tensor, threshold: SequenceTopK, call: Call) -> Tensor:
        free_BT = call.free()
        with no_autocast(u_BTH):
            z_BT = gate.score(u_BTH)
            least_B = threshold.threshold(z_BT.detach(), free_BT, call.everyone())
            kept_BT = (z_BT.detach() >= least_B[:, None]).to(z_BT.dtype)
            each_BT = nn.functional.binary_cross_entropy_with_logits(
                z_BT, kept_BT, reduction="none"
            )
        return (each_BT * free_BT).sum()

    def _soft(
        self, gate: Gate, u: Tensor, threshold: float | Tensor, noise: Tensor | None
    ) -> Tensor:
        with no_autocast(u):
            s = gate.score(u) if noise is None else gate.score(u) + noise
            return torch.sigmoid((s - threshold) / self.temperature)

    def mean(self, tokens: Tensor | int | None = None) -> Tensor:
        """The penalty, over ``tokens`` valid tokens (of a whole accumulated batch) or its own."""
        total = torch.stack(self._graphs(self.sums)).mean()
        return total / (self.tokens if tokens is None else tokens)

    def cost(self, tokens: Tensor | int | None = None) -> Tensor:
        """Expected share of what skips can save that is spent, over tokens as in :meth:`mean`."""
        total = torch.stack(self._graphs(self.spent)).sum() + self._always() * self.tokens
        return total / (self.tokens if tokens is None else tokens)

    def _always(self) -> float:
        """Share of the costs that branches without a threshold have: they keep everyone."""
        return sum(share for key, share in self.shares.items() if key not in self.spent)

    def excess(self, kind: str, target: float, tokens: Tensor | int | None = None) -> Tensor:
        """What of :meth:`cost` is penalised, over tokens as there.

        Args:
            kind: ``"linear"``: all of it; ``"hinge"``: what each branch spends above the target
                (arXiv 2410.13184); ``"absolute"``: how far the whole is from it (arXiv 2506.04179).
            target: share of what skips can save that may be spent.

        Of an accumulated batch it is the mean over its parts, which is at least that of the whole.
        """
        if kind == "linear":
            return self.cost(tokens)
        each = torch.stack(self._graphs(self.spent)) / self.tokens
        if kind == "hinge":
            share = torch.tensor([self.shares[key] for key in self.spent], device=each.device)
            found = (each - target * share).relu().sum()
        else:
            found = (each.sum() + self._always() - target).abs()
        return found if tokens is None else found * (self.tokens / tokens)

    def prediction(self, tokens: Tensor | int | None = None) -> Tensor:
        """Cross-entropy of predicted top-k, mean over branches, over tokens as in :meth:`mean`."""
        total = torch.stack(self._graphs(self.missed)).mean()
        return total / (self.tokens if tokens is None else tokens)

    @staticmethod
    def _graphs(sums: dict[BranchKey, Tensor]) -> tuple[Tensor, ...]:
        if not sums or not next(iter(sums.values())).requires_grad:
            raise UnsupportedError(
                "the gates' penalty has no gradient: gradient checkpointing has to be of the kind "
                "that keeps a graph (gradient_checkpointing_kwargs={'use_reentrant': False})."
            )
        return tuple(sums.values())


class SkipMeter:
    """Counts decisions by branch kind while training; an ``Override.recorder``."""

    def __init__(self) -> None:
        self.kept: dict[str, list[Tensor]] = {}
        self.pairs: dict[str, int] = {}

    def record(self, call: Call) -> None:
        """Called when a decoder call has ended."""
        everyone = call.everyone()
        valid = int(everyone.sum())
        for key in call.state.branches:
            keep_BT = call.keep.get(key, everyone)
            self.kept.setdefault(key[1], []).append(keep_BT.sum())
            self.pairs[key[1]] = self.pairs.get(key[1], 0) + valid

    def take(self) -> dict[str, tuple[int, int]]:
        """(kept, pairs) by branch kind since the last time."""
        kept = {kind: int(torch.stack(parts).sum()) for kind, parts in self.kept.items()}
        found = {kind: (kept[kind], pairs) for kind, pairs in self.pairs.items()}
        self.kept, self.pairs = {}, {}
        return found

    def rates(self) -> dict[str, float]:
        """``skip_rate`` and one per branch kind; empties the meter."""
        return rates_of([self.take()])


def rates_of(counts: Sequence[Mapping[str, tuple[int, int]]]) -> dict[str, float]:
    """``skip_rate``, and one per branch kind, of what several processes counted."""
    kept: Counter[str] = Counter()
    pairs: Counter[str] = Counter()
    for mine in counts:
        for kind, (some, of) in mine.items():
            kept[kind] += some
            pairs[kind] += of
    total = sum(pairs.values())
    if not total:
        return {}
    each = {f"skip_rate_{kind}": 1.0 - kept[kind] / n for kind, n in pairs.items() if n}
    return {"skip_rate": 1.0 - sum(kept.values()) / total} | each


def labelled(labels_BT: Tensor) -> Tensor:
    """Positions whose next token is labelled, bool ``[B, T − 1]``."""
    return labels_BT[:, 1:] != IGNORED
