"""Batch × prompt × budgets, prefill and decode: ``python benchmarks/engine.py --help``.

Every cell times dense (eager and compiled) and gated models in one run, and goes to ``--json`` when
it is done: run it again and it goes on with the cells that are missing. At the end a profile of one
gated prefill and of one gated decoding step by what the time went to (``--profile``).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoTokenizer

import gateskip
from gateskip.cli.output import check_json, command_line, write_json
from gateskip.config import Budget
from gateskip.data import read_texts, text_windows
from gateskip.errors import GateSkipError
from gateskip.evaluation.bench import print_bench, run_bench
from gateskip.execution.timing import keep_freed_memory

BATCH, PROMPT = (1, 4, 16), (64, 512, 2048)
KEEP = (0.85, 0.75, 0.5, 0.3)
#: What a profile's entries are, by the beginning of their names, first match first.
GROUPS = (
    ("decision", ("SCORE",)),
    ("gather and norm", ("NORM", "aten::index_select", "aten::index", "aten::gather")),
    ("scatter and join", ("JOIN", "ADD", "aten::index_copy", "aten::index_add")),
    ("K/V writer and rotary", ("ROTATE", "GATHER", "aten::cat")),
    ("activation", ("SWIGLU",)),
    ("all layers of a token", ("STACK", "PROJECT", "ATTEND", "MLP")),
    ("attention", ("aten::_scaled_dot", "aten::scaled_dot")),
    (
        "products",
        ("aten::mkldnn", "aten::addmm", "aten::mm", "aten::bmm", "MATVEC", "aten::linear"),
    ),
    ("copies", ("aten::copy_", "aten::clone", "aten::fill_", "aten::zero_")),
)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gates", required=True, help="folder that gateskip.save wrote")
    parser.add_argument("--model", help="base model; default: the one saved with the gates")
    parser.add_argument("--data", required=True, help="text to run, .jsonl or .txt")
    parser.add_argument("--json", required=True, help="file for the result")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCH)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=PROMPT)
    parser.add_argument("--keep", type=float, nargs="+", default=KEEP)
    parser.add_argument("--phases", nargs="+", default=["prefill", "decode"])
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-compiled", action="store_true", help="leave torch.compile out")
    parser.add_argument("--profile", type=float, default=0.75, help="budget of the profiles")
    return parser.parse_args()


def cells(options: argparse.Namespace) -> list[tuple[int, int, str]]:
    """(batch, prompt, phase), the small ones first."""
    found = [
        (b, p, f) for b in options.batch for p in options.prompt_tokens for f in options.phases
    ]
    return sorted(found, key=lambda cell: cell[0] * cell[1])


def windows(texts: list[Any], tokenizer: Any, batch: int, length: int) -> torch.Tensor:
    """``[V, B, T]`` of text; where there is too little of it, rows begin at other places of it."""
    flat = text_windows(texts, tokenizer, (1, length), 10_000).flatten()
    count = 5 if batch * length <= 4096 else 2 if batch * length <= 16384 else 1
    starts = torch.arange(count * batch) * (max(flat.shape[0] - length, 1) // (count * batch))
    rows = [flat[start : start + length] for start in starts.tolist()]
    return torch.stack(rows).view(count, batch, length)


def profiled(model: Any, ids: torch.Tensor, budget: Budget, phase: str) -> dict[str, float]:
    """Milliseconds of one call by group, the profiler's own cost included."""
    from gateskip.kernels import heads, pool, rows, stack, token

    names = {
        id(value): name
        for module in (rows, heads, stack, token)
        for name, value in vars(module).items()
        if isinstance(value, pool.Kernel)
    }
    plain = pool.Kernel.__call__

    def named(self: Any, *args: Any, **kwargs: Any) -> None:
        with record_function(names.get(id(self), "kernel")):
            plain(self, *args, **kwargs)

    prompt = ids.shape[1] - 1
    pool.Kernel.__call__ = named  # type: ignore[method-assign]
    try:
        with torch.no_grad(), gateskip.budget(model, **budget.to_json()):
            for _ in range(2):
                cache = model(ids[:, :prompt], use_cache=True, logits_to_keep=1).cache
            if phase == "decode":
                cache = model(ids[:, prompt:], cache=cache, use_cache=True).cache
                cache.crop(-1)
            with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("call"):
                if phase == "prefill":
                    model(ids[:, :prompt], use_cache=True, logits_to_keep=1)
                else:
                    model(ids[:, prompt:], cache=cache, use_cache=True)
    finally:
        pool.Kernel.__call__ = plain  # type: ignore[method-assign]
    groups = dict.fromkeys([*(name for name, _ in GROUPS), "other operations", "Python"], 0.0)
    for event in profiler.key_averages():
        milliseconds = event.self_cpu_time_total / 1e3
        if event.key == "call":
            groups["Python"] += milliseconds
            continue
        found = next((n for n, starts in GROUPS if event.key.startswith(starts)), None)
        groups[found or "other operations"] += milliseconds
    return groups


def run(options: argparse.Namespace) -> None:
    """Time what is missing, print and write it."""
    check_json(options.json)
    keep_freed_memory()
    path = Path(options.json)
    done = json.loads(path.read_text()) if path.is_file() else {"header": {}, "rows": []}
    model = gateskip.load(options.gates, base=options.model, dtype=options.dtype)
    name = str(options.model or model.config._name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(name)
    texts = read_texts(options.data)
    budgets = [Budget(keep=value) for value in options.keep]
    command = command_line("python benchmarks/engine.py", vars(options))
    for batch, prompt, phase in cells(options):
        there = {(r["batch"], r["prompt_tokens"], r["phase"], r["dtype"]) for r in done["rows"]}
        if (batch, prompt, phase, options.dtype) in there:
            continue
        ids = windows(texts, tokenizer, batch, prompt + options.new_tokens)
        large = batch * prompt > 4096
        found = run_bench(
            model, ids, budgets=budgets, new_tokens=options.new_tokens, decode_batch=batch,
            repeats=3 if large else options.repeats, compiled=not options.no_compiled,
            phases=[phase], masked=False, name=Path(name).name, command=command, progress=True,
        )  # fmt: skip
        print_bench(found, Console())
        done["rows"] += found["rows"]
        done["header"] = found["header"] | {"notes": [], "repeats": options.repeats}
        write_json(options.json, done)
    ids = windows(texts, tokenizer, 4, 513)[0]
    budget = Budget(keep=options.profile)
    done["profiles"] = [
        {"phase": phase, "batch": batch, "prompt_tokens": 512, "keep": options.profile,
         "milliseconds": profiled(model, ids[:batch], budget, phase)}
        for phase, batch in (("prefill", 4), ("decode", 1), ("decode", 4))
    ]  # fmt: skip
    write_json(options.json, done)
    table = Table(title=f"One call at keep={options.profile:g}, ms", box=SIMPLE)
    for column in ("", *(f"{p['phase']} {p['batch']} × 512" for p in done["profiles"])):
        table.add_column(column, justify="right" if column else "left")
    for group in done["profiles"][0]["milliseconds"]:
        table.add_row(group, *(f"{p['milliseconds'][group]:.1f}" for p in done["profiles"]))
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
