"""Does risk control keep its promise on real text? Repeated random splits of held-out texts.

    python benchmarks/risk_splits.py --gates GATES --model MODEL --data heldout.jsonl \\
        --work DIR --json risk_splits.json

Every text's loss and agreement is taken once at every budget (kept in --work, so an interrupted
run goes on). Then for each of 1,000 splits into halves a budget is chosen on one half, as
``gateskip.control_risk`` does, and its risk is measured on the other. A split counts as broken
where that is above the limit, although the other half is a sample itself and errs, too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

import gateskip
from gateskip.calibration.per_text import per_text
from gateskip.calibration.risk import CAP, fixed_sequence
from gateskip.cli.output import check_json, command_line, write_json
from gateskip.config import Budget
from gateskip.data import encode, read_texts
from gateskip.evaluation.header import run_header

COMPUTE = (0.98, 0.96, 0.94, 0.92, 0.9, 0.88, 0.86, 0.84, 0.82, 0.8, 0.75, 0.7)
LIMITS = (("loss_increase", 0.02), ("loss_increase", 0.05), ("loss_increase", 0.1),
          ("disagreement", 0.05), ("disagreement", 0.1))  # fmt: skip
SPLITS = 1_000


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gates", required=True)
    parser.add_argument("--model")
    parser.add_argument("--data", required=True, help="texts that thresholds were not fitted on")
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--texts", type=int, default=600)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json")
    return parser.parse_args()


def measured(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """(dense loss [N], loss [N, budgets], disagreement [N, budgets])."""
    options.work.mkdir(parents=True, exist_ok=True)
    model = gateskip.load(options.gates, base=options.model, dtype=options.dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model or model.config._name_or_path)
    samples = encode(read_texts(options.data)[: options.texts], tokenizer, options.max_length)
    samples = [sample for sample in samples if bool(sample.scored[1:].any())]
    dense = per_text(model, samples, None)
    losses, differ = [], []
    for compute in COMPUTE:
        path = options.work / f"{compute:g}.npz"
        if not path.is_file():
            found = per_text(model, samples, Budget(compute=compute))
            with path.open("wb") as stream:
                np.savez(stream, loss=found.loss, differ=1.0 - found.agreement(dense))
        kept = np.load(path)
        losses.append(kept["loss"])
        differ.append(kept["differ"])
    return dense.loss, np.stack(losses, 1), np.stack(differ, 1)


def run(options: argparse.Namespace) -> None:
    check_json(options.json)
    dense, losses, differ = measured(options)
    budgets = [Budget(compute=c) for c in COMPUTE]
    alpha = 1.0 - options.confidence
    rows = []
    for criterion, limit in LIMITS:
        random = np.random.default_rng(0)
        broken, chosen = 0, []
        for _ in range(SPLITS):
            order = random.permutation(len(dense))
            one, other = order[: len(order) // 2], order[len(order) // 2 :]

            def risk_of(column: int, part: Any, criterion: str = criterion) -> Any:
                if criterion == "disagreement":
                    return differ[part, column]
                return np.minimum(losses[part, column] - dense[part], CAP)

            def draws(
                budget: Budget, part: Any = one, criterion: str = criterion, limit: float = limit
            ) -> tuple[Any, float]:
                column = budgets.index(budget)
                risk = risk_of(column, part, criterion)
                base = dense[part] if criterion == "loss_increase" else 1.0
                return risk - limit * base, float(risk.mean())

            upper = CAP if criterion == "loss_increase" else 1.0 - limit
            _, found = fixed_sequence(budgets, draws, upper, alpha)
            chosen.append(found.value)
            if not found.full:
                risk = risk_of(budgets.index(found), other).mean()
                base = dense[other].mean() if criterion == "loss_increase" else 1.0
                broken += risk > limit * base
        everyone = np.minimum(losses - dense[:, None], CAP).mean(0) / dense.mean()
        true = everyone if criterion == "loss_increase" else differ.mean(0)
        within = [c for c, risk in zip(COMPUTE, true, strict=True) if risk <= limit]
        rows.append({
            "criterion": criterion, "limit": limit, "confidence": options.confidence,
            "texts": len(dense) // 2, "splits": SPLITS, "broken": broken / SPLITS,
            "compute_median": float(np.median(chosen)),
            "compute_5_95": [float(x) for x in np.quantile(chosen, [0.05, 0.95])],
            "compute_of_all_texts": min(within, default=1.0),
            "nothing_met": float(np.mean(np.array(chosen) == 1.0)),
        })  # fmt: skip
    header = run_header(command_line("python benchmarks/risk_splits.py", vars(options)))
    write_json(options.json, {"header": header, "rows": rows})
    table = Table(title=f"{SPLITS} splits, {options.confidence:.0%} confidence", box=SIMPLE)
    for column in ("criterion", "limit", "broken", "compute chosen", "5 to 95 %", "best possible"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["criterion"], f"{row['limit']:.0%}", f"{row['broken']:.1%}",
            f"{row['compute_median']:g}", "{:g} to {:g}".format(*row["compute_5_95"]),
            f"{row['compute_of_all_texts']:g}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    run(parse())
