"""``gateskip train``: fit, calibrate, train with skipping on, calibrate again."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateskip.cli.hub import PushOption, check_repository, push
from gateskip.cli.loading import DtypeOption, dtype_of, load_base, load_gated, load_tokenizer
from gateskip.cli.output import (
    STDOUT,
    JsonOption,
    check_json,
    command_line,
    console_for,
    write_json,
)
from gateskip.cli.settings import configurable, keep_preset, section
from gateskip.cli.train_plan import (
    AccumulateOption,
    BatchSizeOption,
    LengthOption,
    SaveEveryOption,
    StepsOption,
    TrainingDataOption,
    TrainOutOption,
    check_evaluations,
    check_reports,
    fixed_arguments,
    length_of,
    print_plan,
    trainer_arguments,
)
from gateskip.errors import ConfigError

if TYPE_CHECKING:
    from gateskip.config import GateConfig

__all__ = ["train"]


SECTIONS = ("gate", "training", "trainer")


def _take_preset(context: typer.Context, name: str | None) -> str | None:
    if name is None:
        return None
    from gateskip.training.presets import preset

    chosen = preset(name)
    if name != "default":  # whose values the options have already
        options = chosen.calibration | {"fit": chosen.fit, "steps": chosen.steps,
                                        "batch_size": chosen.batch_size,
                                        "max_length": chosen.max_length}  # fmt: skip
        gate, training = chosen.gate.to_json(), chosen.training.to_json()
        parts = {"gate": gate, "training": training, "trainer": dict(chosen.trainer)}
        keep_preset(context, options | parts, SECTIONS)
    return name


@configurable(*SECTIONS)
def train(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Hugging Face folder or name of the base model.")],
    data: TrainingDataOption,
    out: TrainOutOption,
    calibration_data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text for the thresholds; --data where left out."),
    ] = None,
    steps: StepsOption = 200,
    batch_size: BatchSizeOption = 8,
    accumulate: AccumulateOption = 1,
    max_length: LengthOption = None,
    backbone: Annotated[str, typer.Option(help="frozen, lora or full.")] = "lora",
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA layers.")] = 8,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of the backbone; 1e-3 for lora, 1e-4 for full.")
    ] = None,
    compensation_learning_rate: Annotated[float, typer.Option(help="Of the compensation.")] = 1e-3,
    gate_learning_rate: Annotated[float, typer.Option(help="Of trained gates.")] = 1e-3,
    train_gates: Annotated[
        bool, typer.Option("--train-gates/--fixed-gates", help="Train gates, or keep the fit's.")
    ] = False,
    decision_gradient: Annotated[
        float, typer.Option(help="Temperature of straight-through decisions; 0: none.")
    ] = 0.0,
    decision_noise: Annotated[
        float, typer.Option(help="Scale of the noise on decisions in training; 1: Gumbel-softmax.")
    ] = 0.0,
    cost_weight: Annotated[
        float, typer.Option(help="Weight of the expected share of MACs spent.")
    ] = 0.0,
    train_compensation: Annotated[
        bool,
        typer.Option(
            "--train-compensation/--fixed-compensation",
            help="Train the compensation, or keep the fit's.",
        ),
    ] = True,
    penalty: Annotated[float, typer.Option(help="λ of the gates' penalty.")] = 0.0,
    distill: Annotated[float, typer.Option(help="Share of the loss that is distillation.")] = 0.0,
    teacher: Annotated[
        str,
        typer.Option(help="Of distillation: the dense model before training, or itself at full."),
    ] = "before",
    budget: Annotated[
        float, typer.Option(help="Lowest share of decoder MACs spent in training.")
    ] = 0.5,
    budget_start: Annotated[float, typer.Option(help="Where the budget begins to fall.")] = 1.0,
    schedule: Annotated[
        str, typer.Option(help="sampled (one model for all budgets) or linear (the paper's).")
    ] = "sampled",
    calibrate_every: Annotated[
        int, typer.Option(min=0, help="Steps between calibrations in training; 0: never.")
    ] = 0,
    kind: Annotated[
        str | None,
        typer.Option(help="Gate kind, low_rank by default; else as --gates."),
    ] = None,
    allocation: Annotated[
        str,
        typer.Option(help="Of budgets over branches: global, uniform (the paper's) or searched."),
    ] = "global",
    weigh_cost: Annotated[
        bool, typer.Option("--weigh-cost/--no-weigh-cost", help="Weigh scores against MACs.")
    ] = True,
    preset: Annotated[
        str | None,
        typer.Option(
            is_eager=True,
            callback=_take_preset,
            help="default (one model for all budgets), learned (decisions learn, for one budget) "
            "or paper (the published recipe); options win.",
        ),
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit/--no-fit", help="Fit gates first; the paper's order does not.")
    ] = True,
    arm: Annotated[
        str, typer.Option(help="gateskip; control (no gates); random (skips at random).")
    ] = "gateskip",
    gates: Annotated[
        str | None, typer.Option(metavar="DIR", help="Start from these gates instead of a fit.")
    ] = None,
    save_every: SaveEveryOption = 50,
    eval_data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Held-out rows, evaluated at the lowest budget."),
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between evaluations; --save-every if left out.")
    ] = None,
    early_stopping: Annotated[
        int,
        typer.Option(
            min=0, help="Stop after so many evaluations that are no better, and keep the best."
        ),
    ] = 0,
    report_to: Annotated[
        list[str] | None,
        typer.Option(help="tensorboard, trackio, wandb, ... of the Trainer; may be repeated."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, and train nothing.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of data order, LoRA, new gates and random skips.")] = 0,
    push_to_hub: PushOption = None,
    dtype: DtypeOption = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --out.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Write into a folder that is not empty.")] = False,
    json: JsonOption = None,
) -> None:
    """Train a model to skip, and save gates, thresholds and what changed in the backbone."""
    given = {name: value for name, value in locals().items() if name != "context"}
    from gateskip.config import GateConfig, one_of
    from gateskip.retrofit.checkpoint import check_output_folder

    one_of("arm", arm, ("gateskip", "control", "random"))
    dtype_of(dtype)
    check_json(json)
    if not resume:
        check_output_folder(out, overwrite)
    from gateskip.training.config import GateSkipTrainingConfig

    asked = section("gate", {} if kind is None else {"kind": kind}, context, {})
    if arm == "random":
        asked["importance"] = "random"
    config = GateConfig.from_json({"seed": seed} | asked)
    if learning_rate is not None and not learning_rate > 0:
        raise ConfigError(f"learning_rate={learning_rate!r} must be above 0.")
    options = GateSkipTrainingConfig.from_json(section(
        "training", {
            "backbone": backbone,
            "lora_rank": lora_rank,
            "lora_alpha": 2 * lora_rank,
            "penalty": penalty,
            "train_gates": train_gates,
            "decision_gradient": decision_gradient,
            "decision_noise": decision_noise,
            "cost_weight": cost_weight,
            "train_compensation": train_compensation,
            "gate_learning_rate": gate_learning_rate,
            "compensation_learning_rate": compensation_learning_rate,
            "distill": distill,
            "teacher": teacher,
            "budget_start": budget_start,
            "budget_end": budget,
            "schedule": schedule,
            "calibrate_every": calibrate_every,
            "arm": "control" if arm == "control" else "gateskip",
        }, context, {"budget_end": "budget"},
    ))  # fmt: skip
    from gateskip.data import read_rows, read_texts

    check_reports(report_to or [])
    check_repository(push_to_hub)
    every = save_every if eval_every is None else eval_every
    check_evaluations(early_stopping, eval_data, every, save_every)
    rows = read_rows(data)
    calibration_rows = None if calibration_data is None else read_texts(calibration_data)
    eval_rows = None if eval_data is None else read_texts(eval_data)
    length = length_of(model, max_length)

    import gateskip
    from gateskip.skipping.state import state_of
    from gateskip.training import recipe
    from gateskip.training.progress import TrainingProgress

    mixed = options.backbone == "full" and dtype == "auto"
    from transformers import TrainingArguments

    default = {"full": 1e-4}.get(options.backbone, 1e-3)
    fixed = {"max_steps": steps} | fixed_arguments(batch_size, accumulate, save_every, seed)
    chosen_by_user = section("trainer", trainer_arguments(
        steps, mixed=mixed, report_to=report_to or ()
    ) | {
        "learning_rate": default if learning_rate is None else learning_rate,
        "warmup_steps": max(1, steps // 20),
    }, context, {})  # fmt: skip
    if eval_rows is not None:
        fixed |= {
            "eval_strategy": "steps", "eval_steps": every, "metric_for_best_model": "loss",
            "load_best_model_at_end": early_stopping > 0,
            "per_device_eval_batch_size": batch_size, "prediction_loss_only": True,
        }  # fmt: skip
    arguments = None
    if not dry_run:
        arguments = TrainingArguments(str(out / recipe.CHECKPOINTS), **(fixed | chosen_by_user))
    if resume:
        recipe.check_resume(out, options, arguments)
    tokenizer = load_tokenizer(model)
    recipe.check_tokenizer(tokenizer, rows)
    recipe.check_rows(rows, tokenizer, length)
    console = console_for(json)
    chosen = "float32" if mixed else dtype
    begun = str(out / recipe.START) if resume else gates
    if begun is not None:
        gated, _ = load_gated(begun, model, chosen)
        _check_gates(begun, state_of(gated).config, config, asked, arm)
    else:
        gated, _ = load_base(model, chosen)
    if begun is None:
        gateskip.attach(gated, config)
    if not resume and not dry_run:
        recipe.clear(out)
    if dry_run:
        pass
    elif begun is None:
        recipe.start(
            gated, rows, tokenizer, out, fit_first=fit, calibration_data=calibration_rows,
            max_length=length, allocation=allocation, weigh_cost=weigh_cost,
            progress=json != STDOUT,
        )  # fmt: skip
    elif not resume:
        gateskip.save(gated, out / recipe.START)

    if dry_run:
        with tempfile.TemporaryDirectory() as nowhere:
            asked_for = fixed | chosen_by_user | {"eval_strategy": "no", "report_to": []}
            asked_for["load_best_model_at_end"] = False
            found = recipe.plan_of(
                gated, rows, tokenizer, arguments=TrainingArguments(nowhere, **asked_for),
                options=options, max_length=length,
            )  # fmt: skip
        print_plan(console, found)
        write_json(json, dataclasses.asdict(found))
        return
    bar = TrainingProgress(console)
    callbacks: list[Any] = [bar]
    if early_stopping:
        from transformers import EarlyStoppingCallback

        callbacks.append(EarlyStoppingCallback(early_stopping))
    try:
        report = recipe.train(
            gated, rows, tokenizer, out, arguments=arguments, options=options,
            calibration_data=calibration_rows, eval_data=eval_rows, max_length=length,
            resume=resume, callbacks=callbacks, command=command_line("gateskip train", given),
            progress=json != STDOUT,
        )  # fmt: skip
    finally:
        bar.close()
    console.print(
        f"Trained {report.steps} steps; {report.tokens:,} tokens in {report.seconds:.0f} s "
        f"({report.tokens / max(report.seconds, 1e-9):.0f} a second); loss {report.loss:.3f}; "
        f"budgets down to compute={report.floor:.3f}."
    )
    console.print(f"Saved to {out}.")
    push(console, out, push_to_hub)
    write_json(json, {"out": str(out), "options": options.to_json()} | dataclasses.asdict(report))


def _check_gates(
    where: str, there: GateConfig, config: GateConfig, asked: Mapping[str, Any], arm: str
) -> None:
    """Raise ConfigError where saved gates are not what was asked for."""
    if arm != "control" and (arm == "random") != (there.importance == "random"):
        raise ConfigError(f"arm={arm!r}, but {where} has importance={there.importance!r}.")
    theirs = there.to_json()
    for name, value in config.to_json().items():
        if name in asked and theirs[name] != value:
            raise ConfigError(f"{name}={value!r}, but {where} has gates with {theirs[name]!r}.")
