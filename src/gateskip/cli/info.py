"""``gateskip info``: what gates would cost on a model, from its config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateskip.cli.output import JsonOption, check_json, console_for, write_json
from gateskip.cli.settings import configurable
from gateskip.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from gateskip.costs import ModelShape

__all__ = ["info"]

KINDS = ("scalar", "grouped", "low_rank", "mlp", "vector", "shared")


@configurable()
def info(
    model: Annotated[
        str | None, typer.Argument(help="Hugging Face folder or name; only its config is read.")
    ] = None,
    families: Annotated[bool, typer.Option("--families", help="List architectures.")] = False,
    context: Annotated[int, typer.Option(min=1, help="Keys that a token sees on average.")] = 256,
    rank: Annotated[int, typer.Option(help="Inner width of low_rank gates.")] = 16,
    compensation: Annotated[
        str, typer.Option(help="What a skipped branch adds: none, mean or low_rank.")
    ] = "low_rank",
    compensation_rank: Annotated[int, typer.Option(help="Rank of low_rank compensation.")] = 32,
    json: JsonOption = None,
) -> None:
    """Per gate kind: parameters, MACs, and the skip rate from which on gates pay. No weights."""
    check_json(json)
    console = console_for(json)
    if families:
        from gateskip.retrofit.families import FAMILIES

        names = list(FAMILIES.names())
        console.print("\n".join(names))
        write_json(json, {"families": names})
        return
    if model is None:
        raise ConfigError("MODEL is missing; name a model, or use --families.")
    options = {
        "rank": rank, "compensation": compensation, "compensation_rank": compensation_rank,
    }  # fmt: skip
    shape, model_type = _shape(model)
    rows = [_row(shape, kind, options, context) for kind in KINDS]
    console.print(
        f"{model_type}: {shape.layers} layers, width {shape.hidden}; "
        f"{shape.dense_macs(context) / 1e6:.1f} M decoder MACs per token at {context} keys, "
        f"LM head {shape.macs_lm_head / 1e6:.1f} M more."
    )
    console.print(_table(rows))
    from gateskip import kernels

    hint = (
        "" if kernels.available() else "; pip install gateskip[cpu] makes skipping on a CPU faster"
    )
    console.print(f"Before training, fitted gates cost as little as scalar ones. CPU kernels: "
                  f"{kernels.backend()}{hint}.")  # fmt: skip
    result = {
        "model_type": model_type,
        "layers": shape.layers,
        "hidden": shape.hidden,
        "context": context,
        "decoder_macs": shape.dense_macs(context),
        "lm_head_macs": shape.macs_lm_head,
        "gates": rows,
        "kernels": kernels.backend(),
    }
    write_json(json, result)


def _shape(name: str) -> tuple[ModelShape, str]:
    from transformers import AutoConfig

    from gateskip.retrofit.attach import find_family

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"model {name!r} has no config that loads ({str(error).strip().splitlines()[0]}); "
            "give a Hugging Face folder or name."
        ) from error
    family = find_family(config)
    return family.shape_of_config(config, 2), str(config.model_type)


def _row(shape: ModelShape, kind: str, options: dict[str, Any], keys: float) -> dict[str, Any]:
    from gateskip.config import GateConfig
    from gateskip.costs import branch_cost, break_even_skip_rate, gate_parameters

    config = GateConfig.from_json(options | {"kind": kind})
    costs = [branch_cost(shape, config, (0, branch)) for branch in config.branches]
    each = gate_parameters(kind, shape.hidden, config.rank, config.groups or shape.heads)
    macs = shape.layers * sum(cost.kept_gate + cost.decision for cost in costs)
    gates = len(costs) * (1 if kind == "shared" else shape.layers)
    return {
        "kind": kind,
        "parameters": gates * each,
        "macs_per_token": macs,
        "share_of_decoder": macs / shape.dense_macs(keys),
        "break_even_skip_rate": break_even_skip_rate(shape, config, keys),
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(title="Gates on all branches, nothing skipped yet", title_justify="left")
    table.add_column("kind")
    for column in ("parameters", "MACs per token", "of decoder MACs", "pays from skip rate"):
        table.add_column(column, justify="right")
    for row in rows:
        pays = row["break_even_skip_rate"]
        table.add_row(
            row["kind"], f"{row['parameters']:,}", f"{row['macs_per_token']:,}",
            f"{row['share_of_decoder']:.2%}", "never" if pays > 1 else f"{pays:.1%}",
        )  # fmt: skip
    return table
