"""What a training is held against before it begins: each would train something else than asked."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from gateskip.calibration.thresholds import check_tokens
from gateskip.config import LINEAR_IMPORTANCES, Budget
from gateskip.data import count_tokens, encode
from gateskip.errors import ConfigError, UnsupportedError
from gateskip.skipping.capacity import capacity
from gateskip.skipping.state import GateSkipState
from gateskip.training.config import GateSkipTrainingConfig

__all__ = ["check_combination", "check_thresholds", "cost_target_of"]


def check_combination(config: GateSkipTrainingConfig, gated: GateSkipState, arguments: Any) -> None:
    """Combinations that would train something else than was asked for."""
    if config.decision_gradient and gated.config.importance not in LINEAR_IMPORTANCES:
        raise ConfigError(
            f"decision_gradient={config.decision_gradient} moves linear scores, but the model "
            f"decides by importance={gated.config.importance!r}; set it to 0."
        )
    if config.decision_gradient and gated.config.decision == "layer":
        raise ConfigError(
            f"decision_gradient={config.decision_gradient} weighs one branch against its cost, but "
            "decision='layer' skips two at once; set it to 0."
        )
    if config.layer_dropout and gated.config.decision != "layer":
        raise ConfigError(
            f"layer_dropout={config.layer_dropout} drops whole layers; attach with "
            "decision='layer'."
        )
    if config.arm == "gateskip" and _zero_stage(arguments) == 3:
        raise UnsupportedError(
            "DeepSpeed's zero_optimization stage 3 splits every weight over processes, and one "
            "that skips a branch would not take part in gathering it; use zero_optimization stage "
            "2, or FSDP2."
        )
    how = getattr(arguments, "gradient_checkpointing_kwargs", None) or {}
    reentrant = getattr(arguments, "gradient_checkpointing", False) and how.get("use_reentrant")
    if reentrant and config.thresholds == "learned":
        raise UnsupportedError(
            "thresholds='learned' get no gradient from reentrant checkpointing; pass "
            "gradient_checkpointing_kwargs={'use_reentrant': False}."
        )
    if reentrant and config.cost_weight:
        raise UnsupportedError(
            f"cost_weight={config.cost_weight} gets no gradient from reentrant checkpointing; pass "
            "gradient_checkpointing_kwargs={'use_reentrant': False}."
        )
    if config.exit_loss == "shallow" and config.exit_layers >= gated.shape.layers:
        raise ConfigError(
            f"exit_layers={config.exit_layers} must be fewer than the model's "
            f"{gated.shape.layers} layers."
        )
    if reentrant and config.auxiliary:
        raise UnsupportedError(
            f"auxiliary={config.auxiliary} gets no gradient from reentrant checkpointing; pass "
            "gradient_checkpointing_kwargs={'use_reentrant': False}."
        )
    if reentrant and gated.config.kv_source == "previous":
        raise UnsupportedError(
            "kv_source='previous' hands keys from layer to layer, whose gradients reentrant "
            "checkpointing drops; pass gradient_checkpointing_kwargs={'use_reentrant': False}."
        )


def _zero_stage(arguments: Any) -> int:
    """The stage of DeepSpeed's ZeRO, 0 without it."""
    given = getattr(arguments, "deepspeed", None)
    if isinstance(given, str | Path):
        given = json.loads(Path(given).read_text(encoding="utf-8"))
    if not isinstance(given, dict):
        plugin = getattr(arguments, "deepspeed_plugin", None)
        return int(getattr(plugin, "zero_stage", 0) or 0)
    return int(given.get("zero_optimization", {}).get("stage", 0))


def check_thresholds(
    config: GateSkipTrainingConfig, gated: GateSkipState, calibration_data: Any
) -> None:
    """Thresholds have to be there, or text to find them on, and budgets within their reach."""
    every, learned = config.calibrate_every, config.thresholds == "learned"
    if (every or learned) and calibration_data is None:
        what = "thresholds='learned'" if learned else f"calibrate_every={every}"
        raise ConfigError(f"{what} needs calibration_data= (texts or id tensors).")
    if every or learned:
        check_tokens(count_tokens(encode(calibration_data)))
    if config.arm != "gateskip" or config.thresholds in ("batch", "sequence", "running"):
        return
    if gated.policy is not None:
        for end in (config.budget_end, config.budget_attention, config.budget_mlp):
            gated.resolve(None if end is None else Budget.by(config.budget_unit, end))
    elif learned:
        raise ConfigError(
            "thresholds='learned' begin at calibrated ones; call gateskip.calibrate(model, data) "
            "first."
        )
    elif config.thresholds == "zero":
        raise ConfigError(
            "thresholds='zero' weighs what skips save, which depends on the length of texts; call "
            "gateskip.calibrate(model, data) first."
        )
    else:
        warnings.warn(
            "the model has no thresholds, so it trains at budget 1.0 and skips nothing; call "
            "gateskip.calibrate(model, data) first.",
            stacklevel=4,
        )


def cost_target_of(config: GateSkipTrainingConfig, state: GateSkipState) -> float:
    """Share of what skips can save that may be spent.

    Raises:
        BudgetError: skips cannot save so much. ConfigError: nobody knows yet what they save.
    """
    if config.cost_target is not None or config.cost_kind == "linear" or not config.cost_weight:
        return config.cost_target or 1.0
    if config.budget_unit == "keep":
        return config.budget_end
    if state.policy is None:
        raise ConfigError(
            f"cost_kind={config.cost_kind!r} needs cost_target=, or gateskip.calibrate first."
        )
    return capacity(state, config.budget_end)
