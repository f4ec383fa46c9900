"""Arms of an experiment: a method put in place for a saving, and trained as all others are.

All arms of a bench start from the same dense model (``smaller`` from another), see the same rows in
the same order for the same number of steps, and differ by the method alone. A run is for one
saving: a method is trained for the budget that it is tested at. A seed draws the rows, their order
and whatever a method draws.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from instead import INT8, SMALLER, macs_saved, quantised
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import set_seed

import gateskip
from gateskip import methods
from gateskip.data import encode
from gateskip.errors import BudgetError, TrainingError
from gateskip.evaluation.runs import CONTROL, DENSE, INSTEAD
from gateskip.skipping.capacity import capacity
from gateskip.skipping.state import state_of
from gateskip.training import GateSkipTrainer
from gateskip.training.dataset import make_dataset
from gateskip.training.recalibration import recalibrate

__all__ = [
    "FULL",
    "JOINT",
    "ROUTED",
    "Bench",
    "Job",
    "Stages",
    "Variant",
    "add_options",
    "every_job",
    "make",
    "static",
]

#: Of a token, where MACs of two models are compared.
MEAN_KEYS = 64.0
#: Nulls that rank by what gates know.
OF_GATES = ("position", "token_identity")
#: Options of a variant that are the calibration's.
CALIBRATED = ("allocation", "weigh_cost")
#: What computes everything of what it is.
FULL = (CONTROL, DENSE, *INSTEAD)
#: Trained in a way of their own even where nothing is to be saved.
TRAINED_AT_ALL = ("gateskip", "calm", "free", "layerskip")
Stages = tuple[tuple[float, gateskip.GateSkipTrainingConfig], ...]
#: (options of the gates, options of the training or ``stages``: shares of the steps and options).
Variant = tuple[dict[str, Any], dict[str, Any]]
#: Decisions and what adapts to them learn at once, decisions from what skipped tokens miss.
JOINT: dict[str, Any] = {
    "train_gates": True, "decision_gradient": 1.0, "cost_weight": 1.0, "cost_kind": "absolute",
    "learn_from_skipped": True, "calibrate_every": 0,
}  # fmt: skip
#: Decisions learn in a frozen model first.
ROUTED = JOINT | {"backbone": "frozen", "train_compensation": False}
#: Options of other methods' variants.
METHOD_VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "skipgpt": {"noisy": {"noise": 1.0, "temperature_start": 5.0}},  # its published code's
}
#: Where a method cannot save so much as it is, how it can.
FURTHER: dict[str, dict[str, Any]] = {
    "mixture_of_depths": {"every": 1},
    "router_tuning": {"branches": ("attention", "mlp")},
}


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One run to make; ``dense`` is the model before training.

    Attributes:
        size: of the model, where it is not the bench's main one.
    """

    method: str
    variant: str
    saved: float
    seed: int
    size: str = ""

    @property
    def label(self) -> str:
        """Variant and size."""
        return "_".join(part for part in (self.variant, self.size) if part)

    @property
    def name(self) -> str:
        """Of its result file, without suffix."""
        name = "_".join(part for part in (self.method, self.label) if part)
        return f"{name}_{round(100 * self.saved)}_s{self.seed}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What arms of an experiment have in common.

    Attributes:
        name: top-level ``bench`` of its results.
        fresh: a new dense model, whose weights are trained in full or by LoRA (``backbone``).
        smaller: a smaller one that learned the same, or None.
        fit_rows: what gates are fitted on, and thresholds calibrated: on the first
            ``calibrated`` of them, where given.
        train_rows: (seed, how many) to rows.
        test: (job, model, dense model) to figures of a result.
        gates, training, stages: of the main form of gates; each stage is a share of the steps and
            options beside ``training``. variants: by name, changes of gates and training; among the
            latter also ``fit`` (False: gates as they begin) and options of the calibration.
        grid: shares of pairs kept of calibrations.
        collapsed: a run whose accuracy is below this has collapsed.
        router_rate: learning rate where routers alone are trained.
        trainer: options of the trainer, of all arms.
    """

    name: str
    fresh: Callable[[], Any]
    tokenizer: Any
    fit_rows: Sequence[Any]
    train_rows: Callable[[int, int], Sequence[Any]]
    test: Callable[[Job, Any, Any], dict[str, Any]]
    max_length: int
    gates: dict[str, Any]
    training: dict[str, Any]
    stages: tuple[tuple[float, dict[str, Any]], ...]
    variants: dict[str, Variant]
    backbone: str
    grid: tuple[float, ...]
    collapsed: float
    router_rate: float
    trainer: dict[str, Any]
    smaller: Callable[[], Any] | None = None
    calibrated: int | None = None

    def gate_config(self, job: Job) -> gateskip.GateConfig:
        """Of gates, by the job's variant and seed."""
        gate, _ = self.variants[job.variant]
        return gateskip.GateConfig.from_json(self.gates | gate | {"seed": job.seed})

    def prepared(self, job: Job, model: Any) -> tuple[Stages, dict[str, Any]]:
        """Put the method in place: (how it is trained, options of the method).

        Raises:
            BudgetError: the method cannot save so much.
        """
        compute, rows = 1.0 - job.saved, self.fit_rows
        if job.method in ("gateskip", *FULL):
            training = self.variants[job.variant][1]
            gateskip.attach(model, self.gate_config(job))
            given: dict[str, Any] = {"backbone": self.backbone}
            if job.method == DENSE:
                return (), {}
            if job.method in FULL:
                return ((1.0, gateskip.GateSkipTrainingConfig(**given, arm="control")),), {}
            training = dict(training)
            stages = self.stages if job.saved else ((1.0, {}),)
            how = {key: training.pop(key) for key in CALIBRATED if key in training}
            if training.pop("fit", True):
                gateskip.fit(model, rows, self.tokenizer)
            few = rows[: self.calibrated]
            gateskip.calibrate(model, few, self.tokenizer, grid=self.grid, **how)
            given |= {"budget_end": compute} | self.training
            if "stages" in training:
                stages = training["stages"]
            else:  # of what adapts the model, not of what learns decisions before
                stages = tuple((s, o if "backbone" in o else o | training) for s, o in stages)
            return tuple(
                (share, gateskip.GateSkipTrainingConfig(**(given | self._routed(model, job, own))))
                for share, own in stages
            ), {}
        wants = methods.METHODS.get(job.method)
        if job.method in OF_GATES:
            gateskip.attach(model, gateskip.GateConfig(**self.gates, seed=job.seed))
            gateskip.fit(model, rows, self.tokenizer)
        known = {field.name for field in dataclasses.fields(wants)}
        drawn: dict[str, Any] = {"seed": job.seed, "compute": compute}
        options = {name: value for name, value in drawn.items() if name in known}
        if job.variant:
            options |= METHOD_VARIANTS[job.method][job.variant]
        methods.apply(job.method, model, rows, self.tokenizer, **options)
        found = None
        try:
            found = wants(**options).stages(model, compute)
        except BudgetError:
            if job.method not in FURTHER:
                raise
        # What the grid does not reach has no thresholds after training either.
        if job.method in FURTHER and (
            found is None or capacity(state_of(model), compute) < min(self.grid)
        ):
            gateskip.detach(model)
            options |= FURTHER[job.method]
            methods.apply(job.method, model, rows, self.tokenizer, **options)
            found = wants(**options).stages(model, compute)
        assert found is not None
        if found[0][1].thresholds == "calibrated":  # others find theirs while they train
            state_of(model).resolve(gateskip.Budget(compute=compute))
        if job.method in ("random", *OF_GATES):  # as gates train
            found = tuple((s, dataclasses.replace(c, **self.training)) for s, c in found)
        # One kind of backbone for all, but where a method's point is that it is frozen.
        changed: dict[str, Any] = {"backbone": self.backbone}
        return tuple(
            (s, c if c.backbone == "frozen" else dataclasses.replace(c, **changed))
            for s, c in found
        ), dataclasses.asdict(wants(**options))

    @staticmethod
    def _routed(model: Any, job: Job, options: dict[str, Any]) -> dict[str, Any]:
        """Options, with the share that the budget is of what skips can save as the cost's target,
        or as what is kept where thresholds are of the batch.

        Raises:
            BudgetError: skips cannot save so much.
        """
        if options.get("budget_unit") == "keep":
            share = capacity(state_of(model), 1.0 - job.saved)
            return options | {"budget_end": share, "calibrate_every": 0}
        if not options.get("cost_weight") or options.get("cost_kind", "linear") == "linear":
            return options
        return options | {"cost_target": capacity(state_of(model), 1.0 - job.saved)}

    def trained(
        self, job: Job, model: Any, stages: Stages, options: argparse.Namespace
    ) -> tuple[Any, list[tuple[int, float]]]:
        """(the trained model, its curve of (step, cross-entropy))."""
        batch = options.batch_size
        rows = self.train_rows(job.seed, options.steps * batch)
        begun, curve = 0, []
        for number, (share, config) in enumerate(stages, 1):
            steps = round(share * options.steps) if number < len(stages) else options.steps - begun
            part = rows[begun * batch : (begun + steps) * batch]
            model, found = self._stage(job, model, config, part, steps, options)
            curve += [(begun + step, loss) for step, loss in found]
            begun += steps
        return model, curve

    def rate(self, config: gateskip.GateSkipTrainingConfig, options: argparse.Namespace) -> float:
        """The learning rate of a stage."""
        routers = config.backbone == "frozen" and config.train_gates
        found: float = self.router_rate if routers else options.learning_rate
        return found

    def _stage(
        self, job: Job, model: Any, config: Any, rows: Any, steps: int, options: argparse.Namespace
    ) -> tuple[Any, list[tuple[int, float]]]:
        given: dict[str, Any] = {
            "output_dir": str(options.work / job.name), "max_steps": steps,
            "per_device_train_batch_size": options.batch_size,
            "learning_rate": self.rate(config, options),
            "lr_scheduler_type": "cosine", "warmup_steps": steps // 20, "logging_steps": 10,
            "save_strategy": "no", "seed": job.seed, "report_to": [], "disable_tqdm": True,
        }  # fmt: skip
        trainer = GateSkipTrainer(
            model, TrainingArguments(**(given | self.trainer)),
            train_dataset=make_dataset(rows, self.tokenizer, self.max_length),
            gateskip_args=config, processing_class=self.tokenizer,
            calibration_data=[
                sample.ids for sample in encode(self.fit_rows, self.tokenizer, self.max_length)
            ],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        model = trainer.finish()
        if config.arm != "control" and not static(job.method):
            few = self.fit_rows[: self.calibrated]
            recalibrate(model, few, self.tokenizer, grid=self.grid)
        return model, [
            (entry["step"], round(entry.get("cross_entropy", entry["loss"]), 5))
            for entry in trainer.state.log_history
            if "loss" in entry
        ]

    def _started(self, job: Job) -> Any:
        """The model that a run begins with.

        Raises:
            ValueError: there is no smaller one.
        """
        if job.method != SMALLER:
            return self.fresh()
        if self.smaller is None:
            raise ValueError(f"{self.name} has no smaller model for method {SMALLER!r}.")
        return self.smaller()

    def run(self, job: Job, options: argparse.Namespace) -> dict[str, Any]:
        """The result of a run; one whose saving cannot be reached says so."""
        from gateskip.evaluation.header import run_header

        set_seed(job.seed)
        dense = self.fresh()
        model = self._started(job)
        settings = {k: getattr(options, k) for k in ("steps", "batch_size", "learning_rate")}
        result: dict[str, Any] = {
            "bench": self.name, "method": job.method, "seed": job.seed, "saved_macs": job.saved,
            "accuracy": None, "loss": None, "seconds": None,
            "config": {"variant": job.label} | settings, "versions": run_header(options.command),
        }  # fmt: skip
        if job.size:
            result["config"]["size"] = job.size
        begun = time.time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                stages, result["config"]["method"] = self.prepared(job, model)
                result["config"]["training"] = [
                    config.to_json() | {"learning_rate": self.rate(config, options), "share": share}
                    for share, config in stages
                ]
                model, result["curve"] = self.trained(job, model, stages, options)
                result["seconds"] = round(time.time() - begun, 1)
                if options.models is not None:
                    gateskip.save(model, options.models / job.name)
                if job.method == INT8:
                    model = quantised(model)
                    gateskip.attach(model, gateskip.GateConfig(**self.gates, seed=job.seed))
                result |= self.test(job, model, dense)
                if job.method == SMALLER:
                    result["realised_macs"] = macs_saved(model, dense, MEAN_KEYS)
                    result["saved_macs"] = round(result["realised_macs"], 2)
            except BudgetError as error:
                result["config"]["unreachable"] = str(error)
                return result
            except TrainingError as error:  # a loss that is not a number
                result["config"]["failed"] = str(error)
                return result | {"collapsed": True, "seconds": round(time.time() - begun, 1)}
        wild = [k for k, v in result.items() if isinstance(v, float) and not math.isfinite(v)]
        low = result["accuracy"] is not None and result["accuracy"] < self.collapsed
        return result | dict.fromkeys(wild) | {"collapsed": low or bool(wild)}


def static(name: str) -> bool:
    """Whether a method removes branches for good, so that there are no thresholds to find."""
    return name in methods.METHODS.names() and not methods.METHODS.get(name).calibrated


def every_job(options: argparse.Namespace) -> Iterator[Job]:
    """Runs in the order in which they tell most, all methods of a seed and saving together."""
    for seed, saved in itertools.product(options.seeds, options.saved):
        for name in options.methods:
            if (name in FULL) != (saved == 0.0) and name not in TRAINED_AT_ALL:
                continue  # a control saves nothing, and at 0 all but these are one
            if name == DENSE and seed != options.seeds[0]:
                continue  # nothing is drawn
            for variant in options.variants:
                others = [other for other, own in METHOD_VARIANTS.items() if variant in own]
                known = not variant or name in (others or ["gateskip"])
                if known and (saved or not variant):
                    yield Job(name, variant, saved, seed, getattr(options, "size", ""))


def add_options(parser: argparse.ArgumentParser, variants: Sequence[str]) -> None:
    """What the command lines of all benches take."""
    parser.add_argument("out", type=Path)
    others = {name for found in METHOD_VARIANTS.values() for name in found}
    known = ["", *variants, *sorted(others)]
    parser.add_argument("--variants", nargs="+", default=[""], choices=known)
    parser.add_argument("--budget-hours", type=float, default=math.inf)
    parser.add_argument("--threads", type=int, default=None, help="of torch")
    parser.add_argument("--shard", type=int, nargs=2, default=(0, 1), metavar=("I", "OF"))
    parser.add_argument("--models", type=Path, default=None, help="keep what was trained here")


def make(bench: Bench, options: argparse.Namespace) -> None:
    """All runs that have no result yet, until the time is over; a run that was cut off begins
    again."""
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    mine, of = options.shard
    for job in itertools.islice(every_job(options), mine, None, of):
        target = options.out / f"{job.name}.json"
        if target.is_file():
            continue
        if (time.time() - begun) / 3600 > options.budget_hours:
            print("the time is over; run it again to go on", flush=True)
            return
        result = bench.run(job, options)
        part = target.with_suffix(f".tmp{os.getpid()}")
        part.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(part, target)
        shown = {k: result.get(k) for k in ("accuracy", "loss", "realised_macs", "seconds")}
        print(job.name, json.dumps(shown), f"{time.time() - begun:.0f} s", flush=True)
