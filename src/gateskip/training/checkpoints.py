"""Checkpoints of a training: which is the last good one, and what they were made with."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from gateskip.errors import CheckpointError
from gateskip.training.config import GateSkipTrainingConfig

__all__ = [
    "CONFIG_FILE",
    "check_options",
    "clear",
    "last_checkpoint",
    "run_options",
    "write_options",
]

CONFIG_FILE = "gateskip_training.json"
AVERAGES = "averages"
START = "start"
CHECKPOINTS = "checkpoints"
#: Training arguments that decide what the steps are.
ARGUMENTS = (
    "seed", "data_seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
    "adam_beta1", "adam_beta2", "max_grad_norm", "per_device_train_batch_size",
    "gradient_accumulation_steps", "max_steps", "num_train_epochs", "train_sampling_strategy",
    "bf16", "fp16", "optim",
)  # fmt: skip


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint: the trainer writes its state last."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[-1]))
    for path in reversed(found):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            continue
        if (path / CONFIG_FILE).is_file():
            return path
    return None


def clear(out: Path) -> None:
    """Remove an earlier training's start and checkpoints, so that nobody resumes from them."""
    for name in (START, CHECKPOINTS):
        shutil.rmtree(out / name, ignore_errors=True)


def run_options(config: GateSkipTrainingConfig, arguments: Any, data: Any) -> dict[str, Any]:
    """What a checkpoint has to agree with: options, arguments and data, JSON-ready."""
    chosen = {n: str(getattr(arguments, n)) for n in ARGUMENTS if hasattr(arguments, n)}
    return config.to_json() | chosen | {"data": _digest(data)}


def _digest(data: Any) -> str | None:
    """A hash of the length and of a sample of the rows; None for a stream."""
    if not isinstance(data, Dataset) and not hasattr(data, "__len__"):
        return None
    try:
        size = len(data)
    except TypeError:
        return None
    hashed = hashlib.sha256(str(size).encode())
    for index in range(0, size, max(1, size // 64)):
        row = data[index]
        ids = row.get("input_ids") if isinstance(row, dict) else None
        values = ids.tolist() if isinstance(ids, torch.Tensor) else ids
        hashed.update(json.dumps(values, default=str).encode())
    return hashed.hexdigest()


def write_options(folder: Path, options: dict[str, Any], averages: dict[str, Any]) -> None:
    """Write them, and what is averaged over steps, whole or not at all."""
    temporary = folder / f".{CONFIG_FILE}"
    text = json.dumps(options | {AVERAGES: averages}, indent=2)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, folder / CONFIG_FILE)


def check_options(folder: Path, mine: dict[str, Any]) -> dict[str, Any]:
    """What was averaged over steps in a checkpoint of a training with options ``mine``.

    Raises:
        CheckpointError: made with others; the message names what differs.
    """
    try:
        theirs = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{folder} is no checkpoint of a gateskip training ({error})."
        ) from error
    # Options that are younger than the checkpoint were what they are by default.
    theirs = GateSkipTrainingConfig().to_json() | theirs
    other = [f"{k}={theirs.get(k)!r}" for k in mine if theirs.get(k) != mine[k]]
    if other:
        raise CheckpointError(
            f"{folder} was trained with other options ({', '.join(other)}); use the same, or "
            "another output folder."
        )
    found: dict[str, Any] = theirs.get(AVERAGES, {})
    return found
