"""``gateskip calibrate``: new thresholds for saved gates, or a check of those they have."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateskip.cli.fit import print_floor
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
from gateskip.config import ALLOCATIONS, one_of
from gateskip.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from rich.table import Table

    from gateskip.calibration.check import CheckRow
    from gateskip.calibration.risk import RiskReport
    from gateskip.config import Budget

__all__ = ["calibrate"]


@configurable()
def calibrate(
    gates: GatesArgument,
    data: Annotated[
        list[Path],
        typer.Option("--data", metavar="FILE", help="A .jsonl or text file; may be repeated."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for the gates.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Change nothing: compare what every file keeps with what was asked."
        ),
    ] = False,
    keep: KeepsOption = None,
    compute: ComputesOption = None,
    allocation: Annotated[
        str, typer.Option(help="How a budget is split over branches: global, uniform or searched.")
    ] = "global",
    search: Annotated[
        str, typer.Option(help="For searched: lagrangian, or greedy (blind to interactions).")
    ] = "lagrangian",
    weigh_cost: Annotated[
        bool, typer.Option(help="Weigh scores against the MACs that a skip saves.")
    ] = True,
    max_loss_increase: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="Find the cheapest budget within: 2% or 0.02."),
    ] = None,
    min_agreement: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="The same for tokens that agree with the dense model."),
    ] = None,
    max_accuracy_drop: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="The same for right answers to prompts, generated."),
    ] = None,
    confidence: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Of such a bound; 95% where left out.")
    ] = None,
    risk_data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Texts for it; every second one of DATA if left out."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of the data to use; 12,000, or of every file 20,000 in a check."),
    ] = None,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    overwrite: Annotated[bool, typer.Option(help="Write into a folder that is not empty.")] = False,
    json: JsonOption = None,
) -> None:
    """Find thresholds for every budget at once, and save them with the gates; or check them."""
    one_of("allocation", allocation, ALLOCATIONS)
    one_of("search", search, ("lagrangian", "greedy"))
    check_json(json)
    given: dict[str, Any] = {
        "max_loss_increase": _share(max_loss_increase, "--max-loss-increase"),
        "min_agreement": _share(min_agreement, "--min-agreement"),
        "max_accuracy_drop": _share(max_accuracy_drop, "--max-accuracy-drop"),
    }
    bound = {name: value for name, value in given.items() if value is not None}
    if len(bound) > 1 or (not bound and (confidence is not None or risk_data is not None)):
        raise ConfigError(f"give exactly one bound: {', '.join(map(_option, given))}.")
    sure = _share(confidence, "--confidence") or 0.95
    if check and bound:
        raise ConfigError(f"--check changes nothing; leave it or {_option(*bound)} out.")
    if check:
        if out is not None:
            raise ConfigError(f"--out {str(out)!r}: --check writes no gates; leave one out.")
        budgets = budgets_of(keep, compute) if keep or compute else []
        _check(gates, data, budgets, max_tokens or 20_000, base, dtype, json)
        return
    if keep or compute:
        raise ConfigError("--keep, --compute are for --check: a calibration serves every budget.")
    if out is None:
        raise OutputError("--out is missing: name a folder for the gates, or use --check.")
    from gateskip.retrofit.checkpoint import check_output_folder

    check_output_folder(out, overwrite)
    from gateskip.data import read_texts

    rows = [row for path in data for row in read_texts(path)]
    texts = None if risk_data is None else read_texts(risk_data)
    if bound and texts is None:
        texts, rows = rows[1::2], rows[::2]

    import gateskip

    console = console_for(json)
    model, tokenizer = load_gated(gates, base, dtype)
    table = gateskip.calibrate(
        model, rows, tokenizer, allocation=allocation, weigh_cost=weigh_cost, search=search,
        max_tokens=max_tokens or 12_000, progress=json != STDOUT,
    )  # fmt: skip
    print_floor(console, table)
    report = None
    if bound:
        reference = _reference(model, base, dtype)
        report = gateskip.control_risk(
            model, texts, tokenizer, **bound, confidence=sure, reference=reference,
            progress=json != STDOUT,
        )  # fmt: skip
        _print_risk(console, report)
    gateskip.save(model, out, overwrite=overwrite)
    console.print(f"Saved to {out}.")
    result = {"out": str(out), "policy": dataclasses.asdict(table)}
    if report is not None:
        result["risk"] = dataclasses.asdict(report) | {"budget": report.budget.to_json()}
    write_json(json, result)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _share(text: str | None, option: str) -> float | None:
    """A number in (0, 1), given as such or with a percent sign. Raises ConfigError."""
    if text is None:
        return None
    digits, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        value = float(digits) / (100.0 if percent else 1.0)
    except ValueError:
        value = -1.0
    if not 0.0 < value < 1.0:
        raise ConfigError(f"{option} {text!r} must be a share in (0, 1), such as 2% or 0.02.")
    return value


def _reference(model: Any, base: str | None, dtype: str) -> Any:
    """The dense model, where training changed this one's backbone; else None."""
    from gateskip.skipping.state import state_of

    state = state_of(model)
    if not (state.tuned or state.backbone_trained):
        return None
    return load_base(base or model.config._name_or_path, dtype)[0]


