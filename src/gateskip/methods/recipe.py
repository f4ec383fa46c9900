"""A method's own training: put in place, trained in its stages, calibrated again; resumable."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from gateskip.config import Budget
from gateskip.errors import CheckpointError, ConfigError
from gateskip.execution.checkpoint import save
from gateskip.methods import METHODS, apply
from gateskip.methods.base import Method
from gateskip.skipping.state import state_of
from gateskip.training.config import GateSkipTrainingConfig
from gateskip.training.recipe import CHECKPOINTS, START, TrainReport, clear
from gateskip.training.recipe import train as train_stage

__all__ = ["Recipe", "begun", "check_resume", "start", "train"]

STAGES = "stages"
RECIPE_FILE = "gateskip_method.json"
CONFIG_FILE = "gateskip_config.json"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What is trained, and for which budget.

    Attributes:
        name: of the method. options: its fields. compute: share of the dense MACs to spend.
        backbone: ``"lora"`` or ``"full"`` in stages that train it; None: the method's own.
        steps: of all stages. learning_rate: of the backbone. router_learning_rate: of stages that
            train routers in a frozen model.
    """

    name: str
    options: Mapping[str, Any]
    compute: float
    backbone: Literal["lora", "full"] | None = None
    steps: int = 200
    learning_rate: float = 1e-3
    router_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        METHODS.get(self.name).of(self.name, dict(self.options))
        Budget(compute=self.compute)
        if self.backbone not in (None, "lora", "full"):
            raise ConfigError(
                f"backbone={self.backbone!r} must be 'lora' or 'full'; which stages are frozen is "
                "the method's."
            )
        if self.counts[-1] < 1:
            raise ConfigError(
                f"steps={self.steps} are too few for {len(self.counts)} stages of {self.name!r}."
            )
        for rate in ("learning_rate", "router_learning_rate"):
            if not getattr(self, rate) > 0.0:
                raise ConfigError(f"{rate}={getattr(self, rate)!r} must be above 0.")

    @property
    def method(self) -> Method:
        """With its options."""
        return METHODS.get(self.name).of(self.name, dict(self.options))

    @property
    def counts(self) -> list[int]:
        """Steps of every stage."""
        shares = self.method.shares
        counts = [max(1, round(share * self.steps)) for share in shares[:-1]]
        return [*counts, self.steps - sum(counts)]

    def stages(self, model: nn.Module) -> list[tuple[int, GateSkipTrainingConfig]]:
        """(steps, options) of every stage of a model that has the method in place.

        Raises:
            BudgetError: the method cannot save so much.
        """
        found = []
        stages = self.method.stages(model, self.compute)
        for count, (_, config) in zip(self.counts, stages, strict=True):
            if self.backbone is not None and config.backbone != "frozen":
                config = dataclasses.replace(config, backbone=self.backbone)
            found.append((count, config))
        return found

    def rate(self, config: GateSkipTrainingConfig) -> float:
        """The learning rate of a stage."""
        routers = config.backbone == "frozen" and config.train_gates
        return self.router_learning_rate if routers else self.learning_rate

    def to_json(self) -> dict[str, Any]:
        """What a training that is resumed has to agree with."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return found | {"options": dataclasses.asdict(self.method)}


def start(recipe: Recipe, model: nn.Module, data: Any, tokenizer: Any, out: Path) -> nn.Module:
    """Put the method in place, and save the model under ``out`` for a training to go on from.

    Args:
        data: text that orders and thresholds are found on.

    Raises:
        BudgetError: the method cannot save so much, before anything is written.
    """
    model = apply(recipe.name, model, data, tokenizer, **recipe.options)
    stages = recipe.stages(model)
    if stages[0][1].thresholds == "calibrated":  # others find theirs while they train
        state_of(model).resolve(Budget(compute=recipe.compute))
    clear(out)
    shutil.rmtree(out / STAGES, ignore_errors=True)
    save(model, out / START)
    temporary = out / START / f".{RECIPE_FILE}"
    temporary.write_text(json.dumps(recipe.to_json(), indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, out / START / RECIPE_FILE)
    return model


def check_resume(recipe: Recipe, out: Path) -> None:
    """Raise CheckpointError unless a training of this recipe began in ``out``."""
    path = out / START / RECIPE_FILE
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"out={str(out)!r} has no training of a method to resume ({error}); leave --resume out "
            "to begin one."
        ) from error
    mine = json.loads(json.dumps(recipe.to_json()))
    other = [f"{name}={theirs.get(name)!r}" for name in mine if theirs.get(name) != mine[name]]
    if other:
        raise CheckpointError(
            f"{out} was begun with {', '.join(other)}; use the same, or another output folder."
        )


def begun(out: Path) -> tuple[Path, int]:
    """(folder of the model to go on from, number of the stage to go on with, from 0)."""
    done = 0
    while (out / STAGES / str(done + 1) / CONFIG_FILE).is_file():
        done += 1
    return (out / STAGES / str(done) if done else out / START), done


def train(
    recipe: Recipe,
    model: nn.Module,
    data: Any,
    tokenizer: Any,
    out: Path,
    *,
    arguments: Mapping[str, Any],
    first: int = 0,
    calibration_data: Any = None,
    max_length: int = 512,
    resume: bool = False,
    callbacks: list[Any] | None = None,
    command: str = "",
    progress: bool = False,
) -> list[TrainReport]:
    """Train a model with the method in place, stage by stage, and save it to ``out``.

    Args:
        model: as :func:`start` left it, or loaded from what :func:`begun` names. data: training
            rows. calibration_data: text for the thresholds; the training rows where left out.
        arguments: of Hugging Face ``TrainingArguments``, but its folder, steps and rate.
        first: the stage to begin with. resume: go on from its last checkpoint.

    Raises:
        BudgetError: the method cannot save so much. TrainingError: the loss is not a number.
        CheckpointError: a checkpoint was made with other options.
    """
    from transformers import TrainingArguments

    reports = []
    stages = recipe.stages(model)
    for number, (steps, config) in enumerate(stages):
        if number < first:
            continue
        last = number == len(stages) - 1
        folder = out if last else out / STAGES / str(number + 1)
        given = {"warmup_steps": max(1, steps // 20)} | dict(arguments)
        seed = int(given.pop("data_seed", given.get("seed", 0)))
        report = train_stage(
            model, data, tokenizer, folder, options=config,
            arguments=TrainingArguments(
                str(out / CHECKPOINTS / f"stage-{number + 1}"), max_steps=steps,
                learning_rate=recipe.rate(config),
                data_seed=seed + number,  # a stage begins with rows of its own
                **given,
            ),
            calibration_data=calibration_data, max_length=max_length,
            resume=resume and number == first, callbacks=callbacks, command=command,
            progress=progress, recalibrates=recipe.method.calibrated,
        )  # fmt: skip
        reports.append(report)
    return reports
