"""Gates on quantised weights: loss and speed of both, beside either alone.

    python benchmarks/quantised.py --gates demo-output/gates --data heldout.jsonl --json FILE

The same gates on bfloat16, 8-bit (torchao) and 4-bit (bitsandbytes nf4) weights of the same model.
Times are medians of alternated repeats within one kind of weights; the ratio to dense bfloat16 is
between kinds that ran one after the other.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

import gateskip
from gateskip.cli.output import check_json, command_line, write_json
from gateskip.config import Budget
from gateskip.data import read_texts, text_windows
from gateskip.errors import GateSkipError
from gateskip.evaluation.bench import run_bench
from gateskip.evaluation.quality import evaluate
from gateskip.execution.timing import keep_freed_memory

KINDS = ("bfloat16", "int8", "nf4")


def quantisation(kind: str) -> Any:
    """What ``from_pretrained`` is told."""
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return None


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gates", required=True, help="folder that gateskip.save wrote")
    parser.add_argument("--model", help="base model; default: the one saved with the gates")
    parser.add_argument("--data", required=True, help="held-out text, .jsonl or .txt")
    parser.add_argument("--json", required=True, help="file for the result")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--compute", type=float, nargs="+", default=[0.9, 0.75, 0.5])
    parser.add_argument("--max-tokens", type=int, default=8000, help="for the loss")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def rows_of(kind: str, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows, header) of one kind of weights."""
    config = quantisation(kind)
    extra = {} if config is None else {"quantization_config": config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = gateskip.load(options.gates, base=options.model, dtype=torch.bfloat16, **extra)
    name = str(options.model or model.config._name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(name)
    texts = read_texts(options.data)
    budgets = [Budget(compute=value) for value in options.compute]
    quality = evaluate(model, texts, tokenizer, budgets=budgets, max_tokens=options.max_tokens)
    ids = text_windows(texts, tokenizer, (4, options.prompt_tokens + options.new_tokens), 5)
    found = run_bench(
        model, ids, budgets=budgets, new_tokens=options.new_tokens, repeats=options.repeats,
        compiled=False, masked=False, name=Path(name).name,
        command=command_line("python benchmarks/quantised.py", vars(options)), progress=True,
    )  # fmt: skip
    loss = {row.compute: (row.loss, row.agreement) for row in quality}
    rows = []
    for row in found["rows"]:
        compute = None if row["arm"] == "dense_eager" else row["compute"]
        known = loss.get(compute) if compute is not None or row["arm"] == "dense_eager" else None
        rows.append({"weights": kind, **row})
        if known is not None:
            rows[-1] |= {"loss": known[0], "agreement_with_own_dense": known[1]}
    return rows, found["header"]


def run(options: argparse.Namespace) -> None:
    """Measure every kind, print and write."""
    check_json(options.json)
    keep_freed_memory()
    result: dict[str, Any] = {"header": {}, "rows": []}
    for kind in options.kinds:
        rows, result["header"] = rows_of(kind, options)
        result["rows"] += rows
        write_json(options.json, result)
    dense = {
        row["phase"]: row["seconds_median"] for row in result["rows"]
        if row["weights"] == options.kinds[0] and row["arm"] == "dense_eager"
    }  # fmt: skip
    table = Table(title="Gates and quantised weights", box=SIMPLE)
    for column in ("weights", "arm", "compute", "phase", "loss", "× own dense", f"× {KINDS[0]}"):
        table.add_column(column)
    for row in result["rows"]:
        row["speedup_vs_first"] = dense[row["phase"]] / row["seconds_median"]
        table.add_row(
            row["weights"], row["arm"], "" if row["compute"] is None else f"{row['compute']:.2f}",
            row["phase"], f"{row['loss']:.3f}" if "loss" in row else "",
            f"{row['speedup_vs_dense']:.2f}", f"{row['speedup_vs_first']:.2f}",
        )  # fmt: skip
    write_json(options.json, result)
    Console().print(table)


def main() -> int:
    """Run; 1 after an error of gateskip."""
    try:
        run(parse())
    except GateSkipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
