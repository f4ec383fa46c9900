"""Run a compiled kernel on torch's own OpenMP threads.

A second thread pool would fight with torch's, whose idle threads spin for a while after every
operation. GNU's and Intel's OpenMP both export ``GOMP_parallel``; where torch uses neither, kernels
run on the calling thread.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Kernel", "integers"]

Ints = NDArray[np.int64]


def _openmp() -> Any:
    """The OpenMP runtime that torch has loaded, or None."""
    maps = Path("/proc/self/maps")
    paths: set[str] = set()
    if maps.exists():
        paths = {
            line.split()[-1]
            for line in maps.read_text().splitlines()
            if "libgomp" in line or "libiomp5" in line
        }
    # torch's own copy first: a second runtime in the process is not the one that its threads use.
    for path in sorted(paths, key=lambda p: "torch" not in p):
        library = ctypes.CDLL(path)
        if hasattr(library, "GOMP_parallel") and hasattr(library, "GOMP_barrier"):
            library.GOMP_parallel.restype = None
            library.GOMP_parallel.argtypes = [
                ctypes.c_void_p,
                ctypes.c_void_p,
                ctypes.c_uint,
                ctypes.c_uint,
            ]
            return library
    return None


_RUNTIME = _openmp()


def _address(name: str) -> int:
    if _RUNTIME is None:
        return 0
    return ctypes.cast(getattr(_RUNTIME, name), ctypes.c_void_p).value or 0


#: Addresses that every kernel gets first: thread number, number of threads, barrier.
TEAM = (_address("omp_get_thread_num"), _address("omp_get_num_threads"), _address("GOMP_barrier"))


def integers(*values: int) -> Ints:
    """A kernel's arguments: the team's addresses, then ``values``."""
    return np.array((*TEAM, *values), dtype=np.int64)


class Kernel:
    """One compiled kernel in its bfloat16 and float32 forms, each ``void(int64*)``."""

    def __init__(self, bf16: Any, f32: Any) -> None:
        self._address = {torch.bfloat16: bf16.address, torch.float32: f32.address}
        self._direct = {torch.bfloat16: bf16.ctypes, torch.float32: f32.ctypes}

    def __call__(self, dtype: torch.dtype, arguments: Ints, *, work: int) -> None:
        """Run with at most ``work`` threads; ``arguments`` come from :func:`integers`."""
        threads = min(torch.get_num_threads(), work)
        if _RUNTIME is None or threads <= 1:
            self._direct[dtype](arguments.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)))
            return
        _RUNTIME.GOMP_parallel(self._address[dtype], arguments.ctypes.data, threads, 0)
