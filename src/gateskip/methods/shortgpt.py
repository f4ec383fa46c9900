"""ShortGPT (arXiv 2403.03853): whole layers that turn the residual stream least are removed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from gateskip.data import Sample
from gateskip.methods.influence import Influence
from gateskip.methods.static import Group, Static
from gateskip.skipping.state import GateSkipState

__all__ = ["ShortGPT"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortGPT(Static):
    """By block influence, 1 − E[cos(h_l, h_{l+1})] (its equation 1)."""

    paper: ClassVar[str] = "arXiv 2403.03853"

    def order(
        self, model: nn.Module, state: GateSkipState, samples: list[Sample]
    ) -> Sequence[Group]:
        influence = Influence.of(model, samples).layers
        ordered = sorted(influence, key=lambda layer: influence[layer])
        return [((layer, "attention"), (layer, "mlp")) for layer in ordered]
