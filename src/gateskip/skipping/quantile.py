"""Thresholds taken from the batch itself: the paper's rule (arXiv 2510.13876, section 3).

Not causal: whether a token is skipped depends on later tokens and on the other rows. For training,
and for comparing; calibrated thresholds decide alike in prefill, decoding and any batch.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

__all__ = ["BatchQuantile", "lowest"]


@dataclasses.dataclass(frozen=True, slots=True)
class BatchQuantile:
    """In the place of a threshold: skip the lowest 1 − ``keep`` of a batch's valid tokens."""

    keep: float

    def threshold(self, score_BT: Tensor, free_BT: Tensor, valid: int) -> Tensor:
        """τ, a float32 scalar.

        Args:
            free_BT: tokens that may be skipped. valid: tokens of which ``keep`` is a share.
        """
        return lowest(score_BT[free_BT], (1.0 - self.keep) * valid)


def lowest(scores_N: Tensor, skipped: float) -> Tensor:
    """The score below which at most ``skipped`` scores lie; −∞ where there is none."""
    n = scores_N.shape[0]
    if n == 0:
        return scores_N.new_tensor(-math.inf)
    index = min(max(math.floor(skipped + 1e-6), 0), n - 1)
    return torch.sort(scores_N).values[index]
