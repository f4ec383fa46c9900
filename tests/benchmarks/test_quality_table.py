"""Joining results over seeds."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "quality.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quality_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(arm: str, seed: int | None, loss: float, compute: float | None = None) -> dict[str, object]:
    return {
        "arm": arm, "data": "text", "seed": seed, "compute": compute, "keep": None, "loss": loss,
        "macs_saved": 0.0 if compute is None else 1 - compute,
    }  # fmt: skip


def test_interval_is_students(script: ModuleType) -> None:
    assert script.interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    assert script.interval([1.0]) == math.inf


def test_joined_and_summed_up(script: ModuleType) -> None:
    files = [
        {
            "header": {"command": f"seed {seed}"},
            "rows": [row("dense", None, 2.0), row("gateskip", seed, 1.0 + seed, 0.75)],
        }
        for seed in range(3)
    ]
    files.append({"header": {"command": "c"}, "rows": [row("control", 0, 0.5)]})
    found = script.joined(files)
    assert [r["arm"] for r in found["rows"]].count("dense") == 1
    assert found["header"]["of"] == ["c", "seed 0", "seed 1", "seed 2"]
    lines = script.summary(found["rows"])
    (line,) = [text for text in lines if "gateskip" in text]
    assert line == "| text | gateskip | 0.75 | 25.0% | 2.000 ± 2.484 | 4.000 |"
