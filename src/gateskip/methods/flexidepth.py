"""FlexiDepth (arXiv 2503.23798): routers and adapters learned around a frozen model.

A two-layer router reads a layer's normalised input and gives G. A token with G of at least ½ takes
the layer, h + G · (layer(h) − h); another one skips attention and MLP and takes an adapter instead,
h + (1 − G) · adapter(h), while its keys and values are computed all the same. A penalty on squared
G draws routers down against the loss.

Ours versus the paper: adapters are linear and of low rank (the compensation of both branches), and
begin as fitted in closed form; the penalty is the mean of squares over layers, not the square of
their sum; all layers have a router, not the later half.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import nn

from gateskip.calibration.thresholds import calibrate
from gateskip.config import Budget
from gateskip.data import encode, take_tokens, to_batches
from gateskip.fitting.closed_form import fit_compensation
from gateskip.methods.base import Method, bare
from gateskip.training.config import GateSkipTrainingConfig

__all__ = ["FlexiDepth"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexiDepth(Method):
    """Layers with a router and an adapter, of little use until they are trained.

    Attributes:
        rank: inner width of routers. adapter_rank: of adapters. start: logit of G at first.
        penalty: weight of squared G. keep: share of tokens kept while adapters are fitted.
        seed: of the routers' first weights. max_tokens: tokens that adapters are fitted on.
    """

    paper: ClassVar[str] = "arXiv 2503.23798"
    trained: ClassVar[bool] = True
    rank: int = 16
    adapter_rank: int = 32
    start: float = 3.0
    penalty: float = 0.1
    keep: float = 0.75
    seed: int = 0
    max_tokens: int = 12_000

    def apply(self, model: nn.Module, data: Any, tokenizer: Any = None) -> nn.Module:
        state = bare(
            model, kind="bottleneck", rank=self.rank, placement="layer", decision="layer",
            importance="mean_logit", init_bias=self.start, seed=self.seed,
            compensation="low_rank", compensation_rank=self.adapter_rank,
        )  # fmt: skip
        calibrate(model, data, tokenizer, weigh_cost=False)
        samples = take_tokens(encode(data, tokenizer, 512), self.max_tokens)
        thresholds = state.resolve(Budget(keep=self.keep))
        fit_compensation(model, to_batches(samples), dict(thresholds or {}))
        state.compensated = True
        calibrate(model, data, tokenizer, weigh_cost=False)
        return model

    def training(self, model: nn.Module, compute: float) -> GateSkipTrainingConfig:
        return GateSkipTrainingConfig(
            backbone="frozen", train_gates=True, penalty=self.penalty, thresholds="zero",
            budget_end=1.0,
        )  # fmt: skip
