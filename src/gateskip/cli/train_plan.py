"""What the commands that train share: options, checks before a model is loaded, the plan."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gateskip.errors import ConfigError

__all__ = [
    "AccumulateOption",
    "BatchSizeOption",
    "LengthOption",
    "SaveEveryOption",
    "StepsOption",
    "TrainOutOption",
    "TrainingDataOption",
    "check_evaluations",
    "check_reports",
    "fixed_arguments",
    "length_of",
    "print_plan",
    "trainer_arguments",
]

TrainingDataOption = Annotated[
    str, typer.Option(metavar="FILE|NAME", help="A .jsonl or text file, or a dataset's name.")
]
TrainOutOption = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Folder for what is trained.")
]
StepsOption = Annotated[int, typer.Option(min=1, help="Optimiser steps.")]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Rows of one forward pass.")]
AccumulateOption = Annotated[int, typer.Option(min=1, help="Forward passes per step.")]
LengthOption = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens per row; 512 or what the model takes if left out."),
]
SaveEveryOption = Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")]

LENGTH = 512

#: Where the Trainer reports to, by the package that it needs, most common first.
PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",),
    "clearml": ("clearml",),
    "swanlab": ("swanlab",),
}


def check_reports(names: Sequence[str]) -> None:
    """Raise ConfigError for an unknown place, or one whose package is missing."""
    from gateskip.config import one_of

    for name in names:
        one_of("report_to", name, tuple(PACKAGES))
        if not any(importlib.util.find_spec(package) for package in PACKAGES[name]):
            raise ConfigError(
                f"report_to={name!r} needs a package: pip install {PACKAGES[name][0]}."
            )


def length_of(model: str, max_length: int | None) -> int:
    """Tokens per row: what was asked for, else 512 or as many as the model has positions.

    Reads the model's config alone; one that does not load is the loader's to report.

    Raises:
        ConfigError: more was asked for than the model has positions.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError):
        return LENGTH if max_length is None else max_length
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return LENGTH if max_length is None else max_length
    if max_length is not None and max_length > limit:
        raise ConfigError(
            f"max_length={max_length} is more than the {limit} positions of {model}; lower it."
        )
    return min(LENGTH, limit) if max_length is None else max_length


def check_evaluations(early_stopping: int, eval_data: Path | None, every: int, saves: int) -> None:
    """Raise ConfigError where early stopping has nothing to look at, or nothing to keep."""
    if early_stopping and eval_data is None:
        raise ConfigError(f"early_stopping={early_stopping} needs --eval-data.")
    if early_stopping and saves % every:
        raise ConfigError(
            f"eval_every={every} does not divide save_every={saves}, so the best evaluation would "
            "have no checkpoint."
        )


def fixed_arguments(batch_size: int, accumulate: int, save_every: int, seed: int) -> dict[str, Any]:
    """Of Hugging Face's TrainingArguments, what options and the machine decide."""
    import torch

    return {
        "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulate,
        "save_steps": save_every, "seed": seed, "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }  # fmt: skip


def trainer_arguments(steps: int, *, mixed: bool, report_to: Sequence[str] = ()) -> dict[str, Any]:
    """Of the same, what a config file's section ``trainer`` may change."""
    return {
        "lr_scheduler_type": "cosine", "weight_decay": 0.001, "adam_beta2": 0.95, "bf16": mixed,
        "logging_steps": max(1, min(10, steps // 10)), "save_total_limit": 2,
        "report_to": list(report_to), "train_sampling_strategy": "group_by_length",
    }  # fmt: skip


def print_plan(console: Any, plan: Any) -> None:
    """A plan in words."""
    trained = ", ".join(f"{count:,} of {part}" for part, count in plan.trained.items())
    total = sum(plan.trained.values())
    console.print(
        f"Would train {total:,} of {plan.parameters:,} parameters ({trained})\n"
        f"for {plan.steps} steps of {plan.tokens_per_step:,.0f} tokens: {plan.epochs:.1f} passes "
        f"over {plan.rows:,} rows.\n"
        f"A forward pass of a token is {plan.macs_per_token / 1e6:,.1f} M MACs in the decoder.\n"
        f"One step took {plan.step_seconds:.1f} s with nothing skipped, so all take about "
        f"{_time(plan.seconds)}, fitting and calibration apart;\n"
        f"most memory {plan.memory_bytes / 2**30:.2f} GiB. Nothing was trained or written."
    )


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
