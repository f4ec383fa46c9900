"""``gateskip bench``: prefill and decode against the dense model of the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gateskip.cli.loading import (
    BaseOption,
    ComputesOption,
    GatesArgument,
    KeepsOption,
    budgets_of,
)
from gateskip.cli.output import (
    STDOUT,
    JsonOption,
    check_json,
    command_line,
    console_for,
    write_json,
)
from gateskip.cli.settings import configurable

__all__ = ["bench"]


@configurable()
def bench(
    gates: GatesArgument,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="Real text; random ids where left out."),
    ] = None,
    keep: KeepsOption = None,
    compute: ComputesOption = None,
    batch: Annotated[int, typer.Option(help="Rows of prefill; decoding runs at batch 1.")] = 4,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Decoding steps per measurement.")] = 64,
    dtype: Annotated[
        list[str] | None, typer.Option(help="May be repeated; bfloat16 and float32 by default.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Measurements per arm.")] = 5,
    compiled: Annotated[bool, typer.Option(help="Also time torch.compile of the dense.")] = True,
    seed: Annotated[int, typer.Option(help="Of random ids.")] = 0,
    base: BaseOption = None,
    json: JsonOption = None,
) -> None:
    """Time dense and gated arms in turns on the same tokens. Leave the machine alone meanwhile."""
    options = dict(locals())
    budgets = budgets_of(keep, compute)
    check_json(json)
    from gateskip.data import read_texts

    texts = None if data is None else read_texts(data)
    from gateskip.evaluation.bench import print_bench
    from gateskip.evaluation.bench_gates import bench_gates

    result = bench_gates(
        gates, base, budgets=budgets, texts=texts, batch=batch, prompt_tokens=prompt_tokens,
        new_tokens=new_tokens, dtypes=dtype or ("bfloat16", "float32"), repeats=repeats,
        compiled=compiled, seed=seed, command=command_line("gateskip bench", options),
        progress=json != STDOUT,
    )  # fmt: skip
    print_bench(result, console_for(json))
    write_json(json, result)
