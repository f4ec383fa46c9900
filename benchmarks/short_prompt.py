"""Where a short prompt goes: ``python benchmarks/short_prompt.py --gates FOLDER --json FILE``.

One prefill, dense and at budgets: wall time (median), time in operations by torch's profiler, and
the rest, which is Python; the functions of the library with the most time of their own by Python's
profiler, per gated branch. Both profilers add cost of their own, so their parts are shares, not
times to compare with the wall's.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import pstats
import statistics
import time
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

import gateskip
from gateskip.cli.output import check_json, command_line, write_json
from gateskip.evaluation.header import run_header
from gateskip.execution.api import dense
from gateskip.skipping.state import state_of

PRODUCTS = ("addmm", "aten::mm", "mkldnn", "aten::linear", "MATVEC")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gates", required=True, help="folder that gateskip.save wrote")
    parser.add_argument("--model", help="base model; default: the one saved with the gates")
    parser.add_argument("--json", required=True, help="file for the result")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--keep", type=float, nargs="+", default=(1.0, 0.75, 0.3))
    parser.add_argument("--repeats", type=int, default=15)
    return parser.parse_args()


def measured(model: Any, ids: torch.Tensor, repeats: int) -> dict[str, Any]:
    """One arm."""

    def step() -> None:
        model(ids, logits_to_keep=1)

    for _ in range(4):
        step()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - begun))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = profiler.key_averages()
    operations = sum(e.self_cpu_time_total for e in events) / 1e3
    products = sum(e.self_cpu_time_total for e in events if any(name in e.key for name in PRODUCTS))
    python = cProfile.Profile()
    python.enable()
    for _ in range(5):
        step()
    python.disable()
    stats: Any = pstats.Stats(python)
    own = {}
    for (file, _, function), (_, calls, total, _, _) in stats.stats.items():
        if "gateskip" in file:
            name = f"{file.split('gateskip/')[-1]}:{function}"
            own[name] = {"ms": round(1e3 * total / 5, 3), "calls": calls // 5}
    top = dict(sorted(own.items(), key=lambda item: -item[1]["ms"])[:12])
    return {
        "wall": round(statistics.median(times), 2), "operations": round(operations, 2),
        "products": round(products / 1e3, 2), "calls": sum(e.count for e in events),
        "functions": top,
    }  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    options = parse()
    check_json(options.json)
    model = gateskip.load(options.gates, base=options.model, dtype=options.dtype)
    ids = torch.randint(
        10, model.config.vocab_size - 10, (1, options.tokens),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    arms: dict[str, contextlib.AbstractContextManager[Any]] = {"dense": dense(model)}
    arms |= {f"keep {k:g}": gateskip.budget(model, keep=k) for k in options.keep}
    rows = {}
    for name, arm in arms.items():
        with torch.no_grad(), arm:
            rows[name] = measured(model, ids, options.repeats)
    command = command_line("python benchmarks/short_prompt.py", vars(options))
    header = run_header(command) | {
        "unit": "ms", "dtype": options.dtype, "branches": len(state_of(model).branches),
        "prompt": f"1 x {options.tokens} random ids",
    }  # fmt: skip
    write_json(options.json, {"header": header, "rows": rows})
    table = Table(title=f"Prefill of 1 x {options.tokens}, ms", box=SIMPLE)
    for column in ("", "wall", "operations", "products", "calls"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rows.items():
        table.add_row(name, *(str(row[key]) for key in ("wall", "operations", "products", "calls")))
    Console().print(table)


if __name__ == "__main__":
    main()
