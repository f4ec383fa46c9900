"""gateskip: let any pretrained decoder-only language model skip compute token by token.

Importing the package is light: torch and transformers are imported when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gateskip.calibration.check import check_calibration
    from gateskip.calibration.latency import measure_latency
    from gateskip.calibration.risk import RiskReport, control_risk
    from gateskip.calibration.thresholds import calibrate
    from gateskip.config import Budget, GateConfig
    from gateskip.decoding import (
        DecodingStats,
        draft_view,
        generate_scheduled,
        generate_speculative,
        generate_stitched,
        generate_synchronised,
        tune_draft,
    )
    from gateskip.errors import (
        AttachError,
        BudgetError,
        CheckpointError,
        ConfigError,
        DataError,
        GateSkipError,
        OutputError,
        TrainingError,
        UnsupportedError,
    )
    from gateskip.execution.api import (
        attach,
        budget,
        detach,
        execution,
        hold_budget,
        set_budget,
        trace,
    )
    from gateskip.execution.checkpoint import load, save
    from gateskip.execution.compiled import compile_masked
    from gateskip.execution.export import export_static
    from gateskip.execution.hub import push_to_hub
    from gateskip.execution.top_k_attention import set_top_k_attention
    from gateskip.fitting.closed_form import FitReport, fit
    from gateskip.training import GateSkipTrainer, GateSkipTrainingConfig

__version__ = "0.1.0"

__all__ = [
    "AttachError",
    "Budget",
    "BudgetError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DecodingStats",
    "FitReport",
    "GateConfig",
    "GateSkipError",
    "GateSkipTrainer",
    "GateSkipTrainingConfig",
    "OutputError",
    "RiskReport",
    "TrainingError",
    "UnsupportedError",
    "attach",
    "budget",
    "calibrate",
    "check_calibration",
    "compile_masked",
    "control_risk",
    "detach",
    "draft_view",
    "execution",
    "export_static",
    "fit",
    "generate_scheduled",
    "generate_speculative",
    "generate_stitched",
    "generate_synchronised",
    "hold_budget",
    "load",
    "measure_latency",
    "push_to_hub",
    "save",
    "set_budget",
    "set_top_k_attention",
    "trace",
    "tune_draft",
]

_HOMES = {
    "gateskip.calibration.check": ("check_calibration",),
    "gateskip.calibration.latency": ("measure_latency",),
    "gateskip.calibration.risk": ("RiskReport", "control_risk"),
    "gateskip.calibration.thresholds": ("calibrate",),
    "gateskip.config": ("Budget", "GateConfig"),
    "gateskip.decoding": (
        "DecodingStats", "draft_view", "generate_scheduled", "generate_speculative",
        "generate_stitched", "generate_synchronised", "tune_draft",
    ),
    "gateskip.errors": tuple(n for n in __all__ if n.endswith("Error")),
    "gateskip.execution.api": (
        "attach", "budget", "detach", "execution", "hold_budget", "set_budget", "trace",
    ),
    "gateskip.execution.checkpoint": ("load", "save"),
    "gateskip.execution.compiled": ("compile_masked",),
    "gateskip.execution.export": ("export_static",),
    "gateskip.execution.hub": ("push_to_hub",),
    "gateskip.execution.top_k_attention": ("set_top_k_attention",),
    "gateskip.fitting.closed_form": ("FitReport", "fit"),
    "gateskip.training": ("GateSkipTrainer", "GateSkipTrainingConfig"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'gateskip' has no attribute {name!r}")
    # Set every public name of the home at once: importing the subpackage ``gateskip.execution``
    # would otherwise leave the package, not the function, under the name ``execution``.
    home = importlib.import_module(_HOME_OF[name])
    for other in _HOMES[_HOME_OF[name]]:
        globals()[other] = getattr(home, other)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
