"""Training: the backbone, the gates and the compensation, with tokens really skipped."""

from gateskip.training.config import GateSkipTrainingConfig
from gateskip.training.dataset import Collator, make_dataset
from gateskip.training.trainer import GateSkipMixin, GateSkipTrainer

__all__ = ["Collator", "GateSkipMixin", "GateSkipTrainer", "GateSkipTrainingConfig", "make_dataset"]
