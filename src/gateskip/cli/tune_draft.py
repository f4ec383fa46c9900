"""``gateskip tune-draft``: which draft is fastest on this machine, if any beats plain decoding."""

from __future__ import annotations

from typing import Annotated

import typer

from gateskip.cli.loading import (
    BaseOption,
    ComputeOption,
    DataOption,
    DraftStoreOption,
    DtypeOption,
    GatesArgument,
    KeepOption,
    load_gated,
    one_budget,
    stored,
)
from gateskip.cli.output import JsonOption, check_json, console_for, write_json
from gateskip.cli.settings import configurable

__all__ = ["tune_draft"]


@configurable()
def tune_draft(
    gates: GatesArgument,
    data: DataOption,
    keep: KeepOption = None,
    compute: ComputeOption = None,
    draft_keep: Annotated[
        list[float] | None,
        typer.Option(help="Share kept while drafting; may be repeated. 0.3 and 0.5 if left out."),
    ] = None,
    draft_tokens: Annotated[
        list[str] | None,
        typer.Option(help="Tokens of a draft, or 'auto'; may be repeated. 2, 4 and auto."),
    ] = None,
    lookup: Annotated[bool, typer.Option(help="Try drafts looked up in the prompt, too.")] = True,
    draft_store: DraftStoreOption = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens after each prompt.")] = 64,
    max_prompts: Annotated[int, typer.Option(min=1, help="Rows of the data.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements; medians count.")] = 3,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    json: JsonOption = None,
) -> None:
    """Time speculative decoding of prompts beside plain decoding at a budget."""
    budget = one_budget(keep, compute, None, None)
    check_json(json)
    from gateskip.data import read_texts

    rows = read_texts(data)
    import gateskip

    model, tokenizer = load_gated(gates, base, dtype)
    if budget is not None:
        gateskip.set_budget(model, keep=budget.keep, compute=budget.compute)
    policies = (["lookup"] if lookup else []) + stored(draft_store, tokenizer)
    found = gateskip.tune_draft(
        model, rows, tokenizer, draft_keep=draft_keep or (0.3, 0.5),
        draft_tokens=[int(t) if t.isdigit() else t for t in draft_tokens or ("2", "4", "auto")],
        draft_policies=policies, new_tokens=new_tokens, max_prompts=max_prompts, repeats=repeats,
    )  # fmt: skip
    from rich.table import Table

    table = Table(title="Speculative decoding beside plain decoding", title_justify="left")
    for column in ("draft", "length", "time", "accepted", "tokens a pass", "MACs", "same tokens"):
        table.add_column(column, justify="left" if column == "draft" else "right")
    for tried in found.tried:
        draft = tried.settings.get("draft_policy", tried.settings.get("draft_keep", "none"))
        length = str(tried.settings.get("draft_tokens", ""))
        table.add_row(
            str(draft), length, f"{tried.speedup:.2f}×", f"{tried.acceptance:.0%}",
            f"{tried.tokens_per_pass:.2f}", f"{tried.macs:.2f}×", f"{tried.same:.0%}",
        )  # fmt: skip
    console = console_for(json)
    console.print(table)
    best = found.best
    if best is None:
        console.print("None of them beats plain decoding here.")
    else:
        console.print(f"Fastest: {best.settings}, {best.speedup:.2f}× plain decoding.")
    write_json(json, found.to_json())
