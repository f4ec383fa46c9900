"""``gateskip sweep``: quality and speed over budgets, and which of them are worth having."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateskip.cli.loading import (
    BaseOption,
    ComputesOption,
    DataOption,
    DtypeOption,
    KeepsOption,
    budgets_of,
    load_base,
    load_gated,
)
from gateskip.cli.output import JsonOption, check_json, console_for, write_json
from gateskip.cli.settings import configurable
from gateskip.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from gateskip.evaluation.sweep import SweepRow

__all__ = ["sweep"]


@configurable()
def sweep(
    gates: Annotated[
        list[str], typer.Argument(metavar="GATES...", help="Folders of gates; one or several.")
    ],
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for what is found.")],
    keep: KeepsOption = None,
    compute: ComputesOption = None,
    speed: Annotated[bool, typer.Option(help="Also time prefill and decoding.")] = True,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the data to use; all where left out.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens per text.")] = 512,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of timed prompts.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Timed decoding steps.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Timings; medians count.")] = 5,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    overwrite: Annotated[bool, typer.Option(help="Start anew in a folder of a sweep.")] = False,
    json: JsonOption = None,
) -> None:
    """Measure gate sets over budgets; say and plot which budgets nothing else beats. Resumes."""
    names = [Path(one).name for one in gates]
    for one, name in zip(gates, names, strict=True):
        if not (Path(one) / "gateskip_config.json").is_file():
            raise CheckpointError(f"{one!r} is no folder of saved gates.")
        if names.count(name) > 1:
            raise ConfigError(f"two gate sets are called {name!r}; rename a folder.")
    budgets = budgets_of(keep, compute) if keep or compute else None
    check_json(json)
    from gateskip.data import read_texts
    from gateskip.explain.plot import check_plotting

    check_plotting()
    texts = read_texts(data)
    from gateskip.evaluation.sweep import Journal, file_hash, sweep_gates
    from gateskip.skipping.state import state_of

    settings = {
        "gates": {name: file_hash(Path(one)) for one, name in zip(gates, names, strict=True)},
        "data": file_hash(data), "max_tokens": max_tokens, "max_length": max_length,
        "dtype": dtype, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens,
        "repeats": repeats,
    }  # fmt: skip
    journal = Journal(out, settings, overwrite=overwrite)
    console = console_for(json)
    rows: list[SweepRow] = []
    reference = None
    for one, name in zip(gates, names, strict=True):
        with console.status(f"Sweeping {name}"):
            model, tokenizer = load_gated(one, base, dtype)
            state = state_of(model)
            if (state.tuned or state.backbone_trained) and reference is None:
                reference, _ = load_base(base or model.config._name_or_path, dtype)
            rows += sweep_gates(
                model, texts, tokenizer, name, journal, budgets=budgets, max_tokens=max_tokens,
                reference=reference, max_length=max_length, speed=speed, new_tokens=new_tokens,
                prompt_tokens=prompt_tokens, repeats=repeats, say=console.print,
            )  # fmt: skip
    _finish(rows, out, console, json)


def _finish(rows: list[SweepRow], out: Path, console: Any, json: str | None) -> None:
    from gateskip.evaluation.header import run_header
    from gateskip.evaluation.sweep import fronts
    from gateskip.explain.pareto import plot_sweep

    first = next(row for row in rows if not row.budget)
    rows = [first, *(row for row in rows if row.budget)]
    front = fronts(rows)
    console.print(_table(rows, front))
    console.print("Not beaten by another row in both loss and: c MACs, p prefill, d decode time.")
    plots = plot_sweep(rows, front, out)
    table = [
        dataclasses.asdict(row) | {f"front_{cost}": row in found for cost, found in front.items()}
        for row in rows
    ]
    write_json(str(out / "sweep.json"), {"header": run_header("gateskip sweep"), "rows": table})
    _write_csv(out / "sweep.csv", table)
    files = (*plots, out / "sweep.json", out / "sweep.csv")
    console.print(f"Wrote {', '.join(map(str, files))}.")
    write_json(json, table)


def _write_csv(path: Path, table: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(table[0]))
    writer.writeheader()
    writer.writerows(table)
    temporary = path.with_suffix(".csv.tmp")
    temporary.write_text(text.getvalue(), encoding="utf-8")
    os.replace(temporary, path)


def _table(rows: Sequence[SweepRow], front: dict[str, list[SweepRow]]) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    title = f"Sweep over {rows[0].tokens:,} scored tokens"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    timed = rows[-1].prefill is not None
    for column in ("gates", "budget"):
        table.add_column(column, no_wrap=True)
    for column in ("MACs", "loss", "agrees", *(("prefill", "decode") if timed else ())):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("front", no_wrap=True)
    for row in rows:
        costs = (row.prefill, row.decode) if timed else ()
        times = ["" if t is None else f"{t:.1%}" for t in costs]
        marks = "".join(cost[0] for cost, found in front.items() if row in found)
        table.add_row(
            row.gates, row.budget, f"{row.compute:.1%}", f"{row.loss:.3f}",
            f"{row.agreement:.1%}", *times, marks,
        )  # fmt: skip
    return table
