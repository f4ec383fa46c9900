"""LayerSkip (arXiv 2404.16710): a model trained to do without its last layers.

Training drops layers, deeper ones more often, and every layer's state learns to predict, in turn
(its rotating curriculum). Inference leaves after a fixed layer; its speculative decoding is a
decoder's matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from gateskip.data import Sample
from gateskip.methods.static import Group, Static
from gateskip.skipping.state import GateSkipState
from gateskip.training.config import GateSkipTrainingConfig

__all__ = ["LayerSkip"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSkip(Static):
    """The last layers go first.

    Attributes:
        layer_dropout: probability that a sequence drops the last layer while training.
    """

    paper: ClassVar[str] = "arXiv 2404.16710"
    decision: ClassVar[str] = "layer"
    layer_dropout: float = 0.1

    def training(self, model: nn.Module, compute: float) -> GateSkipTrainingConfig:
        return GateSkipTrainingConfig(
            budget_end=1.0, schedule="constant", train_compensation=False,
            exit_loss="rotating", layer_dropout=self.layer_dropout,
        )  # fmt: skip

    def order(
        self, model: nn.Module, state: GateSkipState, samples: list[Sample]
    ) -> Sequence[Group]:
        layers = reversed(range(state.shape.layers))
        return [((layer, "attention"), (layer, "mlp")) for layer in layers]
