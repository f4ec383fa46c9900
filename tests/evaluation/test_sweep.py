"""Sweeps: the figures of eval and bench, resumed where they stopped, fronts and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import gateskip
from gateskip.config import Budget
from gateskip.evaluation import sweep as module
from gateskip.evaluation.quality import Evaluation, evaluate
from gateskip.evaluation.sweep import Journal, SweepRow, fronts, pareto_front, sweep_gates
from gateskip.explain.pareto import plot_sweep
from models import gated, random_ids, with_table

TEXTS = [random_ids(1, 40, seed=n) for n in range(12)]
BUDGETS = [Budget(compute=1.0), Budget(keep=0.7), Budget(compute=0.6), Budget(keep=0.01)]
SETTINGS = {"data": "x", "repeats": 1}


def swept(folder: Path, said: list[str] | None = None, **options: Any) -> list[SweepRow]:
    journal = Journal(folder, SETTINGS, overwrite=False)
    given = {"budgets": BUDGETS, "prompt_tokens": 16, "new_tokens": 3, "repeats": 1} | options
    told: list[str] = [] if said is None else said
    return sweep_gates(with_table(gated()), TEXTS, None, "ours", journal, say=told.append, **given)


def test_rows_are_those_of_evaluate(tmp_path: Path) -> None:
    said: list[str] = []
    rows = swept(tmp_path, said)
    expected = evaluate(with_table(gated()), TEXTS, budgets=BUDGETS[:3])
    assert len(rows) == len(expected) == 4
    for row, wanted in zip(rows, expected, strict=True):
        assert (row.loss, row.agreement, row.tokens) == (
            wanted.loss, wanted.agreement, wanted.tokens,
        )  # fmt: skip
        assert row.compute == pytest.approx(1.0 - wanted.macs_saved)
        assert row.prefill is not None
        assert row.decode is not None
    assert (rows[0].gates, rows[0].prefill, rows[0].decode) == ("dense", 1.0, 1.0)
    assert len(said) == 1
    assert "floor" in said[0]


def test_it_resumes_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    at = Evaluation.at

    def counted(self: Evaluation, budget: Budget) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(str(budget))
        return at(self, budget)

    monkeypatch.setattr(Evaluation, "at", counted)
    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path)
    with (tmp_path / "sweep.jsonl").open("a") as stream:
        stream.write('{"kind": "quality", "gat')  # torn
    first = list(done)
    done.clear()
    rows = swept(tmp_path)
    assert done == ["compute=0.6"]
    assert first == ["compute=1", "keep=0.7"]
    monkeypatch.setattr(Evaluation, "at", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(module, "run_bench", lambda *_, **__: pytest.fail("timed again"))
    assert swept(tmp_path) == rows
    monkeypatch.setattr(module, "this_machine", lambda: "another")
    with pytest.raises(BaseException, match="timed again"):
        swept(tmp_path)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "a", SETTINGS, overwrite=False).put("quality", "ours", "", 1)
    with pytest.raises(gateskip.OutputError, match="other data, repeats"):
        Journal(tmp_path / "a", {"data": "y", "repeats": 2}, overwrite=False)
    assert Journal(tmp_path / "a", SETTINGS, overwrite=False).get("quality", "ours", "") == 1
    assert Journal(tmp_path / "a", SETTINGS, overwrite=True).lines == []
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter.txt").touch()
    with pytest.raises(gateskip.OutputError, match="no sweep's"):
        Journal(tmp_path / "b", SETTINGS, overwrite=False)


def test_pareto_front() -> None:
    assert pareto_front([]) == []
    assert pareto_front([(1, 1), (2, 2), (2, 1), (1, 1), (0.5, 3)]) == [
        True, False, False, True, True,
    ]  # fmt: skip


def rows_of(*points: tuple[str, str, float, float]) -> list[SweepRow]:
    return [
        SweepRow(gates, budget, compute, compute, loss, 1.0, 1.0, 10, compute, None)
        for gates, budget, compute, loss in points
    ]


def test_pictures_and_fronts(tmp_path: Path) -> None:
    rows = rows_of(
        ("dense", "", 1.0, 1.0), ("one", "compute=0.8", 0.8, 1.2), ("one", "compute=0.5", 0.5, 3.0),
        ("two", "compute=0.75", 0.75, 1.1), ("two", "compute=0.6", 0.6, 2.0),
    )  # fmt: skip
    found = fronts(rows)
    assert set(found) == {"compute", "prefill"}
    assert found["compute"] == [rows[0], rows[2], rows[3], rows[4]]
    png, svg = plot_sweep(rows, found, tmp_path)
    assert png.read_bytes()[:4] == b"\x89PNG"
    text = " ".join(t for t in ElementTree.parse(svg).getroot().itertext())
    for label in ("one", "two", "dense", "0.75", "loss, nats per token", "prefill time"):
        assert label in text
    assert "decode time" not in text


def test_needs_thresholds(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SETTINGS, overwrite=False)
    with pytest.raises(gateskip.BudgetError, match="calibrate"):
        sweep_gates(gated(), TEXTS, None, "ours", journal)
    lines = (tmp_path / "sweep.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"settings": SETTINGS}]
