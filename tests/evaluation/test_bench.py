"""The benchmark's fields, its alternation and its arithmetic; never its times."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import gateskip
from gateskip.config import Budget
from gateskip.data import text_windows
from gateskip.errors import BudgetError, ConfigError, DataError
from gateskip.evaluation import bench
from gateskip.evaluation.bench import print_bench, run_bench
from gateskip.evaluation.bench_gates import bench_gates
from gateskip.skipping.state import state_of
from models import gated, random_ids, tiny, with_table

FIELDS = [
    "model", "arm", "phase", "dtype", "batch", "prompt_tokens", "new_tokens", "keep", "compute",
    "skip_rate", "macs_dense", "macs_spent", "bytes_dense", "bytes_spent", "seconds_median",
    "seconds_iqr", "speedup_vs_dense", "efficiency", "peak_rss_bytes",
]  # fmt: skip
BUDGETS = [Budget(keep=0.5), Budget(compute=0.8)]


@pytest.fixture(scope="module")
def model() -> Any:
    return with_table(gated(compensation="low_rank"))


@pytest.fixture(scope="module")
def result(model: Any) -> dict[str, Any]:
    return run_bench(
        model, random_ids(2, 14), budgets=BUDGETS, new_tokens=4, repeats=2, compiled=False
    )


def test_fields_and_arms(result: dict[str, Any]) -> None:
    rows = result["rows"]
    assert all(list(row) == FIELDS for row in rows)
    arms = ["dense_eager", "gated_masked", *["gated_compacted"] * 3]
    assert [(r["phase"], r["arm"]) for r in rows] == [
        (phase, arm) for phase in ("prefill", "decode") for arm in arms
    ]
    assert [r["batch"] for r in rows] == [2] * 5 + [1] * 5
    assert {r["prompt_tokens"] for r in rows} == {10}
    compacted = [r for r in rows if r["arm"] == "gated_compacted"]
    assert [(r["keep"], r["compute"]) for r in compacted[:3]] == [
        (1.0, None), (0.5, None), (None, 0.8)
    ]  # fmt: skip
    assert {"torch", "transformers", "gateskip", "threads", "cpu", "command", "date"} <= set(
        result["header"]
    )


def test_arithmetic(model: Any, result: dict[str, Any]) -> None:
    shape = state_of(model).shape
    for row in result["rows"]:
        logits = row["batch"] if row["phase"] == "prefill" else row["new_tokens"]
        unit = "macs" if row["phase"] == "prefill" else "bytes"
        head = logits * shape.macs_lm_head * (1 if unit == "macs" else shape.weight_bytes)
        saved = (row[f"{unit}_dense"] + head) / (row[f"{unit}_spent"] + head)
        assert row["efficiency"] == pytest.approx(row["speedup_vs_dense"] / saved)
        if row["arm"] == "dense_eager":
            assert row["speedup_vs_dense"] == 1.0
            assert row["macs_spent"] == row["macs_dense"]
        if row["keep"] == 0.5 and row["arm"] == "gated_compacted":
            assert row["skip_rate"] > 0
            assert row["macs_spent"] < row["macs_dense"]


def test_arms_alternate(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[Any] = []

    def clock(model: Any, arm: Any, *_: Any) -> float:
        order.append((arm.name, arm.budget))
        return 1.0

    monkeypatch.setattr(bench, "_time", clock)
    run_bench(
        model, random_ids(1, 8), budgets=BUDGETS[:1], new_tokens=2, repeats=4, compiled=False,
        phases=["prefill"],
    )  # fmt: skip
    arms = 4
    rounds = [order[n * arms : (n + 1) * arms] for n in range(5)]
    assert all(len(set(each)) == arms for each in rounds), "each arm once in every round"
    assert rounds[1] == list(reversed(rounds[2])), "no arm always comes first"


def test_compiled_dense(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m, **kw: compile_(m, backend="eager", **kw))
    found = run_bench(model, random_ids(1, 8), budgets=[], new_tokens=2, repeats=1, masked=False)
    assert [r["arm"] for r in found["rows"]] == [
        "dense_eager", "dense_compiled", "gated_compacted"
    ] * 2  # fmt: skip

    def broken(*_: Any, **__: Any) -> Any:
        def fail(**_: Any) -> None:
            raise RuntimeError("no C++ compiler\ndetails")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    found = run_bench(model, random_ids(1, 8), budgets=[], new_tokens=2, repeats=1, masked=False)
    assert {r["arm"] for r in found["rows"]} == {"dense_eager", "gated_compacted"}
    assert sum("torch.compile failed: no C++ compiler" in n for n in found["header"]["notes"]) == 2


def test_the_model_is_left_as_it_was(model: Any, result: dict[str, Any]) -> None:
    assert len(model.model._forward_pre_hooks) == 1
    assert state_of(model).default_budget is None


def test_print(result: dict[str, Any]) -> None:
    stream = io.StringIO()
    print_bench(result, Console(file=stream, width=140))
    assert "gated_compacted" in stream.getvalue()


def test_errors_come_first(model: Any) -> None:
    ids = random_ids(1, 8)
    with pytest.raises(BudgetError, match="floor"):
        run_bench(model, ids, budgets=[Budget(keep=0.01)], new_tokens=2)
    with pytest.raises(ConfigError, match="columns"):
        run_bench(model, ids, budgets=[], new_tokens=8)
    with pytest.raises(ConfigError, match="repeats"):
        run_bench(model, ids, budgets=[], new_tokens=2, repeats=0)


def test_from_files(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "base")
    gateskip.save(with_table(gated()), tmp_path / "gates")
    options: dict[str, Any] = {
        "budgets": BUDGETS[:1], "batch": 2, "prompt_tokens": 6, "new_tokens": 2, "repeats": 1,
        "compiled": False,
    }  # fmt: skip
    with pytest.warns(UserWarning, match="random token ids"):
        found = bench_gates(tmp_path / "gates", tmp_path / "base", **options)
    assert [r["dtype"] for r in found["rows"]] == ["bfloat16"] * 8 + ["float32"] * 8
    assert {r["model"] for r in found["rows"]} == {"base"}
    assert "random token ids, no text" in found["header"]["notes"]
    with pytest.raises(ConfigError, match="batch=0"):
        bench_gates(tmp_path / "gates", **(options | {"batch": 0}))
    with pytest.raises(ConfigError, match="dtypes='int8'"):
        bench_gates(tmp_path / "gates", dtypes=["int8"], **options)


def test_text_ids() -> None:
    texts = [random_ids(1, 5), random_ids(1, 6, seed=1)]
    found = text_windows(texts, None, (2, 5))
    assert torch.equal(found.flatten(), torch.cat([t[0] for t in texts])[:10])
    with pytest.raises(DataError, match="11 tokens"):
        text_windows(texts, None, (3, 5))
