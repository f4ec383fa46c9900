"""What gates cost in time: ``python benchmarks/gate_cost.py --gates FOLDER --json FILE``.

Prefill: the decision (one pass over the residual) plus what the gated join takes longer than the
plain sum that it replaces, for every branch. Decoding: a gated token with decisions, against one
without, nothing skipped; the gate's value is one more dot product like the decision's, so the
difference is counted twice. Both as shares of the dense model's time for the same tokens,
alternated, medians.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import gateskip
from gateskip import kernels
from gateskip.cli.output import check_json, command_line, write_json
from gateskip.execution.api import dense
from gateskip.execution.timing import keep_freed_memory
from gateskip.fitting.passes import eval_mode
from gateskip.retrofit.attach import gated_branches
from gateskip.skipping.join import join
from gateskip.skipping.score import Norm, branch_score
from gateskip.skipping.state import override, state_of


def clock(step: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def measure(model: Any, batch: int, tokens: int, repeats: int) -> dict[str, float]:
    """Median seconds of the dense call, and of what gates add to it by parts."""
    state = state_of(model)
    family = state.family
    layers = model.get_submodule(family.decoder).layers
    gates = []
    for (layer, kind), module in gated_branches(model, family).items():
        gates.append((module.skip_gate, Norm.of(layers[layer], family, kind)))
    hidden, dtype = state.shape.hidden, next(model.parameters()).dtype
    h, o, u = (torch.randn(batch, tokens, hidden).to(dtype) for _ in range(3))
    ids = torch.randint(state.shape.vocab, (batch, 512 if tokens == 1 else tokens))
    scores = torch.randn(batch * tokens) if tokens > 1 else None  # found by the decision
    cache = None
    if tokens == 1:
        with dense(model):
            cache = model(ids, use_cache=True, logits_to_keep=1).cache

    def run_dense() -> None:
        with dense(model):
            if cache is None:
                model(ids, use_cache=True, logits_to_keep=1)
            else:
                model(ids[:, :1], cache=cache, use_cache=True)

    def decide() -> None:
        for gate, norm in gates:
            branch_score(h, norm, gate, "mean_logit")

    def gated() -> None:
        for gate, _ in gates:
            join(h, o, u, gate, scores)

    def plain() -> None:
        for _ in gates:
            h + o

    def token(thresholds: Any) -> Callable[[], None]:
        def run() -> None:
            with override(state, thresholds=thresholds):
                model(ids[:, :1], cache=gated_cache, use_cache=True)

        return run

    steps = {"dense": run_dense, "decide": decide, "join": gated, "sum": plain}
    if tokens == 1:
        gated_cache = model(ids, use_cache=True, logits_to_keep=1).cache
        everyone = dict.fromkeys(state.branches, -math.inf)
        steps = {"dense": run_dense, "decided": token(everyone), "undecided": token(None)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            took = clock(step)
            if repeat:
                seconds[name].append(took)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Time what gates add.")
    parser.add_argument("--gates", required=True)
    parser.add_argument("--model")
    parser.add_argument("--json")
    parser.add_argument("--repeats", type=int, default=25)
    options = parser.parse_args()
    check_json(options.json)
    keep_freed_memory()
    rows = []
    for dtype in ("bfloat16", "float32"):
        model = gateskip.load(options.gates, base=options.model, dtype=dtype)
        with eval_mode(model):
            for phase, batch, tokens in (("prefill", 4, 512), ("decode", 1, 1)):
                found = measure(model, batch, tokens, options.repeats)
                if phase == "prefill":
                    added = found["decide"] + found["join"] - found["sum"]
                else:
                    added = 2.0 * (found["decided"] - found["undecided"])
                rows.append(
                    {"phase": phase, "dtype": dtype, "batch": batch, "tokens": tokens}
                    | {f"seconds_{name}": value for name, value in found.items()}
                    | {"share": added / found["dense"]}
                )
    table = Table(title="Time of gates as a share of the dense model's")
    for column in ("phase", "dtype", "seconds", "share"):
        table.add_column(column)
    for row in rows:
        times = (
            f"{name.removeprefix('seconds_')} {value * 1e3:.2f} ms"
            for name, value in row.items()
            if name.startswith("seconds_")
        )
        table.add_row(row["phase"], row["dtype"], ", ".join(times), f"{row['share']:.2%}")
    Console().print(table)
    header = {
        "command": command_line("python benchmarks/gate_cost.py", vars(options)),
        "torch": torch.__version__, "threads": torch.get_num_threads(),
        "kernels": kernels.backend(), "repeats": options.repeats,
    }  # fmt: skip
    write_json(options.json, {"header": header, "rows": rows})


if __name__ == "__main__":
    main()