def _print_risk(console: Any, report: RiskReport) -> None:
    what = report.criterion.replace("_", " ")
    for row in report.rows:
        console.print(
            f"{row.budget}: {what} {row.risk:+.2%}, p = {row.p_value:.3g}"
            f"{'' if row.accepted else ', not accepted'}"
        )
    if report.met:
        console.print(
            f"With {report.confidence:.0%} confidence, on {report.texts} texts that thresholds did "
            f"not see: {what} at most {report.limit:.2%} at {report.budget}, the default now."
        )
    else:
        console.print(
            f"No budget keeps {what} below {report.limit:.2%} with {report.confidence:.0%} "
            f"confidence on {report.texts} texts; nothing is skipped by default."
        )


def _check(
    gates: str,
    data: Sequence[Path],
    budgets: Sequence[Budget],
    max_tokens: int,
    base: str | None,
    dtype: str,
    json: str | None,
) -> None:
    names = [path.stem for path in data]
    if len(set(names)) < len(names):
        raise ConfigError(f"--data: two files are called {max(names, key=names.count)!r}.")
    from gateskip.data import read_texts

    texts: dict[str, Any] = {path.stem: read_texts(path) for path in data}
    from gateskip.calibration.check import check_calibration
    from gateskip.evaluation.header import run_header

    model, tokenizer = load_gated(gates, base, dtype)
    rows = check_calibration(
        model, texts, tokenizer, budgets=budgets, max_tokens=max_tokens, progress=json != STDOUT
    )
    console = console_for(json)
    console.print(_check_table(rows))
    missed = sorted({row.data for row in rows if not row.kept})
    if missed:
        console.print(
            f"Drift: {', '.join(missed)} keeps more or less than was asked. Calibrate on such text "
            "too, or hold the budget while it runs (gateskip.hold_budget)."
        )
    found = [dataclasses.asdict(row) | {"kept": row.kept} for row in rows]
    options = {"gates": gates, "data": data, "max_tokens": max_tokens}
    header = run_header(command_line("gateskip calibrate --check", options))
    write_json(json, {"header": header, "rows": found})


def _check_table(rows: Sequence[CheckRow]) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    title = "Kept, beside what the thresholds promise; branches: mean distance (largest), points"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for column in ("text", "budget", "promised", "kept", "off by", "MACs", "branches", ""):
        left = column in ("text", "budget", "")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.data, row.budget, f"{row.expected:.1%}", f"{row.keep:.1%}",
            f"{100 * (row.keep - row.expected):+.1f}", f"{row.compute:.1%}",
            f"{100 * row.branch_mean:.1f} ({100 * row.branch_worst:.1f})",
            "" if row.kept else "drift",
        )  # fmt: skip
    return table
