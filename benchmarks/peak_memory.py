"""Peak memory of generation: ``python benchmarks/peak_memory.py --gates FOLDER --json FILE``.

The process's high-water mark (Linux), reset before each call after freed memory went back to the
system; dense and gated arms in one process, the second of two rounds. Batch × prompt of random ids.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import gateskip
from gateskip.cli.output import check_json, command_line, write_json
from gateskip.evaluation.header import run_header
from gateskip.execution.api import dense

SHAPES = ("4x512", "16x512", "4x2048", "16x2048")
KEEP = (1.0, 0.75, 0.5)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gates", required=True, help="folder that gateskip.save wrote")
    parser.add_argument("--model", help="base model; default: the one saved with the gates")
    parser.add_argument("--json", required=True, help="file for the result")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="batch x prompt tokens")
    parser.add_argument("--keep", type=float, nargs="+", default=KEEP)
    parser.add_argument("--new-tokens", type=int, default=8)
    return parser.parse_args()


def megabytes(entry: str) -> float:
    """An entry of this process's status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(entry):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {entry}; this benchmark needs Linux")


def peak(step: Callable[[], Any]) -> float:
    """The process's peak in MB while ``step`` runs."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    step()
    return megabytes("VmHWM")


def main() -> None:
    """Measure, print, write."""
    options = parse()
    check_json(options.json)
    model = gateskip.load(options.gates, base=options.model, dtype=options.dtype)
    vocabulary = model.config.vocab_size
    command = command_line("python benchmarks/peak_memory.py", vars(options))
    header = run_header(command) | {"unit": "MB of the process", "dtype": options.dtype}
    rows = []
    for shape in options.shapes:
        batch, prompt = (int(part) for part in shape.split("x"))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(10, vocabulary - 10, (batch, prompt), generator=generator)

        def generate(ids: torch.Tensor = ids) -> None:
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                max_new_tokens=options.new_tokens, min_new_tokens=options.new_tokens,
            )  # fmt: skip

        row: dict[str, Any] = {"batch": batch, "prompt_tokens": prompt}
        for _ in range(2):
            arms: dict[str, contextlib.AbstractContextManager[Any]] = {"dense": dense(model)}
            arms |= {f"keep {k:g}": gateskip.budget(model, keep=k) for k in options.keep}
            for name, arm in arms.items():
                with torch.no_grad(), arm:
                    row[name] = round(peak(generate))
        rows.append(row)
        print(row, flush=True)
        write_json(options.json, {"header": header, "rows": rows})
    table = Table(title="Peak memory of generate, MB", box=SIMPLE)
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
