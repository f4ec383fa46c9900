"""``gateskip export``: a plain Hugging Face checkpoint without the branches never used."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from gateskip.cli.loading import (
    BaseOption,
    ComputeOption,
    DtypeOption,
    GatesArgument,
    KeepOption,
    load_gated,
    one_budget,
)
from gateskip.cli.output import JsonOption, check_json, console_for, write_json
from gateskip.cli.settings import configurable
from gateskip.config import BRANCH_KINDS, BranchKey, one_of
from gateskip.errors import ConfigError

__all__ = ["export"]


@configurable()
def export(
    gates: GatesArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the model.")],
    static: Annotated[
        bool, typer.Option("--static", help="Leave out what the budget never uses; needed.")
    ] = False,
    keep: KeepOption = None,
    compute: ComputeOption = None,
    remove: Annotated[
        list[str] | None,
        typer.Option(
            "--remove", metavar="LAYER.KIND", help="These instead, such as 7.mlp; repeatable."
        ),
    ] = None,
    approximate: Annotated[
        bool,
        typer.Option(
            "--approximate", help="Leave out gate values and compensation that have no place."
        ),
    ] = False,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    overwrite: Annotated[bool, typer.Option(help="Write into a folder that is not empty.")] = False,
    json: JsonOption = None,
) -> None:
    """Write a checkpoint that transformers loads, and other engines serve, without gateskip."""
    budget = one_budget(keep, compute)
    branches = None if not remove else [_branch(text) for text in remove]
    if not static:
        raise ConfigError(
            "a plain checkpoint cannot decide token by token; pass --static to leave out what is "
            "never used."
        )
    check_json(json)
    from gateskip.retrofit.checkpoint import check_output_folder

    check_output_folder(out, overwrite)
    import gateskip

    model, tokenizer = load_gated(gates, base, dtype)
    report = gateskip.export_static(
        model, out, budget=budget, remove=branches, exact=not approximate, tokenizer=tokenizer,
        overwrite=overwrite,
    )  # fmt: skip
    console = console_for(json)
    console.print(
        f"{len(report.removed)} branches left out; {len(report.layers_removed)} layers gone, "
        f"{report.layers} stay: {report.macs_saved:.1%} of decoder MACs saved in any engine."
    )
    if report.zeroed:
        console.print(
            f"{len(report.zeroed)} single branches stay as zeros: a plain model computes them."
        )
    for what in report.left_out:
        console.print(f"Left out: {what}.")
    console.print(f"Saved to {out}.")
    write_json(json, dataclasses.asdict(report) | {"out": str(out)})


def _branch(text: str) -> BranchKey:
    layer, _, kind = text.partition(".")
    if not layer.isdigit():
        raise ConfigError(f"--remove {text!r}: name a layer and a kind, such as 7.mlp.")
    one_of("--remove", kind, BRANCH_KINDS)
    return int(layer), kind
