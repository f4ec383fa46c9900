"""What ``fit`` collects from a pass: moments for gates and for compensation.

Shapes: B rows, T tokens, N valid tokens, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gateskip.config import BranchKey
from gateskip.fitting.passes import Observer, flat_valid
from gateskip.fitting.regression import Moments
from gateskip.skipping.call import Call
from gateskip.skipping.compensation import Compensation

__all__ = ["CompensationMoments", "DenseOutputs", "ScoreMoments", "Several"]


def log_ratio(h_NH: Tensor, o_NH: Tensor) -> Tensor:
    """log(‖o‖ / ‖h‖) of each token, float32 ``[N]``: how much a branch changes its residual."""
    tiny = torch.finfo(torch.float32).tiny
    o, h = (torch.linalg.vector_norm(t.float(), dim=-1).clamp(min=tiny) for t in (o_NH, h_NH))
    return torch.log(o / h)


class ScoreMoments:
    """Moments of (u, log contribution ratio) per branch.

    With compensations the contribution is what a skip would lose: ‖o − c(u)‖ / ‖h‖.
    """

    def __init__(self, compensations: dict[BranchKey, Compensation], *, ungated: bool) -> None:
        self.ungated = ungated
        self.compensations = compensations
        self.moments: dict[BranchKey, Moments] = {}

    def branch(
        self, key: BranchKey, h: Tensor, u: Tensor, o: Tensor, keep: Tensor, call: Call
    ) -> None:
        at = flat_valid(call)
        h_NH, u_NH, o_NH = (t.flatten(0, 1).index_select(0, at) for t in (h, u, o))
        compensation = self.compensations.get(key)
        if compensation is not None:
            o_NH = o_NH - compensation(u_NH)
        if key not in self.moments:
            self.moments[key] = Moments(u.shape[-1], 1, u.device)
        self.moments[key].add(u_NH, log_ratio(h_NH, o_NH)[:, None])


class DenseOutputs:
    """Every branch's outputs in the dense model, for one batch."""

    ungated = True

    def __init__(self) -> None:
        self.outputs: dict[BranchKey, Tensor] = {}

    def branch(
        self, key: BranchKey, h: Tensor, u: Tensor, o: Tensor, keep: Tensor, call: Call
    ) -> None:
        self.outputs[key] = o


class CompensationMoments:
    """Moments of (u, o) per branch over skipped tokens.

    u is the branch's input as skipping made it, o the output that the dense model has there: the
    compensation then also corrects some of what earlier skips changed.

    Attributes:
        dense: outputs of the batch that comes next.
    """

    ungated = False

    def __init__(self) -> None:
        self.moments: dict[BranchKey, Moments] = {}
        self.dense: dict[BranchKey, Tensor] = {}

    def branch(
        self, key: BranchKey, h: Tensor, u: Tensor, o: Tensor, keep: Tensor, call: Call
    ) -> None:
        # Protected tokens skip a branch that is off.
        at = (call.everyone() & ~keep).flatten().nonzero()[:, 0]
        u_NH, o_NH = (t.flatten(0, 1).index_select(0, at) for t in (u, self.dense[key]))
        if key not in self.moments:
            self.moments[key] = Moments(u.shape[-1], u.shape[-1], u.device)
        self.moments[key].add(u_NH, o_NH)


class Several:
    """Observers that share one pass."""

    def __init__(self, *observers: Observer) -> None:
        self.observers = observers
        self.ungated = all(observer.ungated for observer in observers)

    def branch(
        self, key: BranchKey, h: Tensor, u: Tensor, o: Tensor, keep: Tensor, call: Call
    ) -> None:
        for observer in self.observers:
            observer.branch(key, h, u, o, keep, call)
