"""Recipes by name, for the library and for ``gateskip train --preset``.

``"paper"`` is the published one (arXiv 2510.13876, section 4 and its code) as far as it is stated;
``"default"`` trains one model for all budgets; ``"learned"`` lets decisions learn, too, for one
budget, and computes what is skipped while it trains (docs/training.md says where they differ and
why).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from gateskip.config import GateConfig, one_of
from gateskip.training.config import GateSkipTrainingConfig

__all__ = ["PRESETS", "Preset", "preset"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One recipe.

    Attributes:
        gate: of ``attach``. training: of ``GateSkipTrainer``.
        trainer: arguments of Hugging Face ``TrainingArguments``.
        calibration: of ``gateskip.calibrate``. fit: whether ``gateskip.fit`` comes first.
        steps, batch_size, max_length: of the training.
    """

    gate: GateConfig
    training: GateSkipTrainingConfig
    trainer: dict[str, Any]
    calibration: dict[str, Any]
    fit: bool
    steps: int
    batch_size: int
    max_length: int


_OPTIMISER: dict[str, Any] = {
    "lr_scheduler_type": "cosine", "weight_decay": 0.001, "adam_beta2": 0.95, "max_grad_norm": 1.0,
}  # fmt: skip

PRESETS: dict[str, Preset] = {
    "default": Preset(
        gate=GateConfig(),
        training=GateSkipTrainingConfig(
            budget_end=0.5, schedule="sampled", compensation_learning_rate=1e-3
        ),
        trainer=_OPTIMISER | {"learning_rate": 1e-3, "warmup_steps": 10},
        calibration={"allocation": "global", "weigh_cost": True},
        fit=True,
        steps=200,
        batch_size=8,
        max_length=512,
    ),
    "learned": Preset(
        gate=GateConfig(kind="scalar", importance="head"),
        training=GateSkipTrainingConfig(
            train_gates=True, decision_gradient=1.0, learn_from_skipped=True, cost_weight=1.0,
            cost_kind="absolute", budget_end=0.75, schedule="constant",
            gate_learning_rate=5e-3, compensation_learning_rate=1e-3,
        ),
        trainer=_OPTIMISER | {"learning_rate": 2e-3, "warmup_steps": 10},
        calibration={"allocation": "global", "weigh_cost": True},
        fit=True,
        steps=200,
        batch_size=8,
        max_length=512,
    ),
    "paper": Preset(
        gate=GateConfig(
            kind="vector", importance="mean_gate", kv_source="previous", compensation="none"
        ),
        training=GateSkipTrainingConfig(
            backbone="full", train_gates=True, train_compensation=False, penalty=0.1,
            thresholds="batch", budget_unit="keep", budget_start=1.0, budget_end=0.8,
            budget_steps=1.0, schedule="linear",
        ),
        trainer=_OPTIMISER | {"learning_rate": 3e-6, "warmup_steps": 1000, "adam_beta1": 0.9},
        calibration={"allocation": "uniform", "weigh_cost": False},
        fit=False,
        steps=6800,
        batch_size=8,
        max_length=1024,
    ),
}  # fmt: skip


def preset(name: str) -> Preset:
    """The recipe of that name. Raises ConfigError with a suggestion."""
    one_of("preset", name, tuple(PRESETS))
    return PRESETS[name]
