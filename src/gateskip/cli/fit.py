"""``gateskip fit``: gates for a model, in closed form, with thresholds for every budget."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from gateskip.cli.hub import PushOption, check_repository, push
from gateskip.cli.loading import DataOption, DtypeOption, load_base
from gateskip.cli.output import (
    STDOUT,
    JsonOption,
    check_json,
    command_line,
    console_for,
    write_json,
)
from gateskip.cli.settings import configurable, section

__all__ = ["fit"]


@configurable("gate")
def fit(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Hugging Face folder or name of the base model.")],
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the gates.")],
    kind: Annotated[
        str, typer.Option(help="low_rank, vector, scalar, grouped, mlp or shared.")
    ] = "low_rank",
    importance: Annotated[
        str,
        typer.Option(help="What ranks tokens: mean_logit, head (apart from the gate), mean_gate."),
    ] = "mean_logit",
    kv_source: Annotated[
        str, typer.Option(help="Keys and values of skipped tokens: project, previous or none.")
    ] = "project",
    rank: Annotated[int, typer.Option(help="Inner width of low_rank gates.")] = 16,
    compensation: Annotated[
        str, typer.Option(help="What a skipped branch adds: none, mean or low_rank.")
    ] = "low_rank",
    compensation_rank: Annotated[int, typer.Option(help="Rank of low_rank compensation.")] = 32,
    max_tokens: Annotated[int, typer.Option(help="Tokens of the data to fit on.")] = 30_000,
    calibration: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="Find thresholds as well.")
    ] = True,
    calibration_data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text for the thresholds; --data where left out."),
    ] = None,
    push_to_hub: PushOption = None,
    dtype: DtypeOption = "auto",
    overwrite: Annotated[bool, typer.Option(help="Write into a folder that is not empty.")] = False,
    json: JsonOption = None,
) -> None:
    """Fit gates to a model, calibrate them, and save both (not the model) to a folder."""
    given = dict(locals())
    from gateskip.config import GateConfig
    from gateskip.retrofit.checkpoint import check_output_folder

    check_output_folder(out, overwrite)
    check_json(json)
    check_repository(push_to_hub)
    asked = {
        "kind": kind,
        "rank": rank,
        "importance": importance,
        "kv_source": kv_source,
        "compensation": compensation,
        "compensation_rank": compensation_rank,
    }
    config = GateConfig.from_json(section("gate", asked, context, {}))
    from gateskip.data import read_texts

    rows = read_texts(data)
    calibration_rows = rows if calibration_data is None else read_texts(calibration_data)

    import gateskip
    from gateskip.execution.card import gate_rows, write_card
    from gateskip.skipping.state import state_of

    console = console_for(json)
    base, tokenizer = load_base(model, dtype)
    gateskip.attach(base, config)
    report = gateskip.fit(base, rows, tokenizer, max_tokens=max_tokens, progress=json != STDOUT)
    mean_r2 = sum(report.r2.values()) / len(report.r2)
    console.print(
        f"Fitted {len(report.r2)} gates on {report.tokens:,} tokens in {report.seconds:.0f} s; "
        f"mean r² {mean_r2:.2f}."
    )
    table = None
    if calibration:
        table = gateskip.calibrate(base, calibration_rows, tokenizer, progress=json != STDOUT)
        print_floor(console, table)
    gateskip.save(base, out, overwrite=overwrite)
    name = state_of(base).base.get("name_or_path") or model
    command = command_line("gateskip fit", {k: v for k, v in given.items() if k != "context"})
    made = {"command": f"`{command}`", **gate_rows(config)}
    made["fitted"] = f"in closed form on {report.tokens:,} tokens, mean r² {mean_r2:.2f}"
    write_card(out, base=str(name), rows=made, table=table)
    console.print(f"Saved to {out}.")
    push(console, out, push_to_hub)
    result: dict[str, Any] = {
        "out": str(out),
        "gate": config.to_json(),
        "tokens": report.tokens,
        "seconds": report.seconds,
        "r2": [{"layer": k[0], "branch": k[1], "r2": v} for k, v in report.r2.items()],
        "policy": None if table is None else dataclasses.asdict(table),
    }
    write_json(json, result)


def print_floor(console: Any, table: Any) -> None:
    """Say what budgets a table reaches."""
    console.print(
        f"Calibrated on {table.tokens:,} tokens: budgets down to keep={table.floor('keep'):.3f} "
        f"and compute={table.floor('compute'):.3f}."
    )
