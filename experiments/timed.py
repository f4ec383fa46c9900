"""Prefill, decoding and peak memory of trained arms beside the dense model, into their results.

Needs the models that ``run.py --models`` or ``trained.py --models`` kept, and a machine that does
nothing else. Each arm is held against the dense model on the same tokens, in turns; medians. What
is a plain model is timed as one: what ``gateskip.export_static`` writes of a static method, 8-bit
weights, a smaller model. Its decoding is also timed on the kernels that gates decode with
(``kernel_decode_speedup``), which anyone can have by attaching gates and skipping nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from arms import static
from instead import INT8, SMALLER, quantised
from transformers import AutoModelForCausalLM

import gateskip
from gateskip.evaluation.bench import run_bench
from gateskip.evaluation.runs import GATES, INSTEAD
from gateskip.execution.stack import LAST
from gateskip.execution.timing import clock, decode, keep_freed_memory, peak_rss, prefill

__all__ = ["Timed", "add_options", "time_all"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """What is timed.

    Attributes:
        dense, smaller: new models, without gates; smaller may be None.
        windows: rows of a batch to ids, int64 ``[windows, rows, prompt + new]``.
        prompt, new: tokens of the prompt, and fed one by one after it.
        gates: options of the gates that plain models are put on kernels with.
    """

    dense: Callable[[], Any]
    windows: Callable[[int], torch.Tensor]
    prompt: int
    new: int
    gates: dict[str, Any]
    smaller: Callable[[], Any] | None = None


def is_plain(method: str) -> bool:
    """Whether what a method leaves is a plain model, with nothing in the place of what is gone."""
    return method in INSTEAD or (static(method) and not method.endswith("_linear"))


def plain_model(timed: Timed, folder: Path, method: str, compute: float) -> Any:
    """The plain model of an arm, from what was kept of it."""
    if method == SMALLER:
        assert timed.smaller is not None
        return gateskip.detach(gateskip.load(folder, timed.smaller()).eval())
    dense = timed.dense()
    dtype = next(dense.parameters()).dtype
    gated = gateskip.load(folder, dense).eval()
    if method == INT8:
        return quantised(gated)
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        budget = gateskip.Budget(compute=compute)
        gateskip.export_static(gated, Path(place) / "plain", budget=budget)
        return AutoModelForCausalLM.from_pretrained(
            Path(place) / "plain", dtype=dtype, trust_remote_code=False
        ).eval()


def measured(
    timed: Timed, folder: Path, compute: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Figures of an arm that skips, at its budget."""
    model = gateskip.load(folder, timed.dense()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run_bench(
            model, timed.windows(options.batch), budgets=[gateskip.Budget(compute=compute)],
            new_tokens=timed.new, masked=False, decode_batch=options.batch,
            repeats=options.repeats, compiled=False,
        )  # fmt: skip
    asked = compute if compute < 1.0 else None  # run_bench has an arm that skips nothing
    rows = {(row["phase"], row["compute"], row["arm"]): row for row in result["rows"]}
    found: dict[str, Any] = {"timing": _settings(timed, options)}
    for phase in ("prefill", "decode"):
        row = rows[phase, asked, "gated_compacted"]
        found[f"{phase}_speedup"] = round(row["speedup_vs_dense"], 4)
        found["timing"][f"{phase}_macs_saved"] = round(1 - row["macs_spent"] / row["macs_dense"], 4)
    peak = rows["decode", asked, "gated_compacted"]["peak_rss_bytes"]
    plain = rows["decode", None, "dense_eager"]["peak_rss_bytes"]
    if peak and plain:
        found["peak_memory_mb"] = round(peak / 1e6, 1)
        found["timing"]["dense_peak_memory_mb"] = round(plain / 1e6, 1)
    return found


def beside(timed: Timed, plain: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of a plain model beside the dense one; then of its decoding on our kernels."""
    ids = timed.windows(options.batch)[0]
    found: dict[str, Any] = {"timing": _settings(timed, options) | {"plain": True}}
    gc.collect()  # what it was made from is not its own
    peak = peak_rss(lambda: _clocked(timed, plain, "decode", ids))
    if peak:
        found["peak_memory_mb"] = round(peak / 1e6, 1)
    keep_freed_memory()
    dense = timed.dense()
    for phase in ("prefill", "decode"):
        found[f"{phase}_speedup"] = _ratio(timed, (dense, plain), phase, options)
    gateskip.attach(plain, gateskip.GateConfig(**timed.gates, init_std=0.0, init_bias=40.0))
    found["kernel_decode_speedup"] = _ratio(timed, (dense, plain), "decode", options)
    _clocked(timed, plain, "decode", ids)
    if not LAST.stacked:
        raise RuntimeError("the plain model did not decode on our kernels; is numba installed?")
    return found


def _settings(timed: Timed, options: argparse.Namespace) -> dict[str, Any]:
    return {"batch": options.batch, "prompt": timed.prompt, "new": timed.new}


def _ratio(
    timed: Timed, models: Sequence[Any], phase: str, options: argparse.Namespace
) -> float:  # fmt: skip
    ids = timed.windows(options.batch)
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(-len(ids), options.repeats):
        window = ids[repeat % len(ids)]
        for index in (0, 1) if repeat % 2 else (1, 0):
            spent = _clocked(timed, models[index], phase, window)
            if repeat >= 0:
                seconds[index].append(spent)
    dense_s, plain_s = (statistics.median(values) for values in seconds)
    return round(dense_s / plain_s, 4)


@torch.no_grad()
def _clocked(timed: Timed, model: Any, phase: str, ids: torch.Tensor) -> float:
    if phase == "prefill":
        return clock(lambda: prefill(model, ids, timed.prompt), ids)
    cache = prefill(model, ids, timed.prompt).cache
    return clock(lambda: decode(model, ids, timed.prompt, cache), ids)


def add_options(parser: argparse.ArgumentParser, batch: int) -> None:
    """What the command lines of all benches take."""
    parser.add_argument("results", type=Path)
    parser.add_argument("models", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--repeats", type=int, default=5)


def time_all(timed: Timed, options: argparse.Namespace) -> None:
    """All arms that have a model and no time yet."""
    for target in sorted(options.results.glob("*.json")):
        result = json.loads(target.read_text(encoding="utf-8"))
        method, folder = result["method"], options.models / target.stem
        wanted = result["saved_macs"] or method in (GATES, *INSTEAD)
        last = "kernel_decode_speedup" if is_plain(method) else "timing"
        if result["seed"] not in options.seeds or not wanted or last in result:
            continue
        if not folder.is_dir() or result["accuracy"] is None or result["config"].get("size"):
            continue
        compute = 1.0 - result["saved_macs"]
        if is_plain(method):
            result |= beside(timed, plain_model(timed, folder, method, compute), options)
        else:
            result |= measured(timed, folder, compute, options)
        part = target.with_suffix(".tmp")
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(part, target)
        print(target.stem, result["prefill_speedup"], result["decode_speedup"], flush=True)
