"""Fused kernels: numba on CPUs (optional: ``pip install gateskip[cpu]``), Triton on GPUs.

What surrounds the matrix products costs more than they do on a CPU with fast bfloat16 products:
conversions, norms, element-wise passes. The CPU kernels do each of them in one pass, on torch's own
threads. On a GPU a host that waits for decisions costs more than the branches: the Triton kernels
decide, skip and compute there. Without them everything runs on torch operations: same results, less
speed.

Knows of pointers and sizes only, nothing of models, gates or decisions.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import os
import struct
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gateskip.errors import ConfigError

__all__ = [
    "available",
    "backend",
    "readable",
    "real",
    "row_kernels",
    "scratch",
    "supported",
    "using",
]

BACKENDS = ("numba", "triton", "torch")

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("gateskip_kernels")


@functools.cache
def available() -> bool:
    """Whether the numba kernels can be used here; warns once where numba is broken."""
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        from gateskip.kernels import rows, token  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        warnings.warn(
            f"numba is installed but gateskip's kernels cannot use it ({error}); running on torch "
            "operations. If numba finds no place for its cache, set NUMBA_CACHE_DIR.",
            stacklevel=2,
        )
        return False
    return True


@functools.cache
def has_triton() -> bool:
    """Whether Triton's kernels can be used on a GPU."""
    return importlib.util.find_spec("triton") is not None


def scratch(size: int) -> Tensor:
    """Float32 room on the CPU for the kernels, whatever the default dtype and device are."""
    return torch.empty(size, dtype=torch.float32, device="cpu")


def interpreted() -> bool:
    """Whether Triton runs its kernels on a CPU, slowly, as its tests do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def backend(device: str = "cpu") -> str:
    """``"numba"``, ``"triton"`` or ``"torch"``: what this thread uses on a kind of device."""
    forced = _forced.get(None)
    if forced is not None:
        return forced
    if device == "cuda":
        return "triton" if has_triton() else "torch"
    return "numba" if device == "cpu" and available() else "torch"


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Use ``"numba"`` (CPU), ``"triton"`` (GPU) or ``"torch"`` for this thread and context.

    Raises:
        ConfigError: an unknown name, or a library that is not installed.
    """
    if name not in BACKENDS:
        raise ConfigError(f"kernels={name!r} must be one of {', '.join(BACKENDS)}.")
    if name == "numba" and not available():
        raise ConfigError("kernels='numba' needs numba: pip install gateskip[cpu].")
    if name == "triton" and not has_triton():
        raise ConfigError("kernels='triton' needs triton: pip install triton.")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def supported(t: Tensor) -> bool:
    """Whether the CPU kernels may read ``t``: plain, contiguous, no graph and no autocast."""
    return t.device.type == "cpu" and _plain(t) and backend() == "numba"


def readable(t: Tensor) -> bool:
    """Whether the kernels of its device may read ``t``."""
    if t.device.type == "cuda":
        return _plain(t) and backend("cuda") == "triton"
    return supported(t) or (interpreted() and backend() == "triton" and _plain(t))


def row_kernels(t: Tensor) -> Any:
    """The module of the row kernels that may read ``t``, or None: torch operations."""
    if supported(t):
        from gateskip.kernels import rows

        return rows
    if readable(t):
        from gateskip.kernels import gpu_rows

        return gpu_rows
    return None


def real(value: float) -> int:
    """A float as the integer that the CPU kernels turn back."""
    bits: int = struct.unpack("q", struct.pack("d", value))[0]
    return bits


def _plain(t: Tensor) -> bool:
    return (
        t.dtype in (torch.bfloat16, torch.float32)
        and not torch.is_grad_enabled()
        and type(t) is Tensor
        and t.is_contiguous()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(t.device.type)
    )
