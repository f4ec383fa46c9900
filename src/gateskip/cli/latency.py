"""``gateskip latency``: time saved gates on this machine, so that ``latency=`` can be asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from gateskip.cli.loading import BaseOption, DataOption, DtypeOption, GatesArgument, load_gated
from gateskip.cli.output import STDOUT, JsonOption, check_json, console_for, write_json
from gateskip.cli.settings import configurable
from gateskip.errors import OutputError

__all__ = ["latency"]


@configurable()
def latency(
    gates: GatesArgument,
    data: DataOption,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder for the gates; GATES where left out."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after it.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements; medians count.")] = 5,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    overwrite: Annotated[bool, typer.Option(help="Write into a folder that is not empty.")] = False,
    json: JsonOption = None,
) -> None:
    """Time prefill and decoding at several budgets, and keep it with the gates for this machine."""
    check_json(json)
    from gateskip.retrofit.checkpoint import check_output_folder

    if out is None and not Path(gates).is_dir():
        raise OutputError(f"--out is missing: {gates!r} is no folder to write into.")
    if out is not None:
        check_output_folder(out, overwrite)
    from gateskip.data import read_texts

    rows = read_texts(data)
    import gateskip

    model, tokenizer = load_gated(gates, base, dtype)
    record = gateskip.measure_latency(
        model, rows, tokenizer, prompt=prompt_tokens, new=new_tokens, batch=batch,
        repeats=repeats, progress=json != STDOUT,
    )  # fmt: skip
    gateskip.save(model, out or gates)
    from rich.table import Table

    table = Table(title="Share of the dense model's time", title_justify="left")
    for column in ("keep", "prefill", "decode", "both"):
        table.add_column(column, justify="right")
    for row in zip(
        record.keep,
        (seconds / record.dense_prefill for seconds in record.prefill),
        (seconds / record.dense_decode for seconds in record.decode),
        record.shares(None),
        strict=True,
    ):
        table.add_row(f"{row[0]:.3f}", *(f"{share:.1%}" for share in row[1:]))
    console = console_for(json)
    console.print(table)
    console.print(
        f"{record.machine}; both: {record.prompt} + {record.new} tokens. Saved to {out or gates}."
    )
    write_json(json, dataclasses.asdict(record))
