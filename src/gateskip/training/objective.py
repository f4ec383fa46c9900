r"""The loss of a step: cross-entropy, distillation, and the gates' penalty.

Shapes: B rows, T tokens, N labelled positions, H hidden, V vocabulary, G gate channels.

L = (1 − d)·CE + d·KL(dense ‖ gated) + λ·mean over branches, valid tokens and channels of g²
(arXiv 2510.13876, eq. 3; there the penalty counts padding, here it does not).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gateskip.config import BranchKey
from gateskip.errors import UnsupportedError
from gateskip.gates import Gate
from gateskip.skipping.call import Call

__all__ = ["GatePenalty", "SkipMeter", "head_loss", "labelled"]

CHUNK = 256  # positions whose logits exist at once
IGNORED = -100


class GatePenalty:
    """Sums g² over valid tokens and channels while a forward runs; an ``Override.objective``.

    Attributes:
        sums: float32 scalars with a graph, one per branch: Σ over valid tokens of mean g².
        tokens: valid tokens of the forward.
    """

    def __init__(self) -> None:
        self.sums: dict[BranchKey, Tensor] = {}
        self.tokens = 0

    def branch(self, key: BranchKey, gate: Gate, u_BTH: Tensor, call: Call) -> None:
        """Called by every gated branch, with its detached input."""
        square_BT = gate(u_BTH).square().mean(-1)
        total = (square_BT * call.everyone()).sum()
        # Under gradient checkpointing this runs again; the same operations, counted once.
        if key in self.sums:
            return
        if torch.is_grad_enabled() and not total.requires_grad:
            raise UnsupportedError("the gates need gradients for their penalty; train_gates=True.")
        self.sums[key] = total
        self.tokens = int(call.everyone().sum())

    def mean(self, tokens: Tensor | int | None = None) -> Tensor:
        """The penalty, over ``tokens`` valid tokens (of a whole accumulated batch) or its own."""
        if not self.sums or not next(iter(self.sums.values())).requires_grad:
            raise UnsupportedError(
                "the gates' penalty has no gradient: gradient checkpointing has to be of the kind "
                "that keeps a graph (gradient_checkpointing_kwargs={'use_reentrant': False})."
            )
        total = torch.stack(tuple(self.sums.values())).mean()
        return total / (self.tokens if tokens is None else tokens)


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

    def rates(self) -> dict[str, float]:
        """``skip_rate`` and one per branch kind; empties the meter."""
        kept = {kind: int(torch.stack(parts).sum()) for kind, parts in self.kept.items()}
        rates = {f"skip_rate_{kind}": 1.0 - kept[kind] / n for kind, n in self.pairs.items() if n}
        total = sum(self.pairs.values())
        if total:
            rates = {"skip_rate": 1.0 - sum(kept.values()) / total} | rates
        self.kept, self.pairs = {}, {}
        return rates


def labelled(labels_BT: Tensor) -> Tensor:
    """Positions whose next token is labelled, bool ``[B, T − 1]``."""
    return labels_BT[:, 1:] != IGNORED


def head_loss(
    head: nn.Module,
    hidden_NH: Tensor,
    target_N: Tensor,
    teacher_NH: Tensor | None = None,
    distill: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(Σ cross-entropy, Σ KL(teacher ‖ student)) over labelled positions, float32.

    Never holds the logits of more than ``CHUNK`` positions, in the backward pass neither.

    Args:
        head: the LM head. hidden_NH, teacher_NH: its inputs, the teacher's without a graph.
    """
    zero = hidden_NH.new_zeros((), dtype=torch.float32)
    loss, kl = zero, zero

    def chunk(h: Tensor, target: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = head(h).float()
        entropy = nn.functional.cross_entropy(logits, target, reduction="sum")
        if teacher is None:
            return entropy, zero
        with torch.no_grad():
            wanted = head(teacher).float().log_softmax(-1)
        divergence = nn.functional.kl_div(
            logits.log_softmax(-1), wanted, reduction="sum", log_target=True
        )
        return entropy, divergence

    for start in range(0, hidden_NH.shape[0], CHUNK):
        part = slice(start, start + CHUNK)
        teacher = None if teacher_NH is None or not distill else teacher_NH[part]
        given = (hidden_NH[part], target_N[part], teacher)
        if torch.is_grad_enabled():
            a, b = checkpoint(chunk, *given, use_reentrant=False)
        else:
            a, b = chunk(*given)
        loss, kl = loss + a, kl + b
    return loss, kl
