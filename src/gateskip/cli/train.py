"""``gateskip train``: fit, calibrate, train with skipping on, calibrate again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from gateskip.cli.loading import DtypeOption, dtype_of, load_base, load_gated
from gateskip.cli.output import (
    STDOUT,
    JsonOption,
    check_json,
    command_line,
    console_for,
    write_json,
)

__all__ = ["train"]


def train(
    model: Annotated[str, typer.Argument(help="Hugging Face folder or name of the base model.")],
    data: Annotated[
        str, typer.Option(metavar="FILE|NAME", help="A .jsonl or text file, or a dataset's name.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for what is trained.")],
    calibration_data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text for the thresholds; --data where left out."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of one forward pass.")] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Forward passes per step.")] = 1,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens per row.")] = 512,
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
    fit: Annotated[
        bool, typer.Option("--fit/--no-fit", help="Fit gates first; the paper's order does not.")
    ] = True,
    arm: Annotated[
        str, typer.Option(help="gateskip; control (no gates); random (skips at random).")
    ] = "gateskip",
    gates: Annotated[
        str | None, typer.Option(metavar="DIR", help="Start from these gates instead of a fit.")
    ] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50,
    seed: Annotated[int, typer.Option(help="Of data order, LoRA, new gates and random skips.")] = 0,
    dtype: DtypeOption = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --out.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Write into a folder that is not empty.")] = False,
    json: JsonOption = None,
) -> None:
    """Train a model to skip, and save gates, thresholds and what changed in the backbone."""
    given = dict(locals())
    from gateskip.config import GateConfig, one_of
    from gateskip.errors import ConfigError
    from gateskip.retrofit.checkpoint import check_output_folder

    one_of("arm", arm, ("gateskip", "control", "random"))
    dtype_of(dtype)
    check_json(json)
    if not resume:
        check_output_folder(out, overwrite)
    from gateskip.training.config import GateSkipTrainingConfig

    importance = "random" if arm == "random" else "mean_logit"
    config = GateConfig.from_json(
        {"kind": kind or "low_rank", "importance": importance, "seed": seed}
    )
    if learning_rate is not None and not learning_rate > 0:
        raise ConfigError(f"learning_rate={learning_rate!r} must be above 0.")
    options = GateSkipTrainingConfig.from_json(
        {
            "backbone": backbone,
            "lora_rank": lora_rank,
            "lora_alpha": 2 * lora_rank,
            "penalty": penalty,
            "train_gates": train_gates,
            "decision_gradient": decision_gradient,
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
        }
    )
    from gateskip.data import read_rows, read_texts

    rows = read_rows(data)
    calibration_rows = None if calibration_data is None else read_texts(calibration_data)

    import gateskip
    from gateskip.skipping.state import state_of
    from gateskip.training import recipe
    from gateskip.training.progress import TrainingProgress

    if resume:
        recipe.check_resume(out)
    console = console_for(json)
    mixed = backbone == "full" and dtype == "auto"
    chosen = "float32" if mixed else dtype
    begun = str(out / recipe.START) if resume else gates
    if begun is not None:
        gated, tokenizer = load_gated(begun, model, chosen)
        there = state_of(gated).config
        if arm != "control" and (arm == "random") != (there.importance == "random"):
            raise ConfigError(f"arm={arm!r}, but {begun} has importance={there.importance!r}.")
        if kind is not None and there.kind != kind:
            raise ConfigError(f"kind={kind!r}, but {begun} has gates of kind {there.kind!r}.")
    else:
        gated, tokenizer = load_base(model, chosen)
    recipe.check_tokenizer(tokenizer, rows)
    if not resume:
        recipe.clear(out)
    if begun is None:
        gateskip.attach(gated, config)
        recipe.start(
            gated, rows, tokenizer, out, fit_first=fit, calibration_data=calibration_rows,
            max_length=max_length, progress=json != STDOUT,
        )  # fmt: skip
    elif not resume:
        gateskip.save(gated, out / recipe.START)

    import torch
    from transformers import TrainingArguments

    default = {"full": 1e-4}.get(backbone, 1e-3)
    rate = default if learning_rate is None else learning_rate
    arguments = TrainingArguments(
        str(out / recipe.CHECKPOINTS), max_steps=steps, per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate, learning_rate=rate, seed=seed,
        lr_scheduler_type="cosine", warmup_steps=max(1, steps // 20), weight_decay=0.001,
        adam_beta2=0.95, bf16=mixed, use_cpu=not torch.accelerator.is_available(),
        logging_steps=max(1, min(10, steps // 10)), save_steps=save_every, save_total_limit=2,
        report_to=[], disable_tqdm=True, train_sampling_strategy="group_by_length",
        dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    bar = TrainingProgress(console)
    try:
        report = recipe.train(
            gated, rows, tokenizer, out, arguments=arguments, options=options,
            calibration_data=calibration_rows, max_length=max_length, resume=resume,
            callbacks=[bar], command=command_line("gateskip train", given),
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
    write_json(json, {"out": str(out), "options": options.to_json()} | dataclasses.asdict(report))
