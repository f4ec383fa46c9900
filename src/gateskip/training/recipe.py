"""Fit → calibrate → train with skipping on → calibrate again, resumable at every point.

Hard skipping before gates rank tokens destroys a model, so gates are fitted first. The paper's own
order (arXiv 2510.13876) trains fresh gates while the budget falls: ``fit_first=False``, with
``calibrate_every``, so that thresholds follow the gates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_callback import PrinterCallback

from gateskip.calibration.thresholds import calibrate
from gateskip.data import encode
from gateskip.errors import CheckpointError, ConfigError, DataError
from gateskip.execution.card import gate_rows, write_card
from gateskip.execution.checkpoint import restore, save
from gateskip.fitting.closed_form import fit
from gateskip.skipping.state import GateSkipState, state_of
from gateskip.training.checkpoints import (
    CHECKPOINTS,
    START,
    check_options,
    clear,
    last_checkpoint,
    run_options,
)
from gateskip.training.config import GateSkipTrainingConfig
from gateskip.training.dataset import make_dataset
from gateskip.training.plan import Plan, add_compensation, plan
from gateskip.training.recalibration import recalibrate
from gateskip.training.trainer import GateSkipTrainer

__all__ = [
    "CHECKPOINTS", "START", "TrainReport", "clear", "last_checkpoint", "plan_of", "start", "train",
]  # fmt: skip

CALIBRATION_GRID = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.42, 0.35)


@dataclasses.dataclass(frozen=True, slots=True)
class TrainReport:
    """What a training did.

    Attributes:
        steps: optimiser steps, of an earlier part too. tokens: tokens trained on in this part.
        seconds: of this part, training alone. loss: mean of the last logged steps.
        history: everything logged. floor: lowest ``compute`` that the thresholds reach.
    """

    steps: int
    tokens: int
    seconds: float
    loss: float
    history: list[dict[str, float]]
    floor: float


def start(
    model: nn.Module,
    data: Any,
    tokenizer: Any,
    out: Path,
    *,
    fit_first: bool = True,
    calibration_data: Any = None,
    max_length: int = 512,
    allocation: str = "global",
    weigh_cost: bool = True,
    progress: bool = False,
) -> None:
    """Fit and calibrate a gated model, and save it under ``out`` for a training to go on from.

    Args:
        allocation, weigh_cost: as of :func:`gateskip.calibrate`; calibration after training repeats
            them.
    """
    if fit_first:
        fit(model, data, tokenizer, max_length=max_length, progress=progress)
    with warnings.catch_warnings():
        if not fit_first:  # as was asked for
            warnings.filterwarnings("ignore", "the gates were never fitted")
        calibrate(
            model, data if calibration_data is None else calibration_data, tokenizer,
            max_length=max_length, grid=CALIBRATION_GRID, allocation=allocation,
            weigh_cost=weigh_cost, progress=progress,
        )  # fmt: skip
    save(model, out / START)


def train(
    model: nn.Module,
    data: Any,
    tokenizer: Any,
    out: Path,
    *,
    arguments: Any,
    options: GateSkipTrainingConfig,
    calibration_data: Any = None,
    eval_data: Any = None,
    max_length: int = 512,
    resume: bool = False,
    callbacks: list[Any] | None = None,
    command: str = "",
    progress: bool = False,
    recalibrates: bool = True,
) -> TrainReport:
    """Train a fitted and calibrated model, calibrate it again, and save it to ``out``.

    Args:
        model: as :func:`start` left it. data: training rows. calibration_data: text for the
            thresholds; the training rows where left out. eval_data: held-out rows, for the
            evaluations that ``arguments`` ask for.
        arguments: Hugging Face ``TrainingArguments``; its output folder keeps the checkpoints.
        resume: go on from the last complete checkpoint. command: for the card.
        recalibrates: False where thresholds are no quantiles of scores, but say what is removed.

    Raises:
        CheckpointError: nothing to resume from, or made with other options.
        TrainingError: the loss is not a number.
    """
    texts = data if calibration_data is None else calibration_data
    checkpoint = last_checkpoint(Path(arguments.output_dir)) if resume else None
    trainer = GateSkipTrainer(
        model, arguments, train_dataset=make_dataset(data, tokenizer, max_length),
        eval_dataset=None if eval_data is None else make_dataset(eval_data, tokenizer, max_length),
        gateskip_args=options, processing_class=tokenizer, callbacks=callbacks,
        calibration_data=[sample.ids for sample in encode(texts, tokenizer, max_length)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # what is printed belongs to the caller
    began = time.perf_counter()
    if checkpoint is not None and _finished(checkpoint, arguments.max_steps):
        trainer.take(checkpoint)  # the Trainer would take one step more
        best = trainer.state.best_model_checkpoint
        if arguments.load_best_model_at_end and best is not None:
            restore(model, best)
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.perf_counter() - began
    model = trainer.finish()
    history: list[dict[str, float]] = list(trainer.state.log_history)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    policy = state_of(model).policy
    if recalibrates and options.arm == "gateskip" and options.thresholds != "learned":
        policy = recalibrate(
            model, texts, tokenizer, grid=CALIBRATION_GRID, max_length=max_length,
            progress=progress,
        )  # fmt: skip
    report = TrainReport(
        steps=int(trainer.state.global_step),
        tokens=trainer.tokens_seen,
        seconds=seconds,
        loss=losses[-1] if losses else float("nan"),
        history=history,
        floor=1.0 if policy is None else policy.floor("compute"),
    )
    if trainer.is_world_process_zero():
        save(model, out)
        state = state_of(model)
        write_card(
            out, base=str(state.base.get("name_or_path") or "the base model"),
            rows=_card_rows(state, options, report, command, int(arguments.seed)),
            table=policy,
        )  # fmt: skip
    return report


def _card_rows(
    state: GateSkipState,
    options: GateSkipTrainingConfig,
    report: TrainReport,
    command: str,
    seed: int,
) -> dict[str, str]:
    backbone = {
        "frozen": "frozen",
        "lora": f"LoRA of rank {options.lora_rank}, merged when loaded",
        "full": "trained in full, saved beside",
    }[options.backbone]
    parts = (("gates", options.train_gates), ("compensation", options.train_compensation))
    added = [name for name, moved in parts if moved]
    budgets = f"{options.budget_unit} {options.budget_start:g} to {options.budget_end:g}"
    return {
        "arm": state.method if options.arm == "gateskip" else options.arm,
        "command": f"`{command}`",
        **gate_rows(state.config),
        "trained beside the backbone": " and ".join(added) or "nothing",
        "backbone": backbone,
        "budgets in training": f"{budgets}, {options.schedule}, thresholds {options.thresholds}",
        "steps, seed": f"{report.steps}, {seed}",
        "last training loss": f"{report.loss:.3f}",
        "duration": f"{report.seconds / 60:.0f} minutes",
    }


def plan_of(
    model: nn.Module,
    data: Any,
    tokenizer: Any,
    *,
    arguments: Any,
    options: GateSkipTrainingConfig,
    max_length: int = 512,
) -> Plan:
    """What :func:`train` would take with these arguments; nothing is trained or written."""
    add_compensation(model)
    # Without thresholds nothing is skipped: an upper bound of a step's time.
    plain = dataclasses.replace(options, calibrate_every=0, thresholds="calibrated")
    if options.cost_target is None:  # what skips can save is known once there are thresholds
        plain = dataclasses.replace(plain, cost_target=options.budget_end)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the model has no thresholds")
        trainer = GateSkipTrainer(
            model, arguments, train_dataset=make_dataset(data, tokenizer, max_length),
            gateskip_args=plain, processing_class=tokenizer,
        )  # fmt: skip
    return plan(trainer)


def _finished(checkpoint: Path, max_steps: int) -> bool:
    """Whether a training ended there: all steps done, or stopped early."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    control = (state.get("stateful_callbacks") or {}).get("TrainerControl") or {}
    stopped = bool((control.get("args") or {}).get("should_training_stop"))
    return stopped or int(state["global_step"]) >= max_steps > 0


