"""Prefill, decoding and peak memory of trained arms beside the dense model, into their results.

    python experiments/lab/timing.py experiments/results/lab build/lab/models

Needs the models that ``run.py --models`` kept, and a machine that does nothing else. Each is held
against the dense model on the same problems, in turns; medians of five. What a static method leaves
is timed as the plain model that ``gateskip.export_static`` writes; linear ones have none.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from language import problems, tokenizer
from model import DENSE, TEST_SEED
from transformers import AutoModelForCausalLM, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from arms import static

import gateskip
from gateskip.evaluation.bench import run_bench
from gateskip.execution.timing import clock, decode, prefill

#: All prompts are cut to so many tokens; the shortest has 37.
PROMPT, NEW, WINDOWS = 36, 48, 3


def plain_when_removed(method: str) -> bool:
    """Whether what a method leaves is a plain model, with nothing in the place of what is gone."""
    return static(method) and not method.endswith("_linear")


def windows(batch: int) -> torch.Tensor:
    """Ids of problems with their answers, int64 ``[windows, batch, PROMPT + NEW]``."""
    words, found = tokenizer(), []
    for row in problems(TEST_SEED, 20 * batch * WINDOWS):
        ids = words(row["prompt"] + row["completion"])["input_ids"]
        if len(ids) >= PROMPT + NEW:
            found.append(ids[: PROMPT + NEW])
        if len(found) == batch * WINDOWS:
            break
    return torch.tensor(found).view(WINDOWS, batch, PROMPT + NEW)


def measured(folder: Path, compute: float, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one arm at its budget."""
    dense = LlamaForCausalLM.from_pretrained(options.dense, dtype=torch.float32).eval()
    model = gateskip.load(folder, dense).eval()
    ids = windows(options.batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run_bench(
            model, ids, budgets=[gateskip.Budget(compute=compute)], new_tokens=NEW, masked=False,
            decode_batch=options.batch, repeats=options.repeats, compiled=False,
        )  # fmt: skip
    rows = {(row["phase"], row["compute"], row["arm"]): row for row in result["rows"]}
    found: dict[str, Any] = {"timing": {"batch": options.batch, "prompt": PROMPT, "new": NEW}}
    for phase in ("prefill", "decode"):
        row = rows[phase, compute, "gated_compacted"]
        found[f"{phase}_speedup"] = round(row["speedup_vs_dense"], 4)
        found["timing"][f"{phase}_macs_saved"] = round(1 - row["macs_spent"] / row["macs_dense"], 4)
    peak = rows["decode", compute, "gated_compacted"]["peak_rss_bytes"]
    plain = rows["decode", None, "dense_eager"]["peak_rss_bytes"]
    if peak and plain:
        found["peak_memory_mb"] = round(peak / 1e6, 1)
        found["timing"]["dense_peak_memory_mb"] = round(plain / 1e6, 1)
    return found


def exported(folder: Path, compute: float, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of a static method: the plain model that its budget leaves, beside the dense one."""
    dense = LlamaForCausalLM.from_pretrained(options.dense, dtype=torch.float32).eval()
    gated = gateskip.load(folder, copy.deepcopy(dense)).eval()
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        budget = gateskip.Budget(compute=compute)
        gateskip.export_static(gated, Path(place) / "plain", budget=budget)
        plain = AutoModelForCausalLM.from_pretrained(
            Path(place) / "plain", dtype=torch.float32, trust_remote_code=False
        ).eval()
    ids, models = windows(options.batch), (dense, plain)
    found: dict[str, Any] = {
        "timing": {"batch": options.batch, "prompt": PROMPT, "new": NEW, "exported": True}
    }
    for phase in ("prefill", "decode"):
        seconds: tuple[list[float], list[float]] = ([], [])
        for repeat in range(-WINDOWS, options.repeats):
            window = ids[repeat % WINDOWS]
            for index in (0, 1) if repeat % 2 else (1, 0):
                spent = _clocked(models[index], phase, window)
                if repeat >= 0:
                    seconds[index].append(spent)
        dense_s, plain_s = (statistics.median(values) for values in seconds)
        found[f"{phase}_speedup"] = round(dense_s / plain_s, 4)
    return found


@torch.no_grad()
def _clocked(model: Any, phase: str, ids: torch.Tensor) -> float:
    if phase == "prefill":
        return clock(lambda: prefill(model, ids, PROMPT), ids)
    cache = prefill(model, ids, PROMPT).cache
    return clock(lambda: decode(model, ids, PROMPT, cache), ids)


def main(arguments: list[str] | None = None) -> None:
    """All arms that have a model and no time yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("models", type=Path)
    parser.add_argument("--dense", default=str(DENSE))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    for target in sorted(options.results.glob("*.json")):
        result = json.loads(target.read_text(encoding="utf-8"))
        folder, saved = options.models / target.stem, result["saved_macs"]
        if result["seed"] not in options.seeds or not saved or "timing" in result:
            continue
        if not folder.is_dir() or result["accuracy"] is None:
            continue
        how = exported if plain_when_removed(result["method"]) else measured
        result |= how(folder, 1.0 - saved, options)
        part = target.with_suffix(".tmp")
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(part, target)
        print(target.stem, result["prefill_speedup"], result["decode_speedup"], flush=True)


if __name__ == "__main__":
    main()
