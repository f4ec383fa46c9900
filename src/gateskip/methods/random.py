"""Random skipping: the null that every method has to beat.

A token's score is a hash of its place and the branch, so it is the same in prefill and decoding,
alone and in a batch. Training draws another hash for every step, which makes a stochastic-depth
model of it (Huang et al., 1603.09382).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import nn

from gateskip.calibration.thresholds import calibrate
from gateskip.methods.base import Method, bare

__all__ = ["Random"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(Method):
    """Tokens and branches at random; every branch keeps the same share.

    Attributes:
        seed: of the hash.
    """

    paper: ClassVar[str] = "null"
    seed: int = 0

    def apply(self, model: nn.Module, data: Any, tokenizer: Any = None) -> nn.Module:
        bare(model, seed=self.seed)
        calibrate(model, data, tokenizer, weigh_cost=False)
        return model
