"""Fused CPU kernels (optional: ``pip install gateskip[cpu]``).

What surrounds the matrix products costs more than they do on a CPU with fast bfloat16 products:
conversions, norms, element-wise passes. These kernels do each of them in one pass, on torch's own
threads. Without numba everything runs on torch operations: same results, less speed.

Knows of pointers and sizes only, nothing of models, gates or decisions.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from gateskip.errors import ConfigError

__all__ = ["available", "backend", "supported", "using"]

BACKENDS = ("numba", "torch")

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


def backend() -> str:
    """``"numba"`` or ``"torch"``: what this thread uses on a CPU."""
    forced = _forced.get(None)
    if forced is not None:
        return forced
    return "numba" if available() else "torch"


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Use ``"numba"`` or ``"torch"`` for this thread and context.

    Raises:
        ConfigError: an unknown name, or ``"numba"`` where it is not installed.
    """
    if name not in BACKENDS:
        raise ConfigError(f"kernels={name!r} must be one of {', '.join(BACKENDS)}.")
    if name == "numba" and not available():
        raise ConfigError("kernels='numba' needs numba: pip install gateskip[cpu].")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def supported(t: Tensor) -> bool:
    """Whether kernels may read ``t``: a plain, contiguous CPU tensor, no graph and no autocast."""
    return (
        t.device.type == "cpu"
        and t.dtype in (torch.bfloat16, torch.float32)
        and not torch.is_grad_enabled()
        and type(t) is Tensor
        and t.is_contiguous()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and backend() == "numba"
    )
