"""What a result file says of the run that made it."""

from __future__ import annotations

import datetime
import platform
from typing import Any

import torch

from gateskip import kernels
from gateskip.skipping.latency import cpu_name

__all__ = ["run_header"]


def run_header(command: str) -> dict[str, Any]:
    """Versions, threads, CPU, seed, date and the command."""
    import transformers

    from gateskip import __version__

    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gateskip": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "kernels": kernels.backend(),
        "seed": torch.initial_seed(),
    }
