"""``gateskip train-method``: train a model by another method, for one budget, to compare with."""

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
from gateskip.cli.settings import checked_fields, configurable, section
from gateskip.cli.train_plan import (
    AccumulateOption,
    BatchSizeOption,
    LengthOption,
    SaveEveryOption,
    StepsOption,
    TrainingDataOption,
    TrainOutOption,
    fixed_arguments,
    length_of,
    trainer_arguments,
)

__all__ = ["train_method"]


@configurable("method", "trainer")
def train_method(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Hugging Face folder or name of the base model.")],
    name: Annotated[
        str, typer.Argument(metavar="METHOD", help="skipgpt, mixture_of_depths, shortgpt, ...")
    ],
    data: TrainingDataOption,
    out: TrainOutOption,
    budget: Annotated[
        float, typer.Option(help="Share of decoder MACs to spend, which it is trained for.")
    ] = 0.75,
    calibration_data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text for orders and thresholds; --data where left out."),
    ] = None,
    steps: StepsOption = 200,
    batch_size: BatchSizeOption = 8,
    accumulate: AccumulateOption = 1,
    max_length: LengthOption = None,
    backbone: Annotated[
        str | None,
        typer.Option(help="lora or full, in stages that train it; else the method's own."),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of the backbone; 1e-3, or 1e-4 for full.")
    ] = None,
    router_learning_rate: Annotated[
        float, typer.Option(help="Of routers that learn in a frozen model.")
    ] = 1e-3,
    save_every: SaveEveryOption = 50,
    seed: Annotated[int, typer.Option(help="Of data order, LoRA, and what a method draws.")] = 0,
    dtype: DtypeOption = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --out.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Write into a folder that is not empty.")] = False,
    json: JsonOption = None,
) -> None:
    """Train a model by another method, for a budget; `compare --gates DIR` then takes it."""
    apart = ("context", "model", "name")
    given = {option: value for option, value in locals().items() if option not in apart}
    from gateskip.retrofit.checkpoint import check_output_folder

    dtype_of(dtype)
    check_json(json)
    if not resume:
        check_output_folder(out, overwrite)
    from gateskip.data import read_rows, read_texts
    from gateskip.methods import METHODS, recipe

    found = METHODS.get(name)
    known = {field.name for field in dataclasses.fields(found)}
    drawn = {"seed": seed, "compute": budget}
    options = {key: value for key, value in drawn.items() if key in known}
    options |= checked_fields("method", section("method", {}, context, {}), "method", found)
    default = 1e-4 if backbone == "full" else 1e-3
    mixed = backbone == "full" and dtype == "auto"
    arguments = section("trainer", trainer_arguments(steps, mixed=mixed) | {
        "learning_rate": default if learning_rate is None else learning_rate,
    }, context, {})  # fmt: skip
    plan = recipe.Recipe(
        name=name, options=options, compute=budget, steps=steps,
        backbone=backbone,  # type: ignore[arg-type]
        learning_rate=arguments.pop("learning_rate"),
        router_learning_rate=router_learning_rate,
    )  # fmt: skip
    rows = read_rows(data)
    texts = None if calibration_data is None else read_texts(calibration_data)
    length = length_of(model, max_length)
    if resume:
        recipe.check_resume(plan, out)

    from gateskip.training.progress import TrainingProgress
    from gateskip.training.recipe import check_rows, check_tokenizer

    arguments |= fixed_arguments(batch_size, accumulate, save_every, seed)
    console = console_for(json)
    chosen = "float32" if mixed else dtype
    stage = 0
    if resume:
        folder, stage = recipe.begun(out)
        gated, tokenizer = load_gated(str(folder), model, chosen)
    else:
        gated, tokenizer = load_base(model, chosen)
    check_tokenizer(tokenizer, rows)
    check_rows(rows, tokenizer, length)
    if not resume:
        gated = recipe.start(plan, gated, rows if texts is None else texts, tokenizer, out)
    bar = TrainingProgress(console)
    try:
        reports = recipe.train(
            plan, gated, rows, tokenizer, out, arguments=arguments, first=stage,
            calibration_data=texts, max_length=length, resume=resume, callbacks=[bar],
            command=command_line(f"gateskip train-method {Path(model).name} {name}", given),
            progress=json != STDOUT,
        )  # fmt: skip
    finally:
        bar.close()
    for report in reports:
        console.print(
            f"Trained {report.steps} steps, {report.tokens:,} tokens in {report.seconds:.0f} s; "
            f"loss {report.loss:.3f}; budgets down to compute={report.floor:.3f}."
        )
    console.print(f"Saved to {out}. Compare: gateskip compare {model} --gates {out} ...")
    write_json(json, {
        "out": str(out), "recipe": plan.to_json(),
        "stages": [dataclasses.asdict(report) for report in reports],
    })  # fmt: skip
