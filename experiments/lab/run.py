"""The reasoning lab: every method at every saving and seed, one JSON object per run.

    python experiments/lab/run.py experiments/results/lab --budget-hours 2

Accuracy is exact match of greedy generation with real skipping. What exists is not made again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from language import problems, tokenizer
from model import DENSE, LONGEST, SIZES, SMALL, TEST_SEED, dense_of, exact_match
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from arms import FULL, JOINT, ROUTED, Bench, Job, Variant, add_options, make

import gateskip
from gateskip.evaluation.quality import Evaluation
from gateskip.execution.api import dense as without_gates
from gateskip.skipping.ledger import Ledger
from gateskip.training.presets import preset

FIT_SEED, TRAIN_SEED, LOSS_SEED = 50_000, 60_000, 70_000  # of problems; none is model.py's
FIT_PROBLEMS, LOSS_PROBLEMS = 300, 300
GRID = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.42, 0.35, 0.28, 0.2)
SAVED = (0.25, 0.5, 0.15, 0.35, 0.0)
GATES: dict[str, Any] = {"kind": "scalar", "importance": "head", "compensation_rank": 8}
TRAINING: dict[str, Any] = {"schedule": "constant", "calibrate_every": 20}
FROZEN: dict[str, Any] = {"backbone": "frozen", "compensation_learning_rate": 3e-3}
STAGES = ((0.5, ROUTED), (0.5, {}))
PAPER = preset("paper")
PAPER_TRAINING = PAPER.training.to_json() | {"budget_steps": 0.5}
#: Variants of the gates, see ``arms``; options of a training are those of the last stage.
VARIANTS: dict[str, Variant] = {
    "": ({}, {}),
    # How decisions are learned.
    "fitted": ({"importance": "mean_logit"}, {"stages": ((1.0, {}),)}),
    "fitted_linear": (
        {"importance": "mean_logit"},
        {"stages": ((1.0, {"schedule": "linear", "budget_steps": 0.5, "calibrate_every": 0}),)},
    ),
    "joint": ({}, {"stages": ((1.0, JOINT | {"gate_learning_rate": 1e-2}),)}),
    "kept_only": ({}, {"stages": ((0.5, ROUTED | {"learn_from_skipped": False}), (0.5, {}))}),
    "cool": ({}, {"stages": ((0.5, ROUTED | {"decision_gradient": 0.3}), (0.5, {}))}),
    "dear": ({}, {"stages": ((0.5, ROUTED | {"cost_weight": 5.0}), (0.5, {}))}),
    "routed_less": ({}, {"stages": ((0.25, ROUTED), (0.75, {}))}),
    # What a skipped branch leaves.
    "compensation_none": ({"compensation": "none"}, {}),
    "compensation_mean": ({"compensation": "mean"}, {}),
    "compensation_16": ({"compensation_rank": 16}, {}),
    "previous": ({"kv_source": "previous"}, {}),
    "hidden": ({"kv_source": "none"}, {}),
    # How budgets are split.
    "uniform": ({}, {"allocation": "uniform"}),
    "searched": ({}, {"allocation": "searched"}),
    # The paper's ablations.
    "vector": ({"kind": "vector"}, {}),
    "low_rank": ({"kind": "low_rank", "rank": 4}, {}),
    "shared": ({"kind": "shared", "importance": "mean_logit"}, {"stages": ((1.0, {}),)}),
    "mlp": ({"kind": "mlp", "rank": 16}, {}),
    "before": ({"placement": "before"}, {}),
    "frozen": ({}, {"stages": ((0.5, ROUTED), (0.5, FROZEN))}),
    "attention_only": ({"branches": ("attention",)}, {}),
    "mlp_only": ({"branches": ("mlp",)}, {}),
    "layers": ({"decision": "layer", "importance": "mean_logit"}, {"stages": ((1.0, {}),)}),
    # The rest of the training.
    "penalty_0.01": ({"kind": "low_rank", "rank": 4}, {"train_gates": True, "penalty": 0.01}),
    "penalty_0.1": ({"kind": "low_rank", "rank": 4}, {"train_gates": True, "penalty": 0.1}),
    "penalty_1": ({"kind": "low_rank", "rank": 4}, {"train_gates": True, "penalty": 1.0}),
    "penalty_l1": (
        {"kind": "low_rank", "rank": 4},
        {"train_gates": True, "penalty": 0.1, "penalty_kind": "l1"},
    ),
    "penalty_hinge": (
        {"kind": "low_rank", "rank": 4},
        {"train_gates": True, "penalty": 0.1, "penalty_kind": "hinge"},
    ),
    "distill_itself": ({}, {"distill": 0.5, "teacher": "itself"}),
    "distill_before": ({}, {"distill": 0.5}),
    "calibrated_once": ({}, {"calibrate_every": 0}),
    "lora": ({}, {"backbone": "lora"}),
    "closed_form": ({"importance": "mean_logit"}, {"stages": ()}),
    # The published recipe, at the lab's learning rate and number of steps.
    "paper": (
        PAPER.gate.to_json() | {"compensation_rank": 8},
        {"stages": ((1.0, PAPER_TRAINING),), "fit": PAPER.fit} | PAPER.calibration,
    ),
}
#: In the order in which they tell most.
METHODS = (
    "dense", "gateskip", "control", "random", "shortgpt", "gate_norm", "mixture_of_depths",
    "llm_drop", "skipgpt", "calm", "free", "layerskip", "flexidepth", "router_tuning",
    "shortgpt_linear", "llm_drop_linear", "every_second", "fixed_layers", "position",
    "token_identity", "int8", "smaller",
)  # fmt: skip


def bench(options: argparse.Namespace) -> Bench:
    """The lab."""

    def test(job: Job, model: Any, dense: Any) -> dict[str, Any]:
        """Accuracy, loss and what was saved, at the run's budget."""
        rows = list(problems(options.test_seed, options.problems))
        texts = list(problems(LOSS_SEED, LOSS_PROBLEMS))
        full = job.method in FULL
        arm = "control" if full else None
        run = Evaluation(model, texts, tokenizer(), reference=dense, arm=arm)
        found: dict[str, Any] = {"questions": options.problems}
        if full:
            with without_gates(model):
                found["accuracy"] = exact_match(model, rows)
            return found | {"loss": run.control().loss, "realised_macs": 0.0}
        budget = gateskip.Budget(compute=1.0 - job.saved)
        row = run.at(budget)
        with gateskip.budget(model, compute=budget.value), gateskip.trace(model) as trace:
            found["accuracy"] = exact_match(model, rows)
        # Of prompts and generated tokens, what finished rows go on with included.
        ledger = Ledger.of(call.without_padding() for call in trace.calls)
        found |= {
            "loss": row.loss, "realised_macs": row.macs_saved, "skip_rate": row.skip_rate,
            "generation_macs_saved": 1.0 - ledger.compute,
        }  # fmt: skip
        if job.saved:
            found["accuracy_full_budget"] = exact_match(model, rows)
        return found

    def plain(folder: Any) -> Any:
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    return Bench(
        name="lab", fresh=lambda: plain(options.dense), smaller=lambda: plain(options.smaller),
        tokenizer=tokenizer(),
        fit_rows=list(problems(FIT_SEED, FIT_PROBLEMS)),
        train_rows=lambda seed, count: list(problems(TRAIN_SEED + seed, count)),
        test=test, max_length=LONGEST, gates=GATES, training=TRAINING,
        stages=STAGES, variants=VARIANTS, backbone="full", grid=GRID,
        collapsed=0.05,  # answers are one of some 30 numbers
        router_rate=1e-2,
        trainer={"weight_decay": 0.01, "adam_beta2": 0.98, "use_cpu": True},
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """All runs that have no result yet, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, list(VARIANTS))
    parser.add_argument("--size", choices=("", *SIZES), default="", help="model, if another")
    parser.add_argument("--dense", help="its folder, if another")
    parser.add_argument("--smaller", default=str(SMALL), help="model of method smaller")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--saved", nargs="+", type=float, default=list(SAVED))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--test-seed", type=int, default=TEST_SEED, help="of problems")
    parser.add_argument("--work", type=Path, default=Path("build/lab/work"))
    options = parser.parse_args(arguments)
    options.command = "python experiments/lab/run.py experiments/results/lab"
    options.dense = options.dense or str(dense_of(options.size) if options.size else DENSE)
    for folder in (options.dense, *([options.smaller] if "smaller" in options.methods else ())):
        if not (Path(folder) / "config.json").is_file():
            parser.error(f"{folder} is no model; make it with experiments/lab/model.py.")
    make(bench(options), options)


if __name__ == "__main__":
    main()
