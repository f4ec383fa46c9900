"""``gateskip compare``: methods side by side, on the same model, text and budgets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gateskip.cli.loading import (
    ComputesOption,
    DataOption,
    DtypeOption,
    KeepsOption,
    budgets_of,
    load_base,
)
from gateskip.cli.output import (
    STDOUT,
    JsonOption,
    check_json,
    command_line,
    console_for,
    write_json,
)
from gateskip.cli.settings import configurable, section
from gateskip.errors import CheckpointError, ConfigError, OutputError

if TYPE_CHECKING:
    from rich.table import Table

    from gateskip.evaluation.compare import CompareGroup, CompareRow
    from gateskip.evaluation.statistics import Estimate

__all__ = ["compare"]

COMPUTE = [0.85, 0.75]


@configurable("gate")
def compare(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Hugging Face folder or name of the base model.")],
    data: DataOption,
    fit_data: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Other text, to fit on; a third for thresholds."),
    ],
    methods: Annotated[
        str,
        typer.Option(help="Names with commas between: gateskip, random, shortgpt and others."),
    ] = "gateskip,random,shortgpt,llm_drop",
    keep: KeepsOption = None,
    compute: ComputesOption = None,
    gates: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR", help="Saved gates, as further rows; may be repeated."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Of methods that draw, with commas between.")] = "0",
    fit_tokens: Annotated[int, typer.Option(min=1, help="Tokens of FIT_DATA to use.")] = 30_000,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the data to use; all where left out.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens per text.")] = 512,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw loss against MACs saved: .png or .svg."),
    ] = None,
    dtype: DtypeOption = "auto",
    json: JsonOption = None,
) -> None:
    """Compare gates with other methods and saved gates, at equal budgets on the same text."""
    options = {k: v for k, v in locals().items() if k != "context"}
    budgets = budgets_of(keep, compute if keep or compute else COMPUTE)
    numbers = _seeds(seeds)
    folders = _folders(gates or ())
    check_json(json)
    from gateskip.evaluation.compare import OURS, beaten_by_random, check_methods, grouped
    from gateskip.evaluation.compare import compare as run

    names = [part.strip() for part in methods.split(",") if part.strip()]
    check_methods(names, tuple(folders))
    from gateskip.config import GateConfig

    config = GateConfig.from_json(section("gate", {}, context, {}))
    if plot is not None:
        _check_plot(plot)
    from gateskip.data import read_texts

    texts, fit_texts = read_texts(data), read_texts(fit_data)
    from gateskip.evaluation.header import run_header

    console = console_for(json)
    base, tokenizer = load_base(model, dtype)
    rows = run(
        base, texts, fit_texts, tokenizer, methods=names, budgets=budgets, gates=folders,
        seeds=numbers, config=config, fit_tokens=fit_tokens, max_tokens=max_tokens,
        max_length=max_length, progress=json != STDOUT,
    )  # fmt: skip
    groups = grouped(rows)
    failed = [row for row in rows if row.error is not None]
    console.print(_table(groups, failed, rows[0].tokens or 0))
    for row in failed:
        console.print(f"warning: {row.error}", style="yellow", markup=False)
    for group in beaten_by_random(groups):
        console.print(
            f"{group.method} at {group.budget}: random skipping saves as much at no more loss."
        )
    if OURS in names:
        console.print("gateskip: gates fitted in closed form, not trained.", style="dim")
    header = run_header(command_line("gateskip compare", options))
    write_json(json, {"header": header, "rows": [dataclasses.asdict(row) for row in rows]})
    if plot is not None:
        from gateskip.explain.compare import plot_comparison

        plot_comparison(groups, plot)
        console.print(f"Wrote {plot}.")


def _seeds(text: str) -> list[int]:
    """``"0,1"`` as numbers. Raises ConfigError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts) or len({*parts}) < len(parts):
        raise ConfigError(f"seeds={text!r} must be different numbers with commas between: 0,1,2.")
    return [int(part) for part in parts]


def _folders(gates: Sequence[str]) -> dict[str, Path]:
    """Folders by the names to show. Raises CheckpointError, or ConfigError for a name twice."""
    found: dict[str, Path] = {}
    for one in map(Path, gates):
        if not (one / "gateskip_config.json").is_file():
            raise CheckpointError(f"--gates {str(one)!r} is no folder of saved gates.")
        name = one.resolve().name
        if name in found:
            raise ConfigError(f"two gate sets are called {name!r}; rename a folder.")
        found[name] = one
    return found


def _check_plot(path: Path) -> None:
    from gateskip.explain.plot import check_plotting

    check_plotting()
    if path.suffix not in (".png", ".svg"):
        raise OutputError(f"--plot {str(path)!r} must end in .png or .svg.")
    if not path.parent.is_dir():
        raise OutputError(f"--plot {str(path)!r}: folder {str(path.parent)!r} does not exist.")


def _table(groups: Sequence[CompareGroup], failed: Sequence[CompareRow], tokens: int) -> Table:
    """Budget by budget, so that what is compared stands together."""
    from rich.box import SIMPLE
    from rich.table import Table

    title = f"Methods over {tokens:,} scored tokens; saved: decoder MACs, net"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for column in ("budget", "method"):
        table.add_column(column, no_wrap=True)
    for column in ("saved", "loss", "Δ dense", "agrees"):
        table.add_column(column, justify="right", no_wrap=True)
    for budget in dict.fromkeys([g.budget for g in groups] + [row.budget for row in failed]):
        for group in groups:
            if group.budget == budget:
                table.add_row(
                    budget, group.method, f"{group.macs_saved:.1%}", _mean(group.loss),
                    f"{group.loss_over_dense:+.3f}", f"{group.agreement:.1%}",
                )  # fmt: skip
        for row in failed:
            if row.budget == budget:
                table.add_row(budget, row.method, "–", "not measured", "–", "–")
        table.add_section()
    return table


def _mean(found: Estimate) -> str:
    """``1.234``, or ``1.234 ± 0.005`` over seeds."""
    text = f"{found.mean:.3f}"
    if found.interval is not None:
        text += f" ± {found.interval.high - found.mean:.3f}"
    return text
