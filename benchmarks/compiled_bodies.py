"""Decoding with compiled branch bodies: ``python benchmarks/compiled_bodies.py --help``.

Batch-1 decoding of one model in one run, arms alternated: dense Hugging Face, its branch modules
compiled by ``torch.compile`` or not; gated on torch operations, its bodies compiled or not; gated
on the fused kernels, which read the modules' weights and call no body.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoTokenizer

import gateskip
from gateskip import kernels
from gateskip.cli.output import check_json, command_line, write_json
from gateskip.data import read_texts, text_windows
from gateskip.evaluation.header import run_header
from gateskip.execution.api import dense
from gateskip.execution.timing import keep_freed_memory
from gateskip.retrofit.attach import gated_branches
from gateskip.skipping.state import state_of


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gates", required=True, help="folder that gateskip.save wrote")
    parser.add_argument("--model", help="base model; default: the one saved with the gates")
    parser.add_argument("--data", required=True, help="text to run, .jsonl or .txt")
    parser.add_argument("--json", required=True, help="file for the result")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.75, 0.5])
    parser.add_argument("--bodies", nargs="+", default=["mlp"], choices=["mlp", "attention"])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


class Bodies:
    """Branch modules that can run compiled or as they are."""

    def __init__(self, model: nn.Module, kinds: list[str]) -> None:
        branches = gated_branches(model, state_of(model).family).items()
        self.modules: list[Any] = [module for key, module in branches if key[1] in kinds]
        self.compiled = []
        # Modules of one class share a limit, beyond which they silently run as they are.
        torch._dynamo.config.recompile_limit = 8 * len(self.modules)
        for module in self.modules:
            module.compile(dynamic=False)
            self.compiled.append(module._compiled_call_impl)

    @contextlib.contextmanager
    def running(self, compiled: bool) -> Iterator[None]:
        """Compiled inside, as they are outside."""
        for module, call in zip(self.modules, self.compiled, strict=True):
            module._compiled_call_impl = call if compiled else None
        try:
            yield
        finally:
            for module in self.modules:
                module._compiled_call_impl = None


@torch.no_grad()
def decode(model: Any, ids: Tensor, prompt: int) -> float:
    """Seconds of feeding the tokens after the prompt one by one."""
    cache = model(input_ids=ids[:, :prompt], use_cache=True, logits_to_keep=1).cache
    began = time.perf_counter()
    for at in range(prompt, ids.shape[1]):
        model(input_ids=ids[:, at : at + 1], cache=cache, use_cache=True)
    return time.perf_counter() - began


def run(options: argparse.Namespace) -> None:
    """Time all arms, print and write."""
    check_json(options.json)
    keep_freed_memory()
    model = gateskip.load(options.gates, base=options.model, dtype=options.dtype).eval()
    name = str(options.model or model.config._name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(name)
    shape = (1, options.prompt_tokens + options.new_tokens)
    windows = text_windows(read_texts(options.data), tokenizer, shape, options.repeats)
    bodies = Bodies(model, options.bodies)
    arms: list[tuple[str, float | None, bool]] = [("dense", None, False), ("dense", None, True)]
    for keep in options.keep:
        arms += [("torch", keep, False), ("torch", keep, True), ("numba", keep, False)]
    seconds: dict[tuple[str, float | None, bool], list[float]] = {arm: [] for arm in arms}
    for repeat in range(-1, options.repeats):
        window = windows[repeat % len(windows)]
        for arm in arms if repeat % 2 else reversed(arms):
            backend, keep, compiled = arm
            with contextlib.ExitStack() as stack:
                stack.enter_context(bodies.running(compiled))
                if keep is None:
                    stack.enter_context(dense(model))
                else:
                    stack.enter_context(kernels.using(backend))
                    stack.enter_context(gateskip.budget(model, keep=keep))
                found = decode(model, window, options.prompt_tokens)
            if repeat >= 0:
                seconds[arm].append(found)
    base = statistics.median(seconds[arms[0]])
    table = Table(title=f"Decoding, batch 1, compiled: {', '.join(options.bodies)}", box=SIMPLE)
    for column in ("arm", "keep", "bodies", "× dense"):
        table.add_column(column)
    rows = []
    for backend, keep, compiled in arms:
        median = statistics.median(seconds[backend, keep, compiled])
        rows.append(
            {
                "model": Path(name).name, "arm": backend, "keep": keep, "compiled": compiled,
                "dtype": options.dtype, "seconds_median": median,
                "speedup_vs_dense": base / median,
            }
        )  # fmt: skip
        table.add_row(
            backend, "" if keep is None else f"{keep:g}", "compiled" if compiled else "",
            f"{base / median:.2f}",
        )  # fmt: skip
    command = command_line("python benchmarks/compiled_bodies.py", vars(options))
    header = run_header(command) | {"repeats": options.repeats, "bodies": options.bodies}
    write_json(options.json, {"header": header, "rows": rows})
    Console().print(table)


if __name__ == "__main__":
    run(parse())
