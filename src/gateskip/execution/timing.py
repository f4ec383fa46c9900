"""The two phases of generating text, as they are timed everywhere: prefill and decoding apart.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["clock", "decode", "keep_freed_memory", "peak_rss", "prefill"]


def prefill(runner: Any, ids: Tensor, prompt: int) -> Any:
    """The output of one call on the first ``prompt`` ids of every row ``[B, T]``."""
    return runner(input_ids=ids[:, :prompt], use_cache=True, logits_to_keep=1)


def decode(runner: Any, ids: Tensor, prompt: int, cache: Any) -> None:
    """Feed the ids after the prompt one by one."""
    for at in range(prompt, ids.shape[1]):
        mask = torch.ones(ids.shape[0], at + 1, dtype=torch.long, device=ids.device)
        runner(input_ids=ids[:, at : at + 1], attention_mask=mask, cache=cache, use_cache=True)


def clock(step: Callable[[], Any], ids: Tensor) -> float:
    """Seconds of one step on the device of ``ids``."""

    def wait() -> None:
        if ids.is_cuda:
            torch.cuda.synchronize()

    wait()
    started = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - started


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory; False where there is no glibc.

    Otherwise it returns large tensors to the system, or does not, depending on what ran before: the
    same dense prefill took 0.54 or 0.81 s. Holds for the rest of the process.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    trim, top_pad, mmap_threshold = -1, -2, -3
    wanted = ((trim, 2**31 - 1), (top_pad, 64 << 20), (mmap_threshold, 32 << 20))
    return all([library.mallopt(name, value) == 1 for name, value in wanted])


def peak_rss(step: Callable[[], Any]) -> int | None:
    """Peak resident bytes of one run, where Linux lets the mark be reset; None elsewhere."""
    mark = Path("/proc/self/clear_refs")
    if not mark.exists():
        return None
    if not os.access(mark, os.W_OK):
        return None
    with contextlib.suppress(OSError):  # give back what is free, so that it is not counted
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    mark.write_text("5")
    step()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
