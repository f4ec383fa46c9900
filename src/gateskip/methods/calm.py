"""CALM (arXiv 2207.07061): confident tokens leave early, under a threshold that falls with time.

Trained with the losses of all layers, weighed by depth (its equation 6); thresholds for every
budget come from calibration, and for a bound on the loss from ``gateskip.control_risk``
(Learn-then-Test), as in the paper. The paper decodes with an encoder beside; here a token's place
in its sequence is the time.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gateskip.calibration.thresholds import calibrate
from gateskip.config import one_of
from gateskip.data import Sample, encode, take_tokens, to_batches
from gateskip.errors import ConfigError
from gateskip.execution.api import dense
from gateskip.fitting.passes import eval_mode
from gateskip.methods.base import Method, bare
from gateskip.methods.exits import GRID, MEASURES, ExitRule
from gateskip.retrofit.devices import device_of
from gateskip.skipping.rule import set_rule
from gateskip.skipping.state import state_of
from gateskip.training.config import GateSkipTrainingConfig

__all__ = ["Calm"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calm(Method):
    """Exits by confidence.

    Attributes:
        measure: what confidence is: ``"softmax"``, ``"state"`` or ``"probe"`` (fitted here).
        decay, horizon: of the threshold over places; decay=0 keeps it.
        first: the first layer that may be skipped. max_tokens: tokens that probes are fitted on.
    """

    paper: ClassVar[str] = "arXiv 2207.07061"
    measure: str = "softmax"
    decay: float = 4.0
    horizon: int = 256
    first: int = 1
    max_tokens: int = 4_000

    def __post_init__(self) -> None:
        one_of("measure", self.measure, MEASURES)
        if self.first < 1 or self.horizon < 1 or self.decay < 0.0:
            raise ConfigError(
                f"first={self.first!r} and horizon={self.horizon!r} must be at least 1, "
                f"decay={self.decay!r} at least 0."
            )

    def training(self, model: nn.Module, compute: float) -> GateSkipTrainingConfig:
        return GateSkipTrainingConfig(
            budget_end=1.0, schedule="constant", train_compensation=False, exit_loss="weighed"
        )

    def apply(self, model: nn.Module, data: Any, tokenizer: Any = None) -> nn.Module:
        state = bare(model, decision="layer")
        probes = None
        if self.measure == "probe":
            samples = take_tokens(encode(data, tokenizer, 512), self.max_tokens)
            probes = fit_probes(model, samples)
        rule = ExitRule(
            self.measure, decay=self.decay, horizon=self.horizon, first=self.first, probes=probes
        )
        rule.bind(model)
        set_rule(state, rule)
        calibrate(model, data, tokenizer, weigh_cost=False, grid=GRID)
        return model


def fit_probes(model: Any, samples: list[Sample], steps: int = 60) -> Tensor:
    """Logistic regressions, float32 ``[L, H + 1]``: does a layer's input already give the token
    that the last layer gives? By L-BFGS with a little weight decay."""
    rule = ExitRule()
    rule.bind(model)
    norm, head = rule.norm, rule.head
    assert norm is not None
    assert head is not None
    inputs: list[list[Tensor]] = []
    labels: list[list[Tensor]] = []
    with eval_mode(model), dense(model):
        for batch in to_batches(samples):
            ids, mask = batch.ids.to(device_of(model)), batch.mask.to(device_of(model))
            out = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
            real = mask.bool()
            best_N = out.logits[real].argmax(-1)
            u = [norm(h[real]) for h in out.hidden_states[:-1]]
            inputs.append([each.float() for each in u])
            labels.append([head(each).argmax(-1) == best_N for each in u])
    found = []
    for layer in range(state_of(model).shape.layers):
        u_NH = torch.cat([part[layer] for part in inputs])
        right_N = torch.cat([part[layer] for part in labels]).float()
        found.append(_logistic(u_NH, right_N, steps))
    return torch.stack(found).cpu()


def _logistic(u_NH: Tensor, right_N: Tensor, steps: int) -> Tensor:
    scale = u_NH.square().mean().sqrt().clamp(min=1e-6)
    u_NH = torch.nn.functional.pad(u_NH / scale, (0, 1), value=1.0)
    weight = torch.zeros(u_NH.shape[1], device=u_NH.device, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits_N = u_NH @ weight
        total = nn.functional.binary_cross_entropy_with_logits(logits_N, right_N)
        total = total + 1e-4 * weight[:-1].square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimiser.step(loss)
    weight_ = weight.detach().clone()
    weight_[:-1] /= scale
    return weight_
