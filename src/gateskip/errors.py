"""Every exception that gateskip raises on purpose.

::

    GateSkipError
    ├── ConfigError            (ValueError)   an illegal option or combination of options
    ├── UnsupportedError                      an unsupported architecture or mode
    ├── AttachError                           attach twice, or a call that needs an attached model
    ├── BudgetError            (ValueError)   out of range, below the floor, not calibrated
    ├── DataError              (ValueError)   malformed, empty or too little data
    ├── CheckpointError                       a damaged, foreign or too new checkpoint
    ├── OutputError            (OSError)      an output that exists already or cannot be written
    └── TrainingError                         training cannot go on; what was saved stays

A message names the argument, its value and the remedy.
"""

__all__ = [
    "AttachError",
    "BudgetError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GateSkipError",
    "OutputError",
    "TrainingError",
    "UnsupportedError",
]


class GateSkipError(Exception):
    """Base of every exception that gateskip raises on purpose."""


class ConfigError(GateSkipError, ValueError):
    """An illegal option or combination of options."""


class UnsupportedError(GateSkipError):
    """An architecture, attention back-end or mode that gateskip cannot do."""


class AttachError(GateSkipError):
    """The model is gated already, or is not gated where it has to be."""


class BudgetError(GateSkipError, ValueError):
    """A budget out of range, below the floor, or asked for before calibration."""


class DataError(GateSkipError, ValueError):
    """Malformed, empty or too little data."""


class CheckpointError(GateSkipError):
    """A damaged, foreign or too new checkpoint."""


class OutputError(GateSkipError, OSError):
    """An output that exists already or cannot be written."""


class TrainingError(GateSkipError):
    """Training cannot go on, as with a loss that is not a number; what was saved stays."""
