"""The Triton kernels: in the interpreter everywhere, on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gateskip
from gateskip import kernels

HERE = Path(__file__).resolve().parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@needs_triton
def test_interpreted_kernels_are_torch_operations() -> None:
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "interpreted.py")],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("same:") == 13


@needs_triton
def test_triton_does_not_run_on_a_cpu() -> None:
    with kernels.using("triton"):
        assert kernels.backend() == "triton"
        assert not kernels.interpreted()


def test_unknown_backend() -> None:
    with pytest.raises(gateskip.errors.ConfigError, match="cuda"), kernels.using("cuda"):
        pass
