"""``gateskip eval``: loss, perplexity and agreement with the dense model at budgets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from gateskip.cli.loading import (
    BaseOption,
    ComputesOption,
    DataOption,
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

if TYPE_CHECKING:
    from rich.table import Table

    from gateskip.evaluation.quality import QualityRow

__all__ = ["evaluate"]


@configurable()
def evaluate(
    gates: GatesArgument,
    data: DataOption,
    keep: KeepsOption = None,
    compute: ComputesOption = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the data to use; all where left out.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens per text.")] = 512,
    arm: Annotated[
        str | None,
        typer.Option(help="control: the trained backbone without gates; else as GATES are."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the training; for the record.")] = None,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    json: JsonOption = None,
) -> None:
    """Compare the gated model at every budget with the dense model, on the same tokens."""
    options = dict(locals())
    budgets = budgets_of(keep, compute)
    if arm is not None:
        one_of("arm", arm, ("gateskip", "control", "random"))
    check_json(json)
    from gateskip.data import read_texts

    texts = read_texts(data)
    from gateskip.evaluation.header import run_header
    from gateskip.evaluation.quality import evaluate as run
    from gateskip.skipping.state import state_of

    console = console_for(json)
    model, tokenizer = load_gated(gates, base, dtype)
    state = state_of(model)
    reference = None
    if state.tuned or state.backbone_trained:  # what was trained is not the dense model any more
        reference, _ = load_base(base or model.config._name_or_path, dtype)
    rows = run(
        model, texts, tokenizer, budgets=budgets, max_length=max_length, max_tokens=max_tokens,
        reference=reference, arm=arm, name=data.stem, seed=seed, progress=json != STDOUT,
    )  # fmt: skip
    console.print(_table(rows))
    header = run_header(command_line("gateskip eval", options))
    write_json(json, {"header": header, "rows": [dataclasses.asdict(row) for row in rows]})


def _table(rows: Sequence[QualityRow]) -> Table:
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
