"""``gateskip calibrate``: new thresholds for saved gates."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from gateskip.cli.fit import print_floor
from gateskip.cli.loading import BaseOption, DataOption, DtypeOption, GatesArgument, load_gated
from gateskip.cli.output import STDOUT, JsonOption, check_json, console_for, write_json
from gateskip.cli.settings import configurable
from gateskip.config import ALLOCATIONS, one_of

__all__ = ["calibrate"]


@configurable()
def calibrate(
    gates: GatesArgument,
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the gates.")],
    allocation: Annotated[
        str, typer.Option(help="How a budget is split over branches: global or uniform.")
    ] = "global",
    weigh_cost: Annotated[
        bool, typer.Option(help="Weigh scores against the MACs that a skip saves.")
    ] = True,
    max_tokens: Annotated[int, typer.Option(help="Tokens of the data to use.")] = 12_000,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    overwrite: Annotated[bool, typer.Option(help="Write into a folder that is not empty.")] = False,
    json: JsonOption = None,
) -> None:
    """Find thresholds for every budget at once, and save them with the gates."""
    one_of("allocation", allocation, ALLOCATIONS)
    from gateskip.retrofit.checkpoint import check_output_folder

    check_output_folder(out, overwrite)
    check_json(json)
    from gateskip.data import read_texts

    rows = read_texts(data)

    import gateskip

    console = console_for(json)
    model, tokenizer = load_gated(gates, base, dtype)
    table = gateskip.calibrate(
        model, rows, tokenizer, allocation=allocation, weigh_cost=weigh_cost,
        max_tokens=max_tokens, progress=json != STDOUT,
    )  # fmt: skip
    print_floor(console, table)
    gateskip.save(model, out, overwrite=overwrite)
    console.print(f"Saved to {out}.")
    write_json(json, {"out": str(out), "policy": dataclasses.asdict(table)})
