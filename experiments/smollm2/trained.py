"""SmolLM2-135M, every method trained alike: one JSON object per run.

    python experiments/smollm2/trained.py MODEL TEXTS EVAL experiments/results/smollm2

MODEL is a SmolLM2 folder or name, TEXTS what ``texts.py`` wrote, EVAL the folder of the test
questions (see ``tasks/``). LoRA on the same rows for the same steps, for a quarter of the MACs;
loss on GSM8K answers and WikiText-2, accuracy on five sets of questions through lm-eval (their mean
is the run's accuracy). What exists is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from arms import FULL, JOINT, ROUTED, Bench, Job, Variant, add_options, make

import gateskip
from gateskip.evaluation.harness import harness_evaluate
from gateskip.evaluation.quality import Evaluation

TASKS = Path(__file__).parent / "tasks"
#: Task and the metric that is its accuracy.
QUESTIONS = {
    "arc_easy_local": "acc_norm", "lambada_openai_local": "acc",
    "openbook_qa_local": "acc_norm", "piqa_local": "acc_norm",
    "winogrande_local": "acc",
}  # fmt: skip
TEXTS = {"loss": "gsm8k_test", "loss_wikitext2": "wikitext2_test"}
GRID = (0.9, 0.8, 0.7, 0.6, 0.45, 0.3)
#: Rows that thresholds are found on, some 13,000 tokens.
CALIBRATED = 75
SAVED = (0.25, 0.0)
GATES: dict[str, Any] = {"kind": "scalar", "importance": "head"}
TRAINING: dict[str, Any] = {"schedule": "constant", "compensation_learning_rate": 1e-3}
STAGES = ((1.0, JOINT | {"gate_learning_rate": 5e-3}),)
VARIANTS: dict[str, Variant] = {
    "": ({}, {}),
    # As in the lab, but slower: these decisions begin as they were fitted.
    "routed": ({}, {"stages": ((0.5, ROUTED | {"gate_learning_rate": 1e-3}), (0.5, {}))}),
    "fitted": ({"importance": "mean_logit"}, {"stages": ((1.0, {}),)}),
    "sampled": ({"importance": "mean_logit"}, {"stages": ((1.0, {"schedule": "sampled"}),)}),
    "compensation_none": ({"compensation": "none"}, {}),
    "frozen": ({}, {"backbone": "frozen"}),
}
METHODS = (
    "dense", "gateskip", "control", "random", "shortgpt", "mixture_of_depths", "router_tuning",
    "llm_drop", "gate_norm", "int8",
)  # fmt: skip


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file."""
    with path.open(encoding="utf-8") as file:  # str.splitlines would split at U+2028, too
        return [json.loads(line) for line in file if line.strip()]


def bench(options: argparse.Namespace) -> Bench:
    """SmolLM2 on real text."""
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    training = rows_of(options.texts / "mix.jsonl")
    test_rows = {name: rows_of(options.texts / f"{name}.jsonl") for name in TEXTS.values()}
    os.environ["GATESKIP_EVAL_DATA"] = str(options.questions)

    def train_rows(seed: int, count: int) -> list[Any]:
        """``count`` rows of the mix, in a seed's order."""
        order = list(range(len(training)))
        random.Random(seed).shuffle(order)
        return [training[order[i % len(order)]] for i in range(count)]

    def test(job: Job, model: Any, dense: Any) -> dict[str, Any]:
        """Losses and accuracies at the run's budget, beside those of full compute."""
        full = job.method in FULL
        budget = gateskip.Budget(compute=1.0 - job.saved)
        found: dict[str, Any] = {"questions": options.limit * len(QUESTIONS)}
        for name, text in TEXTS.items():
            run = Evaluation(
                model, test_rows[text], tokenizer, max_tokens=options.loss_tokens, reference=dense,
                arm="control" if full else None,
            )  # fmt: skip
            row = run.control() if full else run.at(budget)
            found[name] = row.loss
            saved = 0.0 if full else row.macs_saved
            if name == "loss":
                found |= {"realised_macs": saved, "skip_rate": row.skip_rate}
                if job.saved:
                    found["loss_full_budget"] = run.at(gateskip.Budget(compute=1.0)).loss
            else:
                found["realised_macs_wikitext2"] = saved
        rows = harness_evaluate(
            model, tokenizer, list(QUESTIONS), include_path=TASKS, limit=options.limit,
            batch_size=8, dense=False, budgets=() if full else (budget,),
            arm="control" if full else None,
        )  # fmt: skip
        found["tasks"] = {row.task: row.metrics[QUESTIONS[row.task]] for row in rows}
        found["tasks_macs_saved"] = {row.task: row.macs_saved for row in rows}
        return found | {"accuracy": sum(found["tasks"].values()) / len(found["tasks"])}

    return Bench(
        name="smollm2",
        fresh=lambda: AutoModelForCausalLM.from_pretrained(
            options.model, dtype=getattr(torch, options.dtype)
        ).eval(),
        tokenizer=tokenizer, fit_rows=rows_of(options.texts / "cal.jsonl"), train_rows=train_rows,
        test=test, max_length=options.max_length, gates=GATES, training=TRAINING,
        stages=STAGES, variants=VARIANTS, backbone="lora", grid=GRID, collapsed=0.0,
        router_rate=1e-2, calibrated=CALIBRATED,
        trainer={"weight_decay": 0.001, "adam_beta2": 0.95, "use_cpu": options.cpu},
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """All runs that have no result yet, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("questions", type=Path)
    add_options(parser, list(VARIANTS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--saved", nargs="+", type=float, default=list(SAVED))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--loss-tokens", type=int, default=15_000, help="of each text")
    parser.add_argument("--limit", type=int, default=200, help="questions of each set")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--cpu", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--work", type=Path, default=Path("build/smollm2/work"))
    options = parser.parse_args(arguments)
    options.command = "python experiments/smollm2/trained.py"
    make(bench(options), options)


if __name__ == "__main__":
    main()
