"""How much layers and branches turn the residual stream, in one pass over text.

Shapes: B rows, T tokens, N valid tokens, H hidden.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from gateskip.config import BranchKey
from gateskip.data import Sample, to_batches
from gateskip.fitting.passes import run_pass
from gateskip.skipping.call import Call

__all__ = ["Influence"]


class Influence:
    """Mean 1 − cos(before, after) over valid tokens, float64.

    Attributes:
        branches: of each branch, around what it adds. layers: of each layer.
    """

    ungated = True

    def __init__(self) -> None:
        self.branches: dict[BranchKey, float] = defaultdict(float)
        self.layers: dict[int, float] = defaultdict(float)
        self._begin: Tensor | None = None
        self._added: Tensor | None = None
        self._tokens = 0

    @classmethod
    def of(cls, model: nn.Module, samples: list[Sample]) -> Influence:
        """Of a gated model on text."""
        found = cls()
        run_pass(model, to_batches(samples), observer=found)
        found.branches = {key: total / found._tokens for key, total in found.branches.items()}
        found.layers = {key: total / found._tokens for key, total in found.layers.items()}
        return found

    def branch(
        self, key: BranchKey, h: Tensor, u: Tensor, o: Tensor, keep: Tensor, call: Call
    ) -> None:
        """As an observer; see ``fitting.passes``."""
        at = call.everyone()
        self.branches[key] += _turn(h[at], h[at] + o[at])
        if key[1] == "attention":
            self._begin, self._added = h, o
            self._tokens += int(at.sum()) if key[0] == 0 else 0
            return
        assert self._begin is not None
        assert self._added is not None
        # A sequential layer's MLP reads what its attention added; a parallel one does not.
        after = self._begin + self._added + o
        self.layers[key[0]] += _turn(self._begin[at], after[at])


def _turn(before_NH: Tensor, after_NH: Tensor) -> float:
    """Sum of 1 − cos."""
    cosine = torch.nn.functional.cosine_similarity(before_NH.double(), after_NH.double(), dim=-1)
    return float((1.0 - cosine).sum())
