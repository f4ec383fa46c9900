"""The ``gateskip`` program. Importing this is light: commands import torch when they run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from gateskip.cli.bench import bench
from gateskip.cli.calibrate import calibrate
from gateskip.cli.compare import compare
from gateskip.cli.eval import evaluate
from gateskip.cli.explain import explain
from gateskip.cli.export import export
from gateskip.cli.fit import fit
from gateskip.cli.generate import generate
from gateskip.cli.generate_data import generate_data
from gateskip.cli.info import info
from gateskip.cli.latency import latency
from gateskip.cli.sweep import sweep
from gateskip.cli.train import train
from gateskip.cli.train_method import train_method
from gateskip.cli.tune_draft import tune_draft
from gateskip.errors import GateSkipError

__all__ = ["app", "main"]

app = typer.Typer(
    name="gateskip",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Let a pretrained language model skip compute, token by token.",
)
for _name, _command in (
    ("fit", fit),
    ("train", train),
    ("train-method", train_method),
    ("calibrate", calibrate),
    ("latency", latency),
    ("generate", generate),
    ("generate-data", generate_data),
    ("tune-draft", tune_draft),
    ("eval", evaluate),
    ("bench", bench),
    ("sweep", sweep),
    ("compare", compare),
    ("explain", explain),
    ("export", export),
    ("info", info),
):
    app.command(_name)(_command)


def _version(wanted: bool) -> None:
    if wanted:
        from gateskip import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if isinstance(context.obj, dict):
        context.obj["debug"] = debug


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; ends by SystemExit: 0 done, 1 an error of ours, 2 wrong usage.

    Args:
        arguments: instead of the command line's.
    """
    options: dict[str, bool] = {}
    try:
        app(args=None if arguments is None else list(arguments), obj=options)
    except GateSkipError as error:
        if options.get("debug"):
            raise
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
