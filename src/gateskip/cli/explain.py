"""``gateskip explain``: which tokens of a text, or kinds of token, used which branches."""

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
from gateskip.errors import ConfigError, OutputError

__all__ = ["explain"]


@configurable()
def explain(
    gates: GatesArgument,
    text: Annotated[
        str | None, typer.Option("--text", metavar="TEXT", help="One text, shown token by token.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Many texts instead (.jsonl or text): skips by kind of token, with a test.",
        ),
    ] = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Also draw a picture.")
    ] = None,
    keep: KeepOption = None,
    compute: ComputeOption = None,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    json: JsonOption = None,
) -> None:
    """Show a text with every token shaded by its share of branches, and skip rates by layer; or,
    of many texts, skip rates by kind of token."""
    budget = one_budget(keep, compute)
    if (text is None) == (data is None):
        raise ConfigError("give one of --text (one text) and --data (a file of many).")
    if data is not None and png is not None:
        raise ConfigError("--png draws one text; give --text.")
    check_json(json)
    if png is not None and (png.is_dir() or not png.parent.is_dir()):
        raise OutputError(f"--png {str(png)!r} must be a file in a folder that exists.")
    import gateskip
    from gateskip.data import read_texts
    from gateskip.explain.kinds import skips_by_kind
    from gateskip.explain.plot import check_plotting, plot_usage
    from gateskip.explain.terminal import print_kinds, print_usage
    from gateskip.explain.usage import branch_usage

    if png is not None:
        check_plotting()
    console = console_for(json)
    texts = None if data is None else read_texts(data)
    model, tokenizer = load_gated(gates, base, dtype)
    if texts is not None:
        with contextlib.ExitStack() as stack:
            if budget is not None:
                stack.enter_context(gateskip.budget(model, **budget.to_json()))
            report = skips_by_kind(model, texts, tokenizer)
        print_kinds(report, console)
        write_json(json, report.to_json())
        return
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
