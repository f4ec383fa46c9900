"""Methods without training on SmolLM2-135M: loss by MACs saved, one JSON object per method.

    python experiments/smollm2/untrained.py MODEL experiments/results/smollm2

Text is the demo's: fitted and calibrated on ``fit.jsonl``, evaluated on ``heldout.jsonl``. A result
that exists is not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gateskip
from gateskip import methods
from gateskip.data import read_texts
from gateskip.errors import BudgetError
from gateskip.evaluation.header import run_header
from gateskip.evaluation.quality import Evaluation
from gateskip.skipping.state import state_of

DATA = Path(__file__).resolve().parents[2] / "examples" / "demo" / "data"
METHODS = (
    "gateskip", "random", "shortgpt", "llm_drop", "gate_norm", "every_second", "token_identity",
    "position",
)  # fmt: skip
COMPUTE = (0.95, 0.9, 0.85, 0.75, 0.65)


def prepared(name: str, model: Any, tokenizer: Any, options: argparse.Namespace) -> Any:
    """The model, skipping by a method."""
    texts = read_texts(DATA / "fit.jsonl")
    if name in ("gateskip", "token_identity", "position"):
        gateskip.attach(model, gateskip.GateConfig(kind="scalar"))
        gateskip.fit(model, texts[::2], tokenizer, max_tokens=options.fit_tokens)
    if name == "gateskip":
        gateskip.calibrate(model, texts[1::2], tokenizer, max_tokens=options.calibration_tokens)
        return model
    return methods.apply(name, model, texts[1::2], tokenizer)


def main() -> None:
    """All methods that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--fit-tokens", type=int, default=24_000)
    parser.add_argument("--calibration-tokens", type=int, default=12_000)
    parser.add_argument("--eval-tokens", type=int, default=8_000)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    for name in options.methods:
        target = options.out / f"untrained_{name}.json"
        if target.is_file():
            continue
        begun = time.time()
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = prepared(name, model, tokenizer, options)
        run = Evaluation(
            model, read_texts(DATA / "heldout.jsonl"), tokenizer, max_tokens=options.eval_tokens,
            name="demo_heldout",
        )  # fmt: skip
        rows = [dataclasses.asdict(run.dense())]
        for value in COMPUTE:
            budget = gateskip.Budget(compute=value)
            try:
                state_of(model).resolve(budget)
            except BudgetError as error:
                print(f"{name}: {error}", flush=True)
                continue
            rows.append(dataclasses.asdict(run.at(budget)))
        result = {
            "bench": "smollm2", "method": name, "seed": 0, "trained": False,
            "seconds": round(time.time() - begun), "config": vars(options) | {"out": ""},
            "versions": run_header("python experiments/smollm2/untrained.py MODEL OUT"),
            "rows": rows,
        }  # fmt: skip
        result["config"] |= {"model": Path(options.model).name}
        part = target.with_suffix(".tmp")
        part.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
        os.replace(part, target)
        shown = ", ".join(f"{r['macs_saved']:.1%} {r['loss']:.3f}" for r in rows)
        print(f"{name} ({result['seconds']} s): {shown}", flush=True)


if __name__ == "__main__":
    main()