def check_tokenizer(tokenizer: Any, data: Any) -> None:
    """Raise ConfigError where rows of messages meet a tokenizer without a chat template."""
    chats = any(isinstance(row, dict) and "messages" in row for row in data)
    if chats and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "data has rows of 'messages', but the tokenizer has no chat template; set "
            "tokenizer.chat_template, or give rows of 'prompt' and 'completion'."
        )


def check_rows(data: Sequence[Any], tokenizer: Any, max_length: int) -> None:
    """Raise DataError unless some row has something to learn within ``max_length`` tokens."""
    for row in data:
        with contextlib.suppress(DataError):  # of this row alone: too short, or without an answer
            make_dataset([row], tokenizer, max_length)
            return
    make_dataset(data, tokenizer, max_length)


def check_resume(out: Path, options: GateSkipTrainingConfig, arguments: Any) -> None:
    """Raise CheckpointError unless a training with these options began in ``out``."""
    if not (out / START / "gateskip_config.json").is_file():
        raise CheckpointError(
            f"out={str(out)!r} has no training to resume; leave --resume out to begin one."
        )
    last = last_checkpoint(out / CHECKPOINTS)
    if last is not None and arguments is not None:
        wanted = run_options(options, arguments, None)
        del wanted["data"]  # known when it is tokenised
        check_options(last, wanted)
