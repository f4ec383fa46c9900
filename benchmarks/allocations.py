"""Ways to split a budget over branches, on the same gates and held-out texts, with intervals.

    python benchmarks/allocations.py --gates GATES --model MODEL --data fit.jsonl \\
        --heldout heldout.jsonl --work DIR --json allocations.json

Calibrates once for each allocation (kept in --work, so an interrupted run goes on), then takes the
loss of every held-out text at every budget. Intervals are 95 %, bootstrapped over texts, of the
loss as a share of the dense model's and of differences to the global allocation, paired by text.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

import gateskip
from gateskip.calibration.per_text import per_text
from gateskip.cli.output import check_json, command_line, write_json
from gateskip.config import Budget
from gateskip.data import encode, read_texts, take_tokens
from gateskip.evaluation.header import run_header
from gateskip.skipping.policy import ThresholdTable
from gateskip.skipping.state import state_of

ARMS: dict[str, dict[str, Any]] = {
    "global": {"allocation": "global"},
    "uniform": {"allocation": "uniform"},
    "lagrangian": {"allocation": "searched", "search": "lagrangian"},
    "greedy": {"allocation": "searched", "search": "greedy"},
}
RESAMPLES = 2_000


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gates", required=True)
    parser.add_argument("--model")
    parser.add_argument("--data", required=True, help="calibration and search text")
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--work", required=True, type=Path, help="folder for tables")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--compute", nargs="+", type=float, default=[0.85, 0.75, 0.5])
    parser.add_argument("--tokens", type=int, default=20_000, help="held out")
    parser.add_argument("--calibration-tokens", type=int, default=12_000)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json")
    return parser.parse_args()


def table_of(model: Any, tokenizer: Any, arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """Thresholds of an arm with the seconds they took, from the work folder where they are."""
    path = options.work / f"{arm}.json"
    if not path.is_file():
        started = time.perf_counter()
        table = gateskip.calibrate(
            model, read_texts(options.data), tokenizer, max_tokens=options.calibration_tokens,
            progress=True, **ARMS[arm],
        )  # fmt: skip
        seconds = time.perf_counter() - started
        write_json(str(path), {"seconds": seconds, "table": table.to_json()})
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def interval(losses: Any, dense: Any, draws: Any) -> list[float]:
    """95 % of mean(losses) / mean(dense) over resampled texts."""
    shares = losses[draws].mean(1) / dense[draws].mean(1)
    return [float(x) for x in np.quantile(shares, [0.025, 0.975])]


def run(options: argparse.Namespace) -> None:
    check_json(options.json)
    options.work.mkdir(parents=True, exist_ok=True)
    model = gateskip.load(options.gates, base=options.model, dtype=options.dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model or model.config._name_or_path)
    samples = take_tokens(encode(read_texts(options.heldout), tokenizer), options.tokens)
    samples = [sample for sample in samples if bool(sample.scored[1:].any())]
    dense = per_text(model, samples, None)
    draws = np.random.default_rng(0).integers(0, len(samples), (RESAMPLES, len(samples)))
    rows: list[dict[str, Any]] = []
    losses: dict[tuple[str, float], Any] = {}
    for arm in options.arms:
        found = table_of(model, tokenizer, arm, options)
        state_of(model).policy = ThresholdTable.from_json(found["table"])
        for compute in options.compute:
            seen = per_text(model, samples, Budget(compute=compute))
            losses[arm, compute] = seen.loss
            row = {
                "arm": arm, "compute_asked": compute, "compute": seen.compute,
                "loss": float(seen.loss.mean()),
                "loss_over_dense": float(seen.loss.mean() / dense.loss.mean()),
                "interval": interval(seen.loss, dense.loss, draws),
                "calibration_seconds": found["seconds"],
            }  # fmt: skip
            if ("global", compute) in losses:
                more = losses[arm, compute] - losses["global", compute]
                row["minus_global"] = float(more.mean() / dense.loss.mean())
                row["minus_global_interval"] = interval(more, dense.loss, draws)
            rows.append(row)
    header = run_header(command_line("python benchmarks/allocations.py", vars(options)))
    tokens = int(dense.tokens.sum())
    header |= {"texts": len(samples), "scored_tokens": tokens, "dense": float(dense.loss.mean())}
    write_json(options.json, {"header": header, "rows": rows})
    table = Table(title=f"{len(samples)} held-out texts, loss / dense", box=SIMPLE)
    for column in ("arm", "asked", "spent", "loss / dense", "95 %", "− global, 95 %"):
        table.add_column(column)
    for row in rows:
        less = row.get("minus_global_interval")
        table.add_row(
            row["arm"], f"{row['compute_asked']:g}", f"{row['compute']:.3f}",
            f"{row['loss_over_dense']:.3f}", "{:.3f} to {:.3f}".format(*row["interval"]),
            "" if less is None else "{:+.3f} to {:+.3f}".format(*less),
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    run(parse())
