"""The reasoning lab: every method at every saving and seed, one JSON object per run.

    python experiments/lab/run.py experiments/results/lab --budget-hours 2

All arms start from the same dense model (``model.py``), train the whole backbone on the same fresh
problems for the same steps at the same rate, and differ by the method alone. Each run is for one
saving: a method is trained for the budget that it is tested at. A seed draws the problems, their
order and whatever a method draws. Accuracy is exact match of greedy generation with real skipping.
What exists is not made again; a run that is cut off begins again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import math
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from language import problems, tokenizer
from model import DENSE, LONGEST, TEST_SEED, exact_match
from transformers import LlamaForCausalLM, TrainingArguments
from transformers.trainer_utils import set_seed

import gateskip
from gateskip import methods
from gateskip.data import encode
from gateskip.errors import BudgetError, TrainingError
from gateskip.evaluation.header import run_header
from gateskip.evaluation.quality import Evaluation
from gateskip.execution.api import dense as without_gates
from gateskip.skipping.ledger import Ledger
from gateskip.skipping.state import state_of
from gateskip.training import GateSkipTrainer
from gateskip.training.dataset import make_dataset
from gateskip.training.recalibration import recalibrate

FIT_SEED, TRAIN_SEED, LOSS_SEED = 50_000, 60_000, 70_000  # of problems; none is model.py's
GRID = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.42, 0.35, 0.28, 0.2)
SAVED = (0.25, 0.5, 0.15, 0.35, 0.0)
#: A run whose accuracy is below this has collapsed; answers are one of some 30 numbers.
COLLAPSED = 0.05
ROUTER_RATE = 1e-2  # where routers alone are trained
GATES: dict[str, Any] = {"kind": "scalar", "compensation_rank": 8}
GATED: dict[str, Any] = {"schedule": "linear", "budget_steps": 0.5}
#: Variants of the gates: (options of the gates, options of the training).
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "": ({}, {}),
    "compensation_none": ({"compensation": "none"}, {}),
    "previous": ({"kv_source": "previous"}, {}),
    "trained_gates": (
        {"importance": "head", "kind": "low_rank", "rank": 4},
        {"train_gates": True, "decision_gradient": 0.5, "cost_weight": 0.1},
    ),
    "itself": ({}, {"distill": 0.5, "teacher": "itself"}),
}
#: Where a method cannot save so much as it is, how it can.
FURTHER: dict[str, dict[str, Any]] = {
    "mixture_of_depths": {"every": 1},
    "router_tuning": {"branches": ("attention", "mlp")},
}
Stages = tuple[tuple[float, gateskip.GateSkipTrainingConfig], ...]
ORDER = ("gateskip", "control", "random", "shortgpt", "mixture_of_depths", "gate_norm", "llm_drop")


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One run to make."""

    method: str
    variant: str
    saved: float
    seed: int

    @property
    def file(self) -> str:
        name = "_".join(part for part in (self.method, self.variant) if part)
        return f"{name}_{round(100 * self.saved)}_s{self.seed}.json"


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Runs in the order in which they tell most, all methods of a seed and saving together."""
    for seed, saved in itertools.product(options.seeds, options.saved):
        for name in options.methods:
            if (name == "control") != (saved == 0.0) and name != "gateskip":
                continue  # a control saves nothing, and at 0 every other method is one
            for variant in options.variants if name == "gateskip" else ("",):
                yield Job(name, variant, saved, seed)


def prepared(job: Job, model: Any, result: dict[str, Any]) -> Stages:
    """Put the method in place; how it is trained, in stages of shares of all steps. ``result``
    gets its options."""
    words = tokenizer()
    rows = list(problems(FIT_SEED, 300))
    compute = 1.0 - job.saved
    if job.method in ("gateskip", "control"):
        gate, training = VARIANTS[job.variant]
        gateskip.attach(model, gateskip.GateConfig(**(GATES | gate), seed=job.seed))
        if job.method == "control":
            return ((1.0, gateskip.GateSkipTrainingConfig(backbone="full", arm="control")),)
        gateskip.fit(model, rows, words)
        gateskip.calibrate(model, rows, words, grid=GRID)
        given = {"budget_end": compute, "backbone": "full"} | GATED | training
        return ((1.0, gateskip.GateSkipTrainingConfig(**given)),)
    wants = methods.METHODS.get(job.method)
    given = {"seed": job.seed, "compute": compute}
    options = {name: v for name, v in given.items() if name in wants.__dataclass_fields__}
    method = wants(**options)
    methods.apply(job.method, model, rows, words, **options)
    try:
        found = method.stages(model, compute)
    except BudgetError:
        more = FURTHER.get(job.method)
        if more is None:
            raise
        gateskip.detach(model)
        method = wants(**options, **more)
        methods.apply(job.method, model, rows, words, **options, **more)
        found = method.stages(model, compute)
    result["config"]["method"] = dataclasses.asdict(method)
    state_of(model).resolve(gateskip.Budget(compute=compute))
    if job.method == "random":
        found = tuple((share, dataclasses.replace(c, **GATED)) for share, c in found)
    # Everyone's backbone trains in full, but where a method's point is that it does not.
    return tuple(
        (share, c if c.backbone == "frozen" else dataclasses.replace(c, backbone="full"))
        for share, c in found
    )


def train(
    job: Job, model: Any, stages: Stages, options: argparse.Namespace
) -> tuple[Any, list[Any]]:
    """(the trained model, its curve of (step, cross-entropy))."""
    rows = list(problems(TRAIN_SEED + job.seed, options.steps * options.batch_size))
    begun, curve = 0, []
    for share, config in stages:
        steps = round(share * options.steps)
        part = rows[begun * options.batch_size : (begun + steps) * options.batch_size]
        model, found = stage(job, model, config, part, steps, options)
        curve += [(begun + step, loss) for step, loss in found]
        begun += steps
    return model, curve


def stage(
    job: Job, model: Any, config: Any, rows: list[Any], steps: int, options: argparse.Namespace
) -> tuple[Any, list[Any]]:
    """As :func:`train`, of one stage."""
    rate = ROUTER_RATE if config.backbone == "frozen" else options.learning_rate
    arguments = TrainingArguments(
        output_dir=str(options.work), max_steps=steps,
        per_device_train_batch_size=options.batch_size, learning_rate=rate,
        lr_scheduler_type="cosine", warmup_steps=steps // 20, weight_decay=0.01,
        adam_beta2=0.98, logging_steps=10, save_strategy="no", seed=job.seed, report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    calibration = [s.ids for s in encode(problems(FIT_SEED, 300), tokenizer(), LONGEST)]
    trainer = GateSkipTrainer(
        model, arguments, train_dataset=make_dataset(rows, tokenizer(), LONGEST),
        gateskip_args=config, calibration_data=calibration, processing_class=tokenizer(),
    )  # fmt: skip
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model = trainer.finish()
    curve = [
        (entry["step"], round(entry.get("cross_entropy", entry["loss"]), 5))
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    static = issubclass_static(job.method)
    if config.arm != "control" and not static:
        recalibrate(model, list(problems(FIT_SEED, 300)), tokenizer(), grid=GRID)
    return model, curve


def issubclass_static(name: str) -> bool:
    """Whether a method removes branches for good, so that there are no thresholds to find."""
    from gateskip.methods.static import Static

    return name in methods.METHODS.names() and issubclass(methods.METHODS.get(name), Static)


def tested(job: Job, model: Any, dense: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy, loss and what was saved, at the run's budget."""
    rows = list(problems(TEST_SEED, options.problems))
    texts = list(problems(LOSS_SEED, 300))
    control = job.method == "control"
    run = Evaluation(model, texts, tokenizer(), reference=dense, arm="control" if control else None)
    if control:
        with without_gates(model):
            accuracy = exact_match(model, rows)
        return {"accuracy": accuracy, "loss": run.control().loss, "realised_macs": 0.0}
    budget = gateskip.Budget(compute=1.0 - job.saved)
    row = run.at(budget)
    with gateskip.budget(model, compute=budget.value), gateskip.trace(model) as trace:
        accuracy = exact_match(model, rows)
    found = {
        "accuracy": accuracy, "loss": row.loss, "realised_macs": row.macs_saved,
        "skip_rate": row.skip_rate,
        # Of prompts and generated tokens, what finished rows go on with included.
        "generation_macs_saved": 1.0 - Ledger.of(c.without_padding() for c in trace.calls).compute,
    }  # fmt: skip
    if job.saved:
        found["accuracy_full_budget"] = exact_match(model, rows)
    return found


