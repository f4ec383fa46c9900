"""A fixed mask of layers: the null of a static method, which looks at nothing."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from gateskip.data import Sample
from gateskip.errors import ConfigError
from gateskip.methods.static import Group, Static
from gateskip.skipping.state import GateSkipState

__all__ = ["FixedLayers"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedLayers(Static):
    """Layers of the user's, or drawn.

    Attributes:
        layers: which go, the first one first; () draws an order of all of them.
        seed: of that draw.
    """

    paper: ClassVar[str] = "null"
    layers: tuple[int, ...] = ()
    seed: int = 0

    def order(
        self, model: nn.Module, state: GateSkipState, samples: list[Sample]
    ) -> Sequence[Group]:
        count = state.shape.layers
        layers = list(self.layers)
        for layer in layers:
            whole = isinstance(layer, int) and not isinstance(layer, bool)
            if not whole or not 0 <= layer < count or layers.count(layer) > 1:
                raise ConfigError(
                    f"layers={self.layers!r} must be different numbers from 0 to {count - 1}."
                )
        if not layers:
            layers = random.Random(self.seed).sample(range(count), count)
        elif len(layers) < count:  # the order's last group is never removed
            layers.append(next(i for i in range(count) if i not in layers))
        return [((layer, "attention"), (layer, "mlp")) for layer in layers]
