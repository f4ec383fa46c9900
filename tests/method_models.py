"""Models with a method in place, for tests of methods."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest

import gateskip
from gateskip import methods
from gateskip.skipping.state import state_of
from models import random_ids, tiny

NAMES = methods.METHODS.names()


STATIC = ("every_second", "fixed_layers", "gate_norm", "layerskip", "llm_drop", "shortgpt")


every = pytest.mark.parametrize("name", NAMES)


def applied(name: str, family: str = "llama", model: Any = None, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        model = tiny(family) if model is None else model
        return methods.apply(name, model, list(random_ids(20, 64)), **options)


@functools.cache
def known(name: str) -> Any:
    """One model of each method, which tests leave as it is."""
    return applied(name)


def low(model: Any) -> float:
    """A budget that skips about a third."""
    table = state_of(model).policy
    assert table is not None
    return max(0.65, table.floor("compute"))


def routed(**options: Any) -> Any:
    return applied("mixture_of_depths", every=1, **options)


def trained(
    model: Any, options: Any, folder: Path, steps: int, rate: float, rows: Any = None, **given: Any
) -> tuple[Any, Any]:
    """(model after some steps, what was logged at each)."""
    from transformers import TrainingArguments

    if rows is None:
        rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in random_ids(64, 32)]
    trainer = gateskip.GateSkipTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, use_cpu=True,
            report_to=[], learning_rate=rate, disable_tqdm=True, logging_steps=1, **given,
        ),
        gateskip_args=options,
        train_dataset=rows,
    )  # fmt: skip
    trainer.train()
    return trainer.finish(), trainer.state.log_history