def run(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """The result of a run."""
    set_seed(job.seed)
    dense = LlamaForCausalLM.from_pretrained(options.dense, dtype=torch.float32).eval()
    model = copy.deepcopy(dense)
    settings = {k: getattr(options, k) for k in ("steps", "batch_size", "learning_rate")}
    result: dict[str, Any] = {
        "bench": "lab", "method": job.method, "seed": job.seed, "saved_macs": job.saved,
        "accuracy": None, "loss": None, "seconds": None,
        "config": {"variant": job.variant, "dense": Path(options.dense).name} | settings,
        "versions": run_header("python experiments/lab/run.py experiments/results/lab"),
        "questions": options.problems,
    }  # fmt: skip
    begun = time.time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            stages = prepared(job, model, result)
        except BudgetError as error:
            result["config"]["unreachable"] = str(error)
            return result
        result["config"]["training"] = [config.to_json() for _, config in stages]
        try:
            model, result["curve"] = train(job, model, stages, options)
        except TrainingError as error:  # a loss that is not a number
            result["config"]["failed"] = str(error)
            return result | {"collapsed": True, "seconds": round(time.time() - begun, 1)}
        result["seconds"] = round(time.time() - begun, 1)
        if options.models is not None:
            gateskip.save(model, options.models / job.file.removesuffix(".json"))
        try:
            result |= tested(job, model, dense, options)
        except BudgetError as error:  # thresholds found again may end above it
            result["config"]["unreachable"] = str(error)
            return result
    result["collapsed"] = not math.isfinite(result["loss"]) or result["accuracy"] < COLLAPSED
    return result


def main() -> None:
    """All runs that have no result yet, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--dense", default=str(DENSE))
    parser.add_argument("--methods", nargs="+", default=list(ORDER))
    parser.add_argument("--variants", nargs="+", default=[""], choices=list(VARIANTS))
    parser.add_argument("--saved", nargs="+", type=float, default=list(SAVED))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--budget-hours", type=float, default=math.inf)
    parser.add_argument("--work", type=Path, default=Path("build/lab/work"))
    parser.add_argument("--threads", type=int, default=None, help="of torch")
    parser.add_argument("--shard", type=int, nargs=2, default=(0, 1), metavar=("I", "OF"))
    parser.add_argument("--models", type=Path, default=None, help="keep what was trained here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    mine, of = options.shard
    for job in itertools.islice(jobs(options), mine, None, of):
        target = options.out / job.file
        if target.is_file():
            continue
        if (time.time() - begun) / 3600 > options.budget_hours:
            print("the time is over; run it again to go on", flush=True)
            return
        result = run(job, options)
        part = target.with_suffix(".tmp")
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(part, target)
        shown = {k: result.get(k) for k in ("accuracy", "loss", "realised_macs", "seconds")}
        print(job.file, json.dumps(shown), f"{time.time() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
