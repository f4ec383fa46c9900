"""Mixture-of-Depths (arXiv 2404.02258): a router sends a sequence's top tokens through a layer.

x' = x + r · (layer(x) − x) for the k = ⌈C·T⌉ tokens with the highest router weight, x for all
others, which the layer's attention does not see either. Top-k is not causal, so an auxiliary loss
teaches the router to predict it, and inference decides by calibrated thresholds on its score.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from torch import nn

from gateskip.calibration.thresholds import calibrate
from gateskip.config import one_of
from gateskip.methods.base import Method, bare
from gateskip.skipping.capacity import capacity
from gateskip.skipping.state import state_of
from gateskip.training.config import GateSkipTrainingConfig

__all__ = ["MixtureOfDepths"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureOfDepths(Method):
    """Layers with a router, which ranks at random until it is trained.

    Attributes:
        every: routers in every so many layers; 2 is the paper's.
        form: ``"retrofit"``: a pretrained model's layers are at first as they were, r = 1;
            ``"scratch"``: the paper's r = w·x on the residual as it is, for a model yet to train.
        auxiliary: weight of the loss that makes top-k predictable.
        seed: of the router's first weights.
    """

    paper: ClassVar[str] = "arXiv 2404.02258"
    trained: ClassVar[bool] = True
    every: int = 2
    form: Literal["retrofit", "scratch"] = "retrofit"
    auxiliary: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("form", self.form, ("retrofit", "scratch"))

    def apply(self, model: nn.Module, data: Any, tokenizer: Any = None) -> nn.Module:
        scratch = self.form == "scratch"
        bare(
            model, kind="router", placement="layer", decision="layer", kv_source="none",
            importance="mean_logit", layer_step=self.every, seed=self.seed,
            init_bias=0.0 if scratch else 1.0, gate_input="raw" if scratch else "normalised",
            detach_input=not scratch,
        )  # fmt: skip
        calibrate(model, data, tokenizer, allocation="uniform")
        return model

    def training(self, model: nn.Module, compute: float) -> GateSkipTrainingConfig:
        keep = capacity(state_of(model), compute)
        return GateSkipTrainingConfig(
            train_gates=True, train_compensation=False, thresholds="sequence", budget_unit="keep",
            budget_start=keep, budget_end=keep, schedule="constant", auxiliary=self.auxiliary,
        )  # fmt: skip
