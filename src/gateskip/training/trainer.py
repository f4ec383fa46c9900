"""``GateSkipTrainer``: Hugging Face's Trainer, with tokens really skipped while it trains."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import Trainer, TrainerState, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler

from gateskip.config import Budget
from gateskip.costs import saved_macs
from gateskip.errors import ConfigError, TrainingError, UnsupportedError
from gateskip.execution.api import dense
from gateskip.execution.checkpoint import restore, save
from gateskip.retrofit.attach import inner_model, is_gated, is_sharded
from gateskip.skipping.state import override, state_of
from gateskip.training import backbone
from gateskip.training.after_step import AfterStep
from gateskip.training.causal_loss import CausalLoss
from gateskip.training.checkpoints import (
    check_options,
    last_checkpoint,
    run_options,
    write_options,
)
from gateskip.training.checks import check_combination, check_thresholds, cost_target_of
from gateskip.training.config import GateSkipTrainingConfig
from gateskip.training.dataset import Collator, SeededLengths, TokenDataset
from gateskip.training.objective import GateObjective, SkipMeter, rates_of
from gateskip.training.penalty import BY_MEAN, GateMeans
from gateskip.training.schedule import budget_at, penalty_at, temperature_at
from gateskip.training.sharding import average_added
from gateskip.training.thresholds import OwnThresholds, keep_learned

__all__ = ["GateSkipMixin", "GateSkipTrainer"]

ARGUMENTS_FILE = "training_args.bin"
SEEDS = 1_009  # between those of two steps


class GateSkipMixin:
    """Put before a Trainer's class: budget, penalty and skip rates; for TRL's trainers too.

    ``class MyTrainer(GateSkipMixin, SFTTrainer)``, with ``gateskip_args=`` at construction.
    """

    gateskip_args: GateSkipTrainingConfig
    model: Any
    args: Any
    state: Any
    accelerator: Any

    def __init__(
        self,
        model: Any = None,
        *args: Any,
        gateskip_args: GateSkipTrainingConfig | None = None,
        calibration_data: Any = None,
        **kwargs: Any,
    ) -> None:
        gated = state_of(model)
        config = gateskip_args or GateSkipTrainingConfig()
        arguments: Any = kwargs.get("args") or (args[0] if args else None)
        check_combination(config, gated, arguments)
        if getattr(arguments, "ddp_find_unused_parameters", True) is None:
            # Every parameter gets a gradient, see compute_loss; looking for others costs a step.
            arguments.ddp_find_unused_parameters = False
        if arguments is not None:
            set_seed(arguments.seed)  # LoRA's initial weights come before the Trainer's own seeding
        self.gateskip_args = config
        self.calibration_data = calibration_data
        self._skips = config.arm == "gateskip"
        check_thresholds(config, gated, calibration_data)
        # A trainer that is given PEFT's config adds its layers itself, and freezes all the rest.
        theirs = kwargs.get("peft_config") is not None
        if theirs and config.backbone != "lora":
            raise ConfigError(
                f"peft_config= trains adapters, and backbone={config.backbone!r}; drop one."
            )
        backbone.prepare(model, config, add_lora=not theirs)
        self._own = OwnThresholds(model, config) if self._skips else None
        self._means = None
        if config.penalty and config.penalty_kind in BY_MEAN:
            start = 1.0 / (1.0 + math.exp(-gated.config.init_bias))
            self._means = GateMeans(
                config.penalty_kind, config.penalty_target, gated.branches, start
            )
        self._cost_target = cost_target_of(config, gated)
        self._meter = SkipMeter()
        self._sums: dict[str, float] = {}
        self._counts = 0
        self._valid: Tensor | None = None
        #: Valid tokens trained on by this process since it began.
        self.tokens_seen = 0
        with backbone.adapted(inner_model(model)):
            super().__init__(model, *args, **kwargs)  # type: ignore[call-arg]
        if theirs:
            backbone.free_added(self._gated, config)
        if getattr(self.args, "n_gpu", 1) > 1:
            raise UnsupportedError(
                "several GPUs in one process (DataParallel) lose this thread's budget; start one "
                "process per GPU (torchrun, accelerate launch)."
            )
        if config.distill and not self._plain():
            raise UnsupportedError(
                f"distill={config.distill} needs GateSkipTrainer's own loss: one process, no label "
                "smoothing, no compute_loss_func, no other trainer's; set distill=0."
            )
        if config.exit_loss != "none" and not self._plain():
            raise UnsupportedError(
                f"exit_loss={config.exit_loss!r} needs GateSkipTrainer's own loss: one process, no "
                "label smoothing, no compute_loss_func, no other trainer's."
            )
        self._causal_loss = CausalLoss(self._gated, config, skips=self._skips, note=self._note)
        self.add_callback(AfterStep(self))  # type: ignore[attr-defined]

    @property
    def _gated(self) -> Any:
        """The gated model, within whatever wraps it."""
        return inner_model(self.model)

    # -- one step ---------------------------------------------------------------------------

    def current_budget(self) -> Budget:
        """The budget of the current optimiser step, not below what the thresholds reach."""
        return self._budget(self.state.global_step)

    def _budget(self, step: int, kind: str | None = None) -> Budget:
        """The budget of a step, or its branches' of one kind."""
        calibrated = self.gateskip_args.thresholds == "calibrated"
        if not self._skips or (calibrated and state_of(self._gated).policy is None):
            return Budget(compute=1.0)
        steps = max(int(self.state.max_steps), 1)
        return self._within(budget_at(self.gateskip_args, step, steps, self.args.seed, kind))

    def _within(self, budget: Budget) -> Budget:
        """Thresholds found again while training may end a little above the first ones' floor."""
        policy, unit = state_of(self._gated).policy, self.gateskip_args.budget_unit
        if policy is None or self.gateskip_args.thresholds != "calibrated":
            return budget
        asked: float = getattr(budget, unit)
        return Budget.by(unit, min(1.0, max(asked, policy.floor(unit))))

    def evaluation_budget(self) -> Budget:
        """The lowest budget of the schedule: figures of different steps are of one budget."""
        if not self._skips or state_of(self._gated).policy is None:
            return Budget(compute=1.0)
        config = self.gateskip_args
        return self._within(Budget.by(config.budget_unit, config.budget_end))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As the Trainer's; grouping by length is seeded per epoch, so that resuming repeats it."""
        sampler = super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        if type(sampler) is LengthGroupedSampler:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return SeededLengths(sampler.batch_size, sampler.lengths, seed)
        return sampler

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; also counts the valid tokens of the whole accumulated batch."""
        samples, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        counts = [s["attention_mask"].sum() for s in samples if "attention_mask" in s]
        self._valid = None
        if items is not None and counts and len(counts) == len(samples):
            valid = torch.stack([c.to(self.args.device) for c in counts]).sum()
            if self.args.world_size > 1:
                valid = self.accelerator.gather(valid).sum() / self.args.world_size
            self._valid = valid
        return samples, items

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; under FSDP2 the gradients of what was added are averaged."""
        found = super().training_step(*args, **kwargs)  # type: ignore[misc]
        whole = self.accelerator.sync_gradients  # not within an accumulation
        if whole and is_sharded(self._gated, state_of(self._gated).family):
            average_added(self._gated)
        return found

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The Trainer's loss (or, with distillation, ours), plus λ times the gates' penalty."""
        config = self.gateskip_args
        training = bool(model.training)
        if training and "attention_mask" in inputs:
            self.tokens_seen += int(inputs["attention_mask"].sum())
        objective = self._objective() if training else None
        budget = self.current_budget() if training else self.evaluation_budget()
        if self._skips and not is_gated(self._gated, state_of(self._gated).family):
            raise UnsupportedError("the model runs dense here, so it cannot learn to skip.")
        items = num_items_in_batch if training else None
        with self._context(budget, objective, training):
            if training and self._plain():
                with self.accelerator.autocast():  # the Trainer wraps model.forward, no decoder's
                    found: Any = self._causal_loss(inputs, items, self.state.global_step)
                outputs = None
            else:
                found = super().compute_loss(  # type: ignore[misc]
                    model, inputs, return_outputs=return_outputs,
                    num_items_in_batch=num_items_in_batch,
                )  # fmt: skip
                found, outputs = found if return_outputs else (found, None)
        if not training:
            return (found, outputs) if return_outputs else found
        tokens = self._valid if items is not None else None
        if objective is not None and config.penalty:
            mean = objective.mean(tokens)
            self._note("gate_penalty", mean if self._means is None else self._means.value())
            steps = max(int(self.state.max_steps), 1)
            found = found + penalty_at(config, self.state.global_step, steps) * mean
            if self._means is not None:
                self._means.add(objective.values, objective.tokens)
        if objective is not None and objective.spent:
            cost = objective.cost(tokens)
            self._note("expected_cost", cost)
            found = found + config.cost_weight * objective.excess(
                config.cost_kind, self._cost_target, tokens
            )
        if objective is not None and config.auxiliary:
            missed = objective.prediction(tokens)
            self._note("top_k_prediction", missed)
            found = found + config.auxiliary * missed
        waits = self.args.world_size > 1 and not self.args.ddp_find_unused_parameters
        if not found.requires_grad or waits:
            # Where a step skips nobody, compensation has no part in it; on other ranks it may, and
            # they wait for its gradient.
            trained = [p for p in model.parameters() if p.requires_grad]
            found = found + sum(p.flatten()[:1].sum() * 0.0 for p in trained)
        if not math.isfinite(float(found.detach())):
            raise TrainingError(self._not_finite("the loss", float(found.detach())))
        self._note("budget", budget.value)
        self._counts += 1
        return (found, outputs) if return_outputs else found

    def _objective(self) -> GateObjective | None:
        config = self.gateskip_args
        if not self._skips or not (config.penalty or config.decision_gradient or config.auxiliary):
            return None
        gated = state_of(self._gated)
        costs, steps = None, max(int(self.state.max_steps), 1)
        if config.cost_weight and gated.policy is not None:
            table, keys = gated.costs(), gated.policy.mean_keys
            costs = {key: saved_macs(table[key], keys) for key in gated.branches}
        return GateObjective(
            penalty=config.penalty_kind if config.penalty else None,
            slopes=None if self._means is None else self._means.slopes(),
            temperature=temperature_at(config, self.state.global_step, steps), costs=costs,
            everyone=config.learn_from_skipped, hard=config.cost_kind != "linear",
            predicts=config.auxiliary > 0.0,
        )  # fmt: skip

    @contextlib.contextmanager
    def _context(self, budget: Budget, objective: Any, training: bool) -> Iterator[None]:
        if not self._skips:
            with dense(self._gated):
                yield
            return
        assert self._own is not None
        own = self._own.now(self._keeps() if training else None)
        meter = self._meter if training else None
        if training and self.gateskip_args.learn_from_skipped:
            own["execution"] = "masked"
        if training:
            own["noise"] = self.gateskip_args.decision_noise
            if state_of(self._gated).config.importance == "random":
                own["seed"] = self._random_seed()
        with override(
            state_of(self._gated), budget=budget, objective=objective, recorder=meter, **own
        ):
            yield

    def _random_seed(self) -> int:
        """Another one for every step: what learns is a model of stochastic depth, and not one that
        knows which places are skipped."""
        return state_of(self._gated).config.seed + SEEDS * (self.state.global_step + 1)

    def _keeps(self) -> dict[str, Budget]:
        """Budgets of this step by branch kind."""
        return {kind: self._budget(self.state.global_step, kind) for kind in ("attention", "mlp")}

    def _after_step(self) -> None:
        """What is averaged over a step's micro-batches and processes."""
        if self._means is not None:
            self._means.step(lambda t: self.accelerator.reduce(t, "sum"))
        if self._own is not None and self._own.running is not None:
            step = self.state.global_step - 1
            keep = {kind: self._budget(step, kind).keep or 1.0 for kind in ("attention", "mlp")}
            self._own.step(keep, lambda mine: gather_object([mine]))

    def _plain(self) -> bool:
        """Whether the loss is a causal language model's own, which we compute by chunks."""
        return False

    def _not_finite(self, what: str, value: float) -> str:
        saved = last_checkpoint(Path(self.args.output_dir))
        kept = "none was saved yet" if saved is None else f"the last good checkpoint is {saved}"
        return (
            f"{what} is {value} at step {self.state.global_step}; training stopped before the "
            f"weights changed, {kept}. Lower learning_rate, or look at the data of that step."
        )

    def _note(self, name: str, value: Any) -> None:
        number = float(value.detach()) if isinstance(value, Tensor) else float(value)
        self._sums[name] = self._sums.get(name, 0.0) + number

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with penalty, budget and realised skip rates since the last time, of
        all processes."""
        if "loss" in logs and self._counts:
            accumulated = max(int(self.args.gradient_accumulation_steps), 1)
            steps = self._counts / accumulated
            mine = self._sums, self._meter.take()
            everyone = gather_object([mine]) if self.args.world_size > 1 else [mine]
            for name in self._sums:
                mean = sum(sums[name] for sums, _ in everyone) / len(everyone)
                logs[name] = mean / (self._counts if name == "budget" else steps)
            logs |= rates_of([counts for _, counts in everyone])
            self._sums, self._counts = {}, 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    # -- optimiser --------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, with groups of their own for gates and compensation."""
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        backbone.own_rates(optimizer, self._gated, self.gateskip_args)
        return optimizer

    # -- checkpoints ------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """A checkpoint is a gateskip folder: what was trained, thresholds, and the options."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        save(self._gated, folder)
        write_options(folder, self._options(), self._averages())
        if getattr(self, "processing_class", None) is not None:
            self.processing_class.save_pretrained(folder)  # type: ignore[attr-defined]
        torch.save(self.args, folder / ARGUMENTS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        averages = check_options(folder, self._options())
        restore(self._gated, folder)
        if self._means is not None:
            self._means.take(averages["gate_means"])
        if self._own is not None and self._own.running is not None:
            self._own.running.take(averages["thresholds"])

    def _averages(self) -> dict[str, Any]:
        """What is averaged over steps, for a checkpoint."""
        found: dict[str, Any] = {}
        if self._means is not None:
            found["gate_means"] = self._means.to_json()
        if self._own is not None and self._own.running is not None:
            found["thresholds"] = self._own.running.to_json()
        return found

    def _options(self) -> dict[str, Any]:
        data = getattr(self, "train_dataset", None)
        return run_options(self.gateskip_args, self.args, data)

    def take(self, checkpoint: Path) -> None:
        """Be where a finished training's last checkpoint is."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def _load_best_model(self) -> None:
        restore(self._gated, self.state.best_model_checkpoint)


class GateSkipTrainer(GateSkipMixin, Trainer):  # type: ignore[misc]
    """Hugging Face ``Trainer`` for a gated model.

    Args:
        gateskip_args: budget schedule, penalty, distillation and what is trained.
        calibration_data: id tensors or texts for ``calibrate_every``.

    All other arguments are the Trainer's. ``train()`` leaves a model that :func:`gateskip.save`
    writes, and that computes its LoRA layers merged after :meth:`finish`.

    Raises:
        AttachError: the model has no gates. BudgetError: a budget below the thresholds' floor.
        TrainingError: the loss is not a number; the last checkpoint stays.
    """

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("train_dataset")
        if kwargs.get("data_collator") is None and isinstance(given, TokenDataset):
            tokenizer = kwargs.get("processing_class")
            pad = getattr(tokenizer, "pad_token_id", None)
            kwargs["data_collator"] = Collator(0 if pad is None else int(pad))
        super().__init__(model, *args, **kwargs)

    def _plain(self) -> bool:
        return (
            self.label_smoother is None
            and self.compute_loss_func is None
            and self.args.world_size == 1
            and self.args.n_gpu <= 1
        )

    def finish(self) -> Any:
        """Merge LoRA into the weights; returns the model, ready for inference and saving.

        Learned thresholds become the model's, with what they realise on ``calibration_data``.
        """
        backbone.finish(self._gated)
        self._gated.eval()
        if self._skips and self.gateskip_args.thresholds == "learned":
            keep_learned(self._gated, self.calibration_data)
        return self._gated
