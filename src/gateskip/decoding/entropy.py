"""How unsure a model is of the next token."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["normalised_entropy"]


def normalised_entropy(logits_BV: Tensor) -> Tensor:
    """Entropy over that of a uniform choice, in [0, 1], float32 ``[B]``."""
    log_p_BV = logits_BV.float().log_softmax(-1)
    # A token of probability zero adds nothing, and 0 · −∞ would be NaN.
    each = (log_p_BV.exp() * log_p_BV.clamp(min=-1e4)).sum(-1)
    return -each / math.log(logits_BV.shape[-1])
