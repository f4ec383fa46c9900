"""Training: the backbone, the gates and the compensation, with tokens really skipped."""

from gateskip.training.backbone import finish
from gateskip.training.config import GateSkipTrainingConfig
from gateskip.training.dataset import Collator, make_dataset
from gateskip.training.sharding import average_added, shard
from gateskip.training.trainer import GateSkipMixin, GateSkipTrainer

__all__ = [
    "Collator",
    "GateSkipMixin",
    "GateSkipTrainer",
    "GateSkipTrainingConfig",
    "average_added",
    "finish",
    "make_dataset",
    "shard",
]
