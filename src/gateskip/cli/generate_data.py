"""``gateskip generate-data``: training text by the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gateskip.cli.loading import (
    BaseOption,
    ComputeOption,
    DtypeOption,
    KeepOption,
    load_base,
    load_gated,
    one_budget,
)
from gateskip.cli.output import STDOUT, JsonOption, check_json, console_for, write_json
from gateskip.cli.settings import configurable

__all__ = ["generate_data"]


@configurable()
def generate_data(
    model: Annotated[str, typer.Argument(help="A Hugging Face model, or a folder of gates.")],
    prompts: Annotated[
        Path, typer.Option(metavar="FILE", help="Prompts: a line each, or rows of a .jsonl file.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="A .jsonl file for the rows.")],
    samples: Annotated[int, typer.Option(min=1, help="Answers to every prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 answers greedily.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Share of the probability to sample from.")] = 0.95,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts of one batch.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    keep: KeepOption = None,
    compute: ComputeOption = None,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the rows in --out.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Begin again where --out exists.")] = False,
    json: JsonOption = None,
) -> None:
    """Write a model's answers to prompts as rows that ``gateskip train`` takes."""
    budget = one_budget(keep, compute)
    check_json(json)
    from gateskip.errors import ConfigError, OutputError

    if out.exists() and not (resume or overwrite):
        raise OutputError(f"--out {str(out)!r} exists; pass --resume or --overwrite.")
    gated = (Path(model) / "gateskip_config.json").is_file()
    if budget is not None and not gated:
        raise ConfigError(f"budget {budget} needs gates, and {model!r} is a model without.")
    from gateskip.training.generation import generate_data as write
    from gateskip.training.generation import read_prompts

    questions = read_prompts(prompts)
    console = console_for(json)
    loaded, tokenizer = load_gated(model, base, dtype) if gated else load_base(model, dtype)
    if budget is not None:
        import gateskip

        gateskip.set_budget(loaded, **budget.to_json())
    rows = write(
        loaded, tokenizer, questions, out, samples=samples, max_new_tokens=max_new_tokens,
        temperature=temperature, top_p=top_p, batch_size=batch_size, seed=seed, resume=resume,
        overwrite=overwrite, progress=json != STDOUT,
    )  # fmt: skip
    total = len(questions) * samples
    console.print(f"Wrote {rows} rows to {out} ({total} there now).")
    write_json(json, {"out": str(out), "rows": rows, "total": total})
