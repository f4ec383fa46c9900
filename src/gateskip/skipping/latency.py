"""How long a machine takes at every budget, as measured there; knows nothing of how.

A record belongs to the machine that made it and to the thresholds that it was made with.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import platform
from pathlib import Path
from typing import Any

import torch

from gateskip import kernels
from gateskip.errors import CheckpointError

__all__ = ["LatencyRecord", "cpu_name", "this_machine"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LatencyRecord:
    """Seconds per token at some of a table's budgets.

    Attributes:
        machine: as :func:`this_machine` says. weight_bytes: bytes of one stored weight.
        prompt, new, batch: tokens of a prompt, tokens decoded, rows: what was timed.
        keep: shares of pairs kept, descending from 1. prefill, decode: seconds per token at each.
        dense_prefill, dense_decode: seconds per token of the dense model in the same run.
    """

    machine: str
    weight_bytes: int
    prompt: int
    new: int
    batch: int
    keep: tuple[float, ...]
    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    dense_prefill: float
    dense_decode: float

    def shares(self, workload: tuple[int, int] | None) -> tuple[float, ...]:
        """Time of a workload at each ``keep``, as a share of the dense model's.

        Never rises as less is kept: where a cheaper budget was measured slower, its time counts
        for the dearer one, so that what is promised is kept by both.
        """
        prompt, new = workload or (self.prompt, self.new)
        dense = prompt * self.dense_prefill + new * self.dense_decode
        times = [
            (prompt * a + new * b) / dense for a, b in zip(self.prefill, self.decode, strict=True)
        ]
        return tuple(reversed(list(itertools.accumulate(reversed(times), max))))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LatencyRecord:
        """Rebuild from ``dataclasses.asdict``. Raises CheckpointError when fields are missing."""
        try:
            given: dict[str, Any] = {
                key: tuple(v) if isinstance(v, list) else v for key, v in data.items()
            }
            return cls(**given)
        except TypeError as error:
            raise CheckpointError(
                f"latency record is damaged ({error}); measure again with gateskip latency."
            ) from error


def this_machine() -> str:
    """CPU, threads and kernels of this process, and the GPU where there is one."""
    parts = [cpu_name(), f"{torch.get_num_threads()} threads", kernels.backend()]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


@functools.cache
def cpu_name() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
