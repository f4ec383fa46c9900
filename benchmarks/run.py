"""Prefill and decode against dense Hugging Face: ``python benchmarks/run.py --help``.

Writes ``{"header": ..., "rows": [...]}`` as JSON, whole or not at all.
"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from gateskip.cli.output import check_json, command_line, write_json
from gateskip.config import Budget
from gateskip.data import read_texts
from gateskip.errors import GateSkipError
from gateskip.evaluation.bench import print_bench
from gateskip.evaluation.bench_gates import bench_gates

COMPUTE = (0.9, 0.8, 0.7, 0.5)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time gates against their dense model.")
    parser.add_argument("--model", help="base model; default: the one saved with the gates")
    parser.add_argument("--gates", required=True, help="folder that gateskip.save wrote")
    parser.add_argument("--data", help="text to run, .jsonl or .txt; random ids without it")
    parser.add_argument("--json", required=True, help="file for the result")
    parser.add_argument("--compute", type=float, nargs="+", help=f"budgets {COMPUTE}")
    parser.add_argument("--keep", type=float, nargs="+", help="budgets by pairs instead")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-compiled", action="store_true", help="leave torch.compile out")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def run(options: argparse.Namespace) -> None:
    """Check everything that can be checked early, time, print and write."""
    check_json(options.json)
    budgets = [Budget(keep=value) for value in options.keep or ()]
    computes = options.compute or (() if options.keep else COMPUTE)
    budgets += [Budget(compute=value) for value in computes]
    texts = None if options.data is None else read_texts(options.data)
    result = bench_gates(
        options.gates, options.model, budgets=budgets, texts=texts, batch=options.batch,
        prompt_tokens=options.prompt_tokens, new_tokens=options.new_tokens,
        dtypes=options.dtypes, repeats=options.repeats, compiled=not options.no_compiled,
        seed=options.seed, progress=True,
        command=command_line("python benchmarks/run.py", vars(options)),
    )  # fmt: skip
    print_bench(result, Console())
    write_json(options.json, result)


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
