"""``gateskip eval``: loss on text, or lm-eval's tasks, beside the dense model at budgets."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateskip.cli.loading import (
    BaseOption,
    ComputesOption,
    DtypeOption,
    GatesArgument,
    KeepsOption,
    budgets_of,
    load_base,
    load_gated,
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
from gateskip.config import one_of
from gateskip.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

    from gateskip.evaluation.harness import HarnessRow
    from gateskip.evaluation.quality import QualityRow

    _Source = tuple[Callable[..., Any], Callable[..., RenderableType]]

__all__ = ["evaluate"]


@configurable()
def evaluate(
    gates: GatesArgument,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="A .jsonl file of rows, or a text file."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", metavar="NAME,...", help="Tasks of lm-eval, instead of --data."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of more task files.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Documents of each task; all where left out.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Documents of a task at once.")] = 1,
    keep: KeepsOption = None,
    compute: ComputesOption = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the data to use; all where left out.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens per text of the data.")] = 512,
    arm: Annotated[
        str | None,
        typer.Option(help="control: the trained backbone without gates; else as GATES are."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the training; for the record.")] = None,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    json: JsonOption = None,
) -> None:
    """Compare the gated model at every budget with the dense model, on the same text or tasks."""
    options = dict(locals())
    budgets = budgets_of(keep, compute)
    if arm is not None:
        one_of("arm", arm, ("gateskip", "control", "random"))
    _check_source(data, tasks, {"--include-path": include_path, "--limit": limit}, max_tokens)
    check_json(json)
    measure, table_of = (
        _of_text(data, max_tokens=max_tokens, max_length=max_length)
        if data is not None
        else _of_tasks(tasks or "", include_path=include_path, limit=limit, batch_size=batch_size)
    )
    from gateskip.evaluation.header import run_header
    from gateskip.skipping.state import state_of

    console = console_for(json)
    model, tokenizer = load_gated(gates, base, dtype)
    state = state_of(model)
    reference = None
    if state.tuned or state.backbone_trained:  # what was trained is not the dense model any more
        reference, _ = load_base(base or model.config._name_or_path, dtype)
    rows = measure(
        model, tokenizer=tokenizer, budgets=budgets, reference=reference, arm=arm, seed=seed,
        progress=json != STDOUT,
    )  # fmt: skip
    console.print(table_of(rows))
    header = run_header(command_line("gateskip eval", options))
    if tasks is not None:
        header["lm_eval"] = importlib.metadata.version("lm_eval")
    write_json(json, {"header": header, "rows": [dataclasses.asdict(row) for row in rows]})


def _check_source(
    data: Path | None, tasks: str | None, of_tasks: dict[str, Any], max_tokens: int | None
) -> None:
    """Raise ConfigError unless there is one thing to evaluate on, and options are of it."""
    if (data is None) == (tasks is None):
        raise ConfigError("give exactly one of --data FILE and --tasks NAME,...")
    stray = [name for name, value in of_tasks.items() if value is not None]
    if data is not None and stray:
        raise ConfigError(f"{stray[0]} is for --tasks; drop it, or --data.")
    if tasks is not None and max_tokens is not None:
        raise ConfigError("--max-tokens is for --data; of tasks, --limit says how much.")


def _of_text(data: Path, **options: Any) -> _Source:
    from gateskip.data import read_texts

    texts = read_texts(data)
    from gateskip.evaluation.quality import evaluate as run

    return functools.partial(run, data=texts, name=data.stem, **options), _text_table


def _of_tasks(tasks: str, **options: Any) -> _Source:
    from gateskip.evaluation.harness import harness_evaluate  # says where lm-eval is missing

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    return functools.partial(harness_evaluate, tasks=names, **options), _task_tables


def _text_table(rows: Sequence[QualityRow]) -> Table:
    from rich.table import Table

    title = f"Quality over {rows[0].tokens:,} scored tokens"
    table = Table(title=title, title_justify="left")
    table.add_column("budget")
    for column in ("skipped", "MACs saved", "loss", "perplexity", "agreement"):
        table.add_column(column, justify="right")
    for row in rows:
        asked = f"keep={row.keep:g}" if row.keep is not None else f"compute={row.compute or 1:g}"
        table.add_row(
            row.arm if row.arm in ("dense", "control") else asked, f"{row.skip_rate:.1%}",
            f"{row.macs_saved:.1%}", f"{row.loss:.3f}", f"{row.perplexity:.2f}",
            f"{row.agreement:.1%}",
        )  # fmt: skip
    return table


def _task_tables(rows: Sequence[HarnessRow]) -> Group:
    """A table per task, since tasks have metrics of their own."""
    from rich.console import Group
    from rich.table import Table

    tables: dict[str, Table] = {}
    for row in rows:
        if row.task not in tables:
            title = f"{row.task}, {row.n:,} documents"
            table = tables[row.task] = Table(title=title, title_justify="left")
            table.add_column("budget")
            for column in ("skipped", "MACs saved", *row.metrics):
                table.add_column(column, justify="right")
        errors = {name: f" ± {e:.3f}" for name, e in row.stderr.items() if e is not None}
        tables[row.task].add_row(
            row.budget or row.arm, f"{row.skip_rate:.1%}", f"{row.macs_saved:.1%}",
            *(f"{value:.3f}{errors.get(name, '')}" for name, value in row.metrics.items()),
        )  # fmt: skip
    return Group(*tables.values())
