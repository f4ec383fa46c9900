"""Speed: prefill and decode apart, every arm against the dense model of the same run.

Shapes: B rows, T prompt tokens.

Arms alternate within each repeat, each repeat on text of its own; a figure is the median of the
repeats. Nothing else may run on the machine meanwhile. Efficiency is what of the saved arithmetic
became time: (t_dense / t_skip) ÷ (MACs_dense / MACs_spent), bytes instead of MACs for decoding at
batch 1, the LM head counted on both sides.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from gateskip.config import Budget
from gateskip.errors import ConfigError
from gateskip.evaluation.header import run_header
from gateskip.execution.api import dense, execution, trace
from gateskip.execution.timing import clock, decode, keep_freed_memory, peak_rss, prefill
from gateskip.fitting.passes import eval_mode
from gateskip.skipping.ledger import Ledger
from gateskip.skipping.state import override, state_of

__all__ = ["print_bench", "run_bench"]

Step = Callable[[], None]


class _Arm:
    """One way of running the model: a name, a budget and the contexts around it."""

    def __init__(self, name: str, budget: Budget | None, compiled: Any = None) -> None:
        self.name, self.budget, self.compiled = name, budget, compiled
        self.seconds: list[float] = []

    @contextlib.contextmanager
    def active(self, model: nn.Module) -> Iterator[Any]:
        if self.name.startswith("dense"):
            with dense(model):
                yield model if self.compiled is None else self.compiled
            return
        mode = "masked" if self.name == "gated_masked" else "compacted"
        with override(state_of(model), budget=self.budget), execution(model, mode):
            yield model


def run_bench(
    model: nn.Module,
    ids: Tensor,
    *,
    budgets: Sequence[Budget],
    new_tokens: int = 32,
    decode_batch: int = 1,
    repeats: int = 5,
    compiled: bool = True,
    phases: Sequence[str] = ("prefill", "decode"),
    masked: bool = True,
    name: str = "",
    command: str = "",
    progress: bool = False,
) -> dict[str, Any]:
    """Time dense and gated arms on the same tokens.

    Args:
        model: a calibrated gated model.
        ids: real text, int64 ``[V, B, T + new_tokens]`` (or one window without V); the repeats take
            the windows in turn. Prefill takes ``[:, :T]``, decode feeds the ``new_tokens`` last ids
            of the first ``decode_batch`` rows one by one after a prefill of their first T.
        budgets: budgets of the compacted arms; budget 1.0 is always added.
        repeats: at least 1; figures that are published need 5.
        compiled: also time ``torch.compile`` of the dense model (decode: static cache).
        name, command: for the header.

    Returns:
        ``{"header": {...}, "rows": [...]}``.

    Raises:
        BudgetError: a budget that the model cannot take. ConfigError: too few ids or repeats.
    """
    state = state_of(model)
    for budget in budgets:
        state.resolve(budget)
    if ids.dim() == 2:
        ids = ids[None]
    if ids.dim() != 3 or ids.shape[2] <= new_tokens:
        raise ConfigError(f"ids of shape {tuple(ids.shape)} need more than {new_tokens} columns.")
    if repeats < 1:
        raise ConfigError(f"repeats={repeats} must be at least 1.")
    if not 1 <= decode_batch <= ids.shape[1]:
        raise ConfigError(
            f"decode_batch={decode_batch} must be between 1 and the {ids.shape[1]} rows of ids."
        )
    prompt = ids.shape[2] - new_tokens
    wanted = [Budget(keep=1.0), *(b for b in budgets if not b.full)]
    rows: list[dict[str, Any]] = []
    notes: list[str] = [f"{ids.shape[0]} windows of text, each warmed up once"]
    if not ids.is_cuda and keep_freed_memory():
        notes.append("freed memory is kept by the allocator, in all arms")
    with eval_mode(model), Progress(disable=not progress, transient=True) as bar:
        for phase in phases:
            taken = ids if phase == "prefill" else ids[:, :decode_batch]
            arms = [_Arm("dense_eager", None)]
            if compiled:
                arms += _compiled_arm(model, phase, taken[0], prompt, notes)
            if masked and len(wanted) > 1:
                arms.append(_Arm("gated_masked", wanted[-1]))
            arms += [_Arm("gated_compacted", budget) for budget in wanted]
            # Every window warms up once: a program for a row count never seen before takes 4 ms.
            warm = ids.shape[0]
            task = bar.add_task(f"Timing {phase}", total=(repeats + warm) * len(arms))
            for repeat in range(-warm, repeats):
                window = taken[repeat % ids.shape[0]]
                for arm in arms if repeat % 2 else reversed(arms):
                    seconds = _time(model, arm, phase, window, prompt)
                    if repeat >= 0:
                        arm.seconds.append(seconds)
                    bar.advance(task)
            rows += [_row(model, arm, arms[0], phase, taken, prompt, name) for arm in arms]
    return {"header": run_header(command) | {"repeats": repeats, "notes": notes}, "rows": rows}


def _compiled_arm(
    model: nn.Module, phase: str, ids: Tensor, prompt: int, notes: list[str]
) -> list[_Arm]:
    """torch.compile of the dense model; its compilation is not timed, but said. Empty if it fails,
    which is said too: a machine without a C++ compiler can still time everything else."""
    started = time.perf_counter()
    arm = _Arm("dense_compiled", None, torch.compile(model, dynamic=False))
    try:
        _time(model, arm, phase, ids, prompt)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        notes.append(f"dense_compiled {phase} is left out, torch.compile failed: {first}")
        return []
    notes.append(f"dense_compiled {phase}: first call took {time.perf_counter() - started:.0f} s")
    return [arm]


def _time(model: Any, arm: _Arm, phase: str, ids: Tensor, prompt: int) -> float:
    with arm.active(model) as runner:
        if phase == "prefill":
            return clock(lambda: prefill(runner, ids, prompt), ids)
        if arm.name == "dense_compiled":
            return _time_static_decode(model, runner, ids, prompt)
        cache = prefill(model, ids, prompt).cache
        return clock(lambda: decode(runner, ids, prompt, cache), ids)


def _time_static_decode(model: Any, runner: Any, ids: Tensor, prompt: int) -> float:
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    model(input_ids=ids[:, :prompt], cache=cache, use_cache=True, logits_to_keep=1)

    def steps() -> None:
        for at in range(prompt, ids.shape[1]):
            position = torch.full((ids.shape[0], 1), at, device=ids.device)
            runner(
                input_ids=ids[:, at : at + 1], position_ids=position, cache=cache, use_cache=True
            )

    return clock(steps, ids)


def _ledger(model: Any, arm: _Arm, phase: str, ids: Tensor, prompt: int) -> tuple[Ledger, int]:
    """What the arm computes over all windows, from traced passes that are not timed."""
    full = Budget(keep=1.0)
    budget = arm.budget if arm.name == "gated_compacted" else full
    calls = []
    with override(state_of(model), budget=budget), execution(model, "compacted"):
        for window in ids:
            if phase == "prefill":
                with trace(model) as recorder:
                    prefill(model, window, prompt)
            else:
                cache = prefill(model, window, prompt).cache
                with trace(model) as recorder:
                    decode(model, window, prompt, cache)
            calls += recorder.calls
    return Ledger.of(calls), ids.shape[0]


def _row(
    model: Any, arm: _Arm, reference: _Arm, phase: str, ids: Tensor, prompt: int, name: str
) -> dict[str, Any]:
    shape = state_of(model).shape
    ledger, windows = _ledger(model, arm, phase, ids, prompt)
    steps = ids.shape[2] - prompt
    is_dense = arm.name.startswith("dense")
    logits = windows * ids.shape[1] * (1 if phase == "prefill" else steps)
    head = shape.macs_lm_head * logits
    reads = windows * (1 if phase == "prefill" else steps)
    head_bytes = shape.macs_lm_head * shape.weight_bytes * reads
    masked = arm.name == "gated_masked"  # computes everything, and its gates
    macs = ledger.macs_dense if is_dense else ledger.macs_spent
    read = ledger.bytes_dense if is_dense else ledger.bytes_spent
    if phase == "prefill" or ids.shape[1] > 1:
        saved = (ledger.macs_dense + head) / (macs + head)
    else:
        saved = (ledger.bytes_dense + head_bytes) / (read + head_bytes)
    median = statistics.median(arm.seconds)
    speedup = statistics.median(reference.seconds) / median
    quartiles = statistics.quantiles(arm.seconds, n=4) if len(arm.seconds) > 1 else [0, 0, 0]

    def run() -> None:
        _time(model, arm, phase, ids[0], prompt)

    return {
        "model": name or type(model).__name__,
        "arm": arm.name,
        "phase": phase,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "batch": ids.shape[1],
        "prompt_tokens": prompt,
        "new_tokens": 0 if phase == "prefill" else steps,
        "keep": 1.0 if arm.budget is None else arm.budget.keep,
        "compute": None if arm.budget is None else arm.budget.compute,
        "skip_rate": 0.0 if is_dense or masked else ledger.skip_rate,
        "macs_dense": ledger.macs_dense / windows,
        "macs_spent": macs / windows,
        "bytes_dense": ledger.bytes_dense / windows,
        "bytes_spent": read / windows,
        "seconds_median": median,
        "seconds_iqr": quartiles[2] - quartiles[0],
        "speedup_vs_dense": speedup,
        "efficiency": speedup / saved,
        "peak_rss_bytes": peak_rss(run),
    }


def print_bench(result: dict[str, Any], console: Console) -> None:
    """A readable table per phase and dtype of :func:`run_bench`'s result."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["phase"], row["dtype"]), []).append(row)
    for (phase, dtype), rows in groups.items():
        first = rows[0]
        size = f"{first['batch']} × {first['prompt_tokens']}"
        if phase == "decode":
            size = f"{first['batch']} × {first['new_tokens']} tokens after {first['prompt_tokens']}"
        table = Table(title=f"{phase}, {dtype}, {size}", title_justify="left", box=SIMPLE)
        for column in ("arm", "budget", "skipped", "time", "speed-up", "efficiency"):
            justify: Any = "left" if column == "arm" else "right"
            table.add_column(column, justify=justify, no_wrap=True)
        for row in rows:
            name, value = ("keep", row["keep"])
            if value is None:
                name, value = "compute", row["compute"]
            table.add_row(
                row["arm"], "" if "dense" in row["arm"] else f"{name} {value:g}",
                f"{row['skip_rate']:.1%}", f"{row['seconds_median'] * 1e3:.0f} ms",
                f"{row['speedup_vs_dense']:.2f}×", f"{row['efficiency']:.2f}",
            )  # fmt: skip
        console.print(table)
    for note in result["header"]["notes"]:
        console.print(note, style="dim", markup=False)
