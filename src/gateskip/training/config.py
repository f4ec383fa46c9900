"""What a user can choose about training. Knows nothing of torch or of models."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Self

from gateskip.config import one_of
from gateskip.errors import ConfigError

__all__ = ["GateSkipTrainingConfig"]

BACKBONES = ("frozen", "lora", "full")
UNITS = ("compute", "keep")
SCHEDULES = ("linear", "cosine", "constant", "sampled")
PENALTIES = ("l2", "l1", "kl", "hinge")
THRESHOLDS = ("calibrated", "batch", "sequence", "running", "learned", "zero")
COST_KINDS = ("linear", "hinge", "absolute")
ARMS = ("gateskip", "control")
EXIT_LOSSES = ("none", "weighed", "rotating", "shallow")
TEACHERS = ("before", "itself")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GateSkipTrainingConfig:
    """How gates, compensation and backbone are trained.

    Attributes:
        backbone: ``"frozen"``, ``"lora"`` (PEFT, every linear layer of the decoder layers) or
            ``"full"``.
        lora_rank, lora_alpha, lora_dropout: of the LoRA layers.
        penalty: λ of the gates' penalty (arXiv 2510.13876, eq. 3).
        penalty_kind: ``"l2"`` (the paper's mean squared gate value), ``"l1"``, ``"kl"`` to a target
            mean value, or ``"hinge"`` on it (see ``gateskip.training.penalty``).
        penalty_target: that mean value, of ``"kl"`` and ``"hinge"``.
        penalty_end: λ goes linearly from ``penalty`` to this over the training; None keeps it.
        train_gates: False leaves the gates as they are (as fitted).
        decision_gradient: what trains decisions. 0: only the gate's value and the penalty (the
            paper). Above: straight-through gradients of temperature T, in units of the score.
        decision_gradient_start: T falls linearly from here over the training; None keeps it.
        decision_noise: scale of the logistic noise that training adds to scores, so that decisions
            are tried out; 1 is Gumbel-softmax's (arXiv 1611.01144). Inference adds none.
        learn_from_skipped: decisions learn from skipped tokens as well, whose branches are computed
            for it: a training that saves nothing, as routers' papers have it.
        cost_weight: weight of the expected share of MACs spent, which straight-through gradients
            trade against the loss.
        cost_kind: what is weighed: ``"linear"``: the share itself; ``"hinge"``: what it is above
            ``cost_target``; ``"absolute"``: how far it is from that.
        cost_target: share of what skips can save that may be spent, of the last two; None: what
            ``budget_end`` leaves.
        train_compensation: False leaves the compensation as it is.
        gate_learning_rate, compensation_learning_rate: None takes the trainer's learning rate.
        distill: share d of the loss that is KL(teacher ‖ gated) at labelled positions; the rest is
            cross-entropy.
        teacher: ``"before"``: the dense model as it was before training; ``"itself"``: as it is at
            every step, without gates and skipping (inplace distillation, arXiv 1903.05134).
        budget_unit: ``"compute"`` or ``"keep"``.
        budget_start, budget_end: the budget falls from one to the other.
        budget_attention, budget_mlp: an end of their own for these branches, of
            ``budget_unit="keep"``.
        budget_steps: share of all steps over which it falls.
        schedule: ``"linear"`` (the paper's) or ``"cosine"``: every step takes the falling budget;
            ``"constant"``: every step takes ``budget_end``; ``"sampled"``: a budget drawn for every
            step between the linearly falling one and 1, so that one model serves all of them.
        thresholds: where training's come from. ``"calibrated"``: the model's, the only ones that
            decide as inference does; ``"batch"``: the paper's quantile of every batch, not causal;
            ``"sequence"``: the highest of every sequence (Mixture-of-Depths), not causal;
            ``"running"``: an average of each branch's quantiles over steps; ``"learned"``: a
            parameter of each branch, from the calibrated one on; ``"zero"``: a token is kept where
            its score is at least 0 (σ(score) ≥ ½), and the cost, or the gates' penalty, says how
            many are. The paper's,
            the sequence's and the running ones count ``keep``, every branch alike.
        auxiliary: weight of the loss that teaches scores above 0 to be the ones that
            ``thresholds="sequence"`` keeps (arXiv 2404.02258, section 3.5).
        threshold_momentum: of ``"running"``. threshold_learning_rate: of ``"learned"``; None takes
            the trainer's.
        calibrate_every: thresholds are found again every so many steps (0: never), on the
            trainer's ``calibration_data``.
        exit_loss: what layers before the last learn to predict through the model's own head:
            ``"weighed"``: all of them, weighed by depth (CALM, arXiv 2207.07061, eq. 6);
            ``"rotating"``: every fourth one in turn (LayerSkip, arXiv 2404.16710, section 4.2);
            ``"shallow"``: one of them (FREE, arXiv 2310.05424, section 4.1).
        exit_layers: of ``"shallow"``: so many layers are the shallow model.
        exit_distill: of ``"shallow"``: weight of the mean squared distance between its layers'
            states and those of deeper ones.
        layer_dropout: probability that a sequence drops the last layer, falling towards the first
            (LayerSkip, section 4.1); of a model with ``decision="layer"``.
        arm: ``"control"`` trains the same backbone on the same data without gates and skipping.
    """

    backbone: Literal["frozen", "lora", "full"] = "lora"
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    penalty: float = 0.0
    penalty_kind: Literal["l2", "l1", "kl", "hinge"] = "l2"
    penalty_target: float = 0.8
    penalty_end: float | None = None
    train_gates: bool = False
    decision_gradient: float = 0.0
    decision_gradient_start: float | None = None
    decision_noise: float = 0.0
    learn_from_skipped: bool = False
    cost_weight: float = 0.0
    cost_kind: Literal["linear", "hinge", "absolute"] = "linear"
    cost_target: float | None = None
    train_compensation: bool = True
    gate_learning_rate: float | None = None
    compensation_learning_rate: float | None = None
    distill: float = 0.0
    teacher: Literal["before", "itself"] = "before"
    budget_unit: Literal["compute", "keep"] = "compute"
    budget_start: float = 1.0
    budget_end: float = 0.8
    budget_attention: float | None = None
    budget_mlp: float | None = None
    budget_steps: float = 0.5
    schedule: Literal["linear", "cosine", "constant", "sampled"] = "linear"
    thresholds: Literal["calibrated", "batch", "sequence", "running", "learned", "zero"] = (
        "calibrated"
    )
    auxiliary: float = 0.0
    threshold_momentum: float = 0.9
    threshold_learning_rate: float | None = None
    calibrate_every: int = 0
    exit_loss: Literal["none", "weighed", "rotating", "shallow"] = "none"
    exit_layers: int = 1
    exit_distill: float = 0.0
    layer_dropout: float = 0.0
    arm: Literal["gateskip", "control"] = "gateskip"

    def __post_init__(self) -> None:
        one_of("backbone", self.backbone, BACKBONES)
        one_of("budget_unit", self.budget_unit, UNITS)
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("penalty_kind", self.penalty_kind, PENALTIES)
        one_of("thresholds", self.thresholds, THRESHOLDS)
        one_of("arm", self.arm, ARMS)
        one_of("exit_loss", self.exit_loss, EXIT_LOSSES)
        one_of("cost_kind", self.cost_kind, COST_KINDS)
        if self.exit_distill and self.exit_loss != "shallow":
            raise ConfigError(
                f"exit_distill={self.exit_distill!r} needs exit_loss='shallow', not "
                f"{self.exit_loss!r}."
            )
        if self.exit_loss != "none" and self.distill:
            raise ConfigError(f"exit_loss={self.exit_loss!r} has no teacher; set distill=0.")
        if not 0.0 <= self.layer_dropout < 1.0:
            raise ConfigError(f"layer_dropout={self.layer_dropout!r} must be in [0, 1).")
        if self.layer_dropout and (self.budget_end < 1.0 or self.thresholds != "calibrated"):
            raise ConfigError(
                f"layer_dropout={self.layer_dropout!r} drops layers instead of a budget; set "
                "budget_end=1.0 and thresholds='calibrated'."
            )
        one_of("teacher", self.teacher, TEACHERS)
        for name in (
            "budget_start", "budget_end", "budget_steps", "budget_attention", "budget_mlp",
            "penalty_target", "cost_target",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise ConfigError(f"{name}={value!r} must be a number in (0, 1].")
        if self.budget_end > self.budget_start:
            raise ConfigError(
                f"budget_end={self.budget_end!r} is above budget_start={self.budget_start!r}; the "
                "budget falls."
            )
        self._check_thresholds()
        if not 0.0 <= self.distill <= 1.0:
            raise ConfigError(f"distill={self.distill!r} must be a share in [0, 1].")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"lora_dropout={self.lora_dropout!r} must be in [0, 1).")
        for name in (
            "penalty",
            "penalty_end",
            "threshold_learning_rate",
            "decision_gradient",
            "decision_gradient_start",
            "decision_noise",
            "cost_weight",
            "auxiliary",
            "exit_distill",
            "gate_learning_rate",
            "compensation_learning_rate",
        ):
            value = getattr(self, name)
            if value is not None and not value >= 0.0:
                raise ConfigError(f"{name}={value!r} must not be negative.")
        for name, least in (
            ("lora_rank", 1),
            ("lora_alpha", 1),
            ("calibrate_every", 0),
            ("exit_layers", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}={value!r} must be an integer of at least {least}.")
        if self.decision_gradient_start == 0.0:
            raise ConfigError("decision_gradient_start=0.0 must be above 0, as a temperature.")
        if self.penalty_end is not None and not self.penalty:
            raise ConfigError(f"penalty_end={self.penalty_end!r} needs penalty= to begin with.")
        if self.penalty and not self.train_gates:
            raise ConfigError(
                f"penalty={self.penalty!r} moves nothing while train_gates=False; set one of them."
            )
        if self.cost_weight and not self.decision_gradient:
            raise ConfigError(
                f"cost_weight={self.cost_weight!r} needs decision_gradient= (a temperature)."
            )
        for name in ("learn_from_skipped", "decision_noise", "decision_gradient_start"):
            value = getattr(self, name)
            if value and not self.decision_gradient:
                raise ConfigError(f"{name}={value!r} needs decision_gradient= (a temperature).")
        moves = self.train_gates or self.thresholds == "learned"
        if self.decision_gradient and not moves:
            raise ConfigError(
                f"decision_gradient={self.decision_gradient!r} needs train_gates=True."
            )
        if self.teacher == "itself" and not self.distill:
            raise ConfigError("teacher='itself' teaches nothing while distill=0; set distill=0.5.")
        if self.teacher == "itself" and self.arm == "control":
            raise ConfigError("teacher='itself' has nothing to teach arm='control'; drop one.")
        added = self.train_gates or self.train_compensation or self.thresholds == "learned"
        trains = self.backbone != "frozen" or added
        if not trains or (self.arm == "control" and self.backbone == "frozen"):
            raise ConfigError(
                "backbone='frozen' with nothing else to train; train gates, compensation or a "
                "backbone ('lora', 'full')."
            )

    def _check_thresholds(self) -> None:
        own = self.budget_attention is not None or self.budget_mlp is not None
        by_keep = own or self.thresholds in ("batch", "sequence", "running")
        if by_keep and self.budget_unit != "keep":
            what = "budget_attention and budget_mlp" if own else f"thresholds={self.thresholds!r}"
            raise ConfigError(f"{what} count tokens; set budget_unit='keep'.")
        if not 0.0 <= self.threshold_momentum < 1.0:
            raise ConfigError(
                f"threshold_momentum={self.threshold_momentum!r} must be a number in [0, 1)."
            )
        moved = self.thresholds in ("learned", "zero")
        falls = self.thresholds == "zero" and self.penalty  # gates themselves come down
        if moved and not falls and not (self.decision_gradient and self.cost_weight):
            raise ConfigError(
                f"thresholds={self.thresholds!r} needs decision_gradient= and cost_weight=, which "
                "move what is kept."
            )
        if moved and own:
            raise ConfigError(
                f"thresholds={self.thresholds!r} has no budgets; leave budget_attention out."
            )
        if self.thresholds == "zero" and not self.train_gates:
            raise ConfigError("thresholds='zero' moves scores; set train_gates=True.")
        if self.thresholds in ("batch", "sequence") and self.decision_gradient:
            raise ConfigError(
                f"decision_gradient={self.decision_gradient!r} needs a threshold that is known "
                f"before the batch; thresholds={self.thresholds!r} has none."
            )
        if self.auxiliary and not (self.thresholds == "sequence" and self.train_gates):
            raise ConfigError(
                f"auxiliary={self.auxiliary!r} needs thresholds='sequence' and train_gates=True."
            )
        if self.thresholds != "calibrated" and self.calibrate_every:
            raise ConfigError(
                f"calibrate_every={self.calibrate_every!r} finds calibrated thresholds, and "
                f"thresholds={self.thresholds!r}; drop one."
            )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary of all fields."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Rebuild from :meth:`to_json`; ConfigError names an unknown key."""
        known = tuple(field.name for field in dataclasses.fields(cls))
        for key in data:
            one_of("GateSkipTrainingConfig key", key, known)
        return cls(**data)
