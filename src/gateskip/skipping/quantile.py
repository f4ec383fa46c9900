"""Thresholds taken from the batch itself: the paper's rule (arXiv 2510.13876, section 3); top-k.

Not causal: whether a token is skipped depends on later tokens, and may on the other rows. For
training, and for comparing; calibrated thresholds decide alike in prefill, decoding and any batch.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from gateskip.skipping.policy import OFF

__all__ = ["BatchQuantile", "FromBatch", "RowDropout", "SequenceTopK", "lowest"]


@dataclasses.dataclass(frozen=True, slots=True)
class BatchQuantile:
    """In the place of a threshold: skip the lowest 1 − ``keep`` of a batch's valid tokens."""

    keep: float

    def threshold(self, score_BT: Tensor, free_BT: Tensor, valid_BT: Tensor) -> Tensor:
        """τ, a float32 scalar.

        Args:
            free_BT: tokens that may be skipped. valid_BT: tokens of which ``keep`` is a share.
        """
        return lowest(score_BT[free_BT], (1.0 - self.keep) * int(valid_BT.sum()))


@dataclasses.dataclass(frozen=True, slots=True)
class SequenceTopK:
    """In the place of a threshold: every sequence keeps its k = ⌈keep · T⌉ highest tokens.

    Expert choice of Mixture-of-Depths (arXiv 2404.02258, section 3.3); protected tokens count. Not
    causal, but no row depends on another. Ties keep more than k, never fewer.
    """

    keep: float

    def threshold(self, score_BT: Tensor, free_BT: Tensor, valid_BT: Tensor) -> Tensor:
        """τ of every row, float32 ``[B]``; arguments as in :meth:`BatchQuantile.threshold`."""
        count_B = valid_BT.sum(1)
        k_B = (self.keep * count_B.double() - 1e-6).ceil().long() - (count_B - free_BT.sum(1))
        ranked = score_BT.masked_fill(~free_BT, -math.inf).sort(dim=1, descending=True).values
        last_B = ranked.gather(1, (k_B - 1).clamp(min=0)[:, None])[:, 0]
        top_B = ranked[:, 0].nan_to_num(neginf=0.0)  # a row may have only protected tokens
        nobody_B = top_B + 1.0 + top_B.abs()  # above every score
        return torch.where(k_B > 0, last_B, nobody_B)


@dataclasses.dataclass(frozen=True, slots=True)
class RowDropout:
    """In the place of a threshold: whole sequences skip, each with probability ``rate``.

    Layer dropout of LayerSkip (arXiv 2404.16710, section 4.1); for training.
    """

    rate: float

    def threshold(self, score_BT: Tensor, free_BT: Tensor, valid_BT: Tensor) -> Tensor:
        """τ of every row, float32 ``[B]``; arguments as in :meth:`BatchQuantile.threshold`."""
        gone_B = torch.rand(score_BT.shape[0]).to(score_BT.device) < self.rate
        return torch.where(gone_B, 2 * OFF, -math.inf)


FromBatch = BatchQuantile | SequenceTopK | RowDropout


def lowest(scores_N: Tensor, skipped: float) -> Tensor:
    """The score below which at most ``skipped`` scores lie; −∞ where there is none."""
    n = scores_N.shape[0]
    if n == 0:
        return scores_N.new_tensor(-math.inf)
    index = min(max(math.floor(skipped + 1e-6), 0), n - 1)
    return torch.sort(scores_N).values[index]
