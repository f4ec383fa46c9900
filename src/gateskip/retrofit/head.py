"""What makes logits of a decoder's states.

Shapes: N positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gateskip.retrofit.families import FamilySpec

__all__ = ["LogitHead"]


class LogitHead(nn.Module):
    """A family's LM head with what its logits pass: a factor, a divisor, a soft cap."""

    def __init__(self, head: nn.Module, family: FamilySpec, config: Any) -> None:
        super().__init__()
        self.head = head
        names = (family.logit_scale, family.logit_divisor, family.logit_softcap)
        self.scale, self.divisor, self.softcap = (
            None if name is None else getattr(config, name, None) for name in names
        )

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """Logits ``[N, V]``."""
        logits: Tensor = self.head(hidden_NH)
        if self.scale is not None:
            logits = logits * self.scale
        if self.divisor is not None:
            logits = logits / self.divisor
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits
