r"""Penalties on gate values: what pushes gates down, and how far.

With ḡ a branch's mean gate value over valid tokens and channels, a penalty is the mean over
branches of

- ``"l2"`` mean g² and ``"l1"`` mean g (arXiv 2510.13876, eq. 3 and its ablation),
- ``"kl"`` KL(Bernoulli(ρ) ‖ Bernoulli(ḡ)) to a target ρ,
- ``"hinge"`` max(0, ḡ of all branches − ρ)².

The last two are not sums over tokens, so their gradient over an accumulated batch would depend on
how it was cut. They are followed along their slope at the means of the step before, which is the
same for all micro-batches and ranks: Σ slope · g has the gradient of the penalty there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from gateskip.config import BranchKey

__all__ = ["BY_MEAN", "GateMeans"]

BY_MEAN = ("kl", "hinge")
EDGE = 1e-4  # a mean is not taken to be nearer to 0 or 1


class GateMeans:
    """Every branch's mean gate value in the last optimiser step.

    Args:
        kind: ``"kl"`` or ``"hinge"``. target: ρ. start: the means before the first step.
    """

    def __init__(
        self, kind: str, target: float, branches: Iterable[BranchKey], start: float
    ) -> None:
        self.kind, self.target = kind, target
        self.values = dict.fromkeys(branches, start)
        self._sums: dict[BranchKey, Tensor] = {}
        self._tokens = 0

    def slopes(self) -> dict[BranchKey, float]:
        """d(penalty of the branch)/dḡ, so that their mean over branches is the penalty's."""
        if self.kind == "hinge":
            slope = 2.0 * max(0.0, self._mean() - self.target)
            return dict.fromkeys(self.values, slope)
        clipped = {key: min(max(m, EDGE), 1.0 - EDGE) for key, m in self.values.items()}
        return {key: (m - self.target) / (m * (1.0 - m)) for key, m in clipped.items()}

    def value(self) -> float:
        """The penalty at these means."""
        if self.kind == "hinge":
            return max(0.0, self._mean() - self.target) ** 2
        return sum(map(self._divergence, self.values.values())) / len(self.values)

    def _mean(self) -> float:
        return sum(self.values.values()) / len(self.values)

    def _divergence(self, mean: float) -> float:
        m, total = min(max(mean, EDGE), 1.0 - EDGE), 0.0
        for p, q in ((self.target, m), (1.0 - self.target, 1.0 - m)):
            total += p * math.log(p / q) if p > 0.0 else 0.0
        return total

    def add(self, sums: Mapping[BranchKey, Tensor], tokens: int) -> None:
        """Sums of a forward's mean gate values over its valid tokens, without a graph."""
        for key, total in sums.items():
            self._sums[key] = self._sums.get(key, torch.zeros_like(total)) + total
        self._tokens += tokens

    def step(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """An optimiser step has ended. ``reduce`` sums over processes, float64 ``[n]``."""
        if not self._sums:
            return
        keys = list(self.values)
        sums = torch.stack([self._sums[key].double() for key in keys])
        both = reduce(torch.cat([sums, sums.new_tensor([float(self._tokens)])]))
        means = both[:-1] / both[-1]
        self.values = dict(zip(keys, means.tolist(), strict=True))
        self._sums, self._tokens = {}, 0

    def to_json(self) -> list[float]:
        """The means, in branch order."""
        return list(self.values.values())

    def take(self, values: list[float]) -> None:
        """Be where :meth:`to_json` was."""
        self.values = dict(zip(self.values, values, strict=True))
