"""Loading of models by commands."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from gateskip.cli.loading import load_base, load_gated


@pytest.mark.parametrize(
    ("machine", "capability", "dtype", "slow"),
    [("x86_64", "AVX2", "bfloat16", True), ("AMD64", "DEFAULT", "bfloat16", True),
     ("x86_64", "AVX2", "float32", False), ("x86_64", "AVX512", "bfloat16", False),
     ("arm64", "DEFAULT", "bfloat16", False)],
)  # fmt: skip
def test_slow_bfloat16_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, machine: str, capability: str, dtype: str,
    slow: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    base, gates = str(folder / "base"), str(folder / "gates")
    for load in (lambda: load_base(base, dtype), lambda: load_gated(gates, base, dtype)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model, _ = load()
        assert str(model.dtype) == f"torch.{dtype}"
        assert ["--dtype float32" in str(one.message) for one in said] == [True] * slow
