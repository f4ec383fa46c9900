"""``gateskip explain``: which tokens of a text used which branches."""

from __future__ import annotations

import contextlib
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
from gateskip.errors import OutputError

__all__ = ["explain"]


@configurable()
def explain(
    gates: GatesArgument,
    text: Annotated[str, typer.Option("--text", metavar="TEXT", help="What to run.")],
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Also draw a picture.")
    ] = None,
    keep: KeepOption = None,
    compute: ComputeOption = None,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    json: JsonOption = None,
) -> None:
    """Show a text with every token shaded by its share of branches, and skip rates by layer."""
    budget = one_budget(keep, compute)
    check_json(json)
    if png is not None and (png.is_dir() or not png.parent.is_dir()):
        raise OutputError(f"--png {str(png)!r} must be a file in a folder that exists.")
    import gateskip
    from gateskip.explain.plot import check_plotting, plot_usage
    from gateskip.explain.terminal import print_usage
    from gateskip.explain.usage import branch_usage

    if png is not None:
        check_plotting()
    console = console_for(json)
    model, tokenizer = load_gated(gates, base, dtype)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    tokens = [tokenizer.decode([int(token)]) for token in ids[0]]
    with contextlib.ExitStack() as stack:
        if budget is not None:
            chosen = gateskip.budget(model, **budget.to_json())
            stack.enter_context(chosen)
        usage = branch_usage(model, ids)
    print_usage(usage, tokens, console)
    if png is not None:
        plot_usage(usage, tokens, png)
        console.print(f"Wrote {png}.")
    write_json(json, usage.to_json(tokens))
