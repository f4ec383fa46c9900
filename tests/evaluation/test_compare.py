"""A comparison's rows are those that each method gives by itself; the dense model runs once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import gateskip
from gateskip import methods
from gateskip.config import Budget, GateConfig
from gateskip.errors import AttachError, CheckpointError, ConfigError, DataError
from gateskip.evaluation import compare as module
from gateskip.evaluation.compare import CompareRow, beaten_by_random, compare, grouped
from gateskip.evaluation.quality import Evaluation, evaluate
from gateskip.evaluation.statistics import t_interval
from models import random_ids, tiny

FIT = list(random_ids(60, 64, seed=1))
TO_FIT, TO_CALIBRATE = [ids for n, ids in enumerate(FIT) if n % 3 != 2], FIT[2::3]
TEXTS = list(random_ids(6, 40, seed=2))
BUDGETS = [Budget(compute=0.85), Budget(keep=0.7)]
CONFIG = GateConfig(rank=4, compensation_rank=4)
GIVEN: dict[str, Any] = {"budgets": BUDGETS, "config": CONFIG}


def compared(model: Any = None, **options: Any) -> list[CompareRow]:
    return compare(tiny() if model is None else model, TEXTS, FIT, **(GIVEN | options))


def figures(rows: list[Any]) -> list[tuple[float, ...]]:
    return [(r.macs_saved, r.skip_rate, r.loss, r.perplexity, r.agreement, r.tokens) for r in rows]


def test_rows_are_those_of_each_method_alone() -> None:
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    names = ("gateskip", "random", "shortgpt", "position")
    rows = compared(model, methods=names, seeds=(0, 3))
    assert [(r.method, r.seed, r.budget) for r in rows] == [
        ("dense", None, ""),
        ("gateskip", None, "compute=0.85"), ("gateskip", None, "keep=0.7"),
        ("random", 0, "compute=0.85"), ("random", 0, "keep=0.7"),
        ("random", 3, "compute=0.85"), ("random", 3, "keep=0.7"),
        ("shortgpt", None, "compute=0.85"), ("shortgpt", None, "keep=0.7"),
        ("position", None, "compute=0.85"), ("position", None, "keep=0.7"),
    ]  # fmt: skip
    assert {r.error for r in rows} == {None}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    with pytest.raises(AttachError):
        gateskip.set_budget(model, keep=0.5)  # as it was given

    fitted = gateskip.attach(tiny(), CONFIG)
    gateskip.fit(fitted, TO_FIT)
    position = methods.apply("position", copy.deepcopy(fitted), TO_CALIBRATE)
    gateskip.calibrate(fitted, TO_CALIBRATE)
    alone = [fitted, *(methods.apply("random", tiny(), TO_CALIBRATE, seed=s) for s in (0, 3))]
    alone += [methods.apply("shortgpt", tiny(), TO_CALIBRATE), position]
    expected = evaluate(fitted, TEXTS)
    for one in alone:
        expected += evaluate(one, TEXTS, budgets=BUDGETS)[1:]
    assert figures(rows) == figures(expected)
    assert [r.loss_over_dense for r in rows if r.loss is not None] == [
        r.loss - expected[0].loss for r in expected
    ]
    again = compared(model, methods=names, seeds=(0, 3, 0), budgets=[*BUDGETS, BUDGETS[0]])
    assert again == rows, "deterministic; what is asked twice is measured once"


def test_nothing_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fit, arm = module.fit, Evaluation._run

    def fitting(*args: Any, **options: Any) -> Any:
        done.append("fit")
        return fit(*args, **options)

    def running(self: Any, model: Any, budget: Any, best: Any) -> Any:
        done.append("dense" if budget is None else "at")
        return arm(self, model, budget, best)

    monkeypatch.setattr(module, "fit", fitting)
    monkeypatch.setattr(Evaluation, "_run", running)
    monkeypatch.setattr(methods.table, "fit", lambda *_: pytest.fail("fitted again"))
    compared(methods=("gateskip", "position", "token_identity", "every_second"), seeds=(0, 1, 2))
    assert sorted(done) == ["at"] * 8 + ["dense", "fit"]


def test_saved_gates_are_further_rows(tmp_path: Path) -> None:
    fitted = gateskip.attach(tiny(), CONFIG)
    gateskip.fit(fitted, FIT)
    gateskip.save(fitted, tmp_path / "bare")
    gateskip.calibrate(fitted, FIT)
    gateskip.save(fitted, tmp_path / "mine")
    model = tiny()
    gates = {"mine": tmp_path / "mine", "bare": tmp_path / "bare"}
    dense, own, other, *rest = compared(model, methods=(), gates=gates)
    assert figures([dense, own, other]) == figures(evaluate(fitted, TEXTS, budgets=BUDGETS))
    assert (own.method, own.seed) == ("mine", None)
    assert all("bare: budget" in (r.error or "") and "calibrate" in (r.error or "") for r in rest)
    assert len(rest) == 2
    wrong = tiny("qwen2")
    with pytest.raises(CheckpointError, match="was made for a base"):
        compared(wrong, methods=("every_second",), gates=gates)


def test_others_go_on() -> None:
    rows = compared(
        tiny("gpt2"), methods=("gate_norm", "every_second"),
        budgets=[Budget(compute=0.01), Budget(compute=0.8)],
    )  # fmt: skip
    assert [(r.method, r.budget, r.loss is None) for r in rows] == [
        ("dense", "", False), ("gate_norm", "", True), ("every_second", "compute=0.01", True),
        ("every_second", "compute=0.8", False),
    ]  # fmt: skip
    assert "gate_norm" in (rows[1].error or "")
    assert "q_proj" in (rows[1].error or "")
    assert (rows[2].error or "").startswith("every_second: ")
    assert "floor" in (rows[2].error or "")
    assert [g.method for g in grouped(rows)] == ["dense", "every_second"]


def test_errors_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Evaluation", lambda *_, **__: pytest.fail("work began"))
    for name, close in (("gate_nrom", "gate_norm"), ("gateskp", "gateskip")):
        with pytest.raises(ConfigError, match=f"Did you mean '{close}'"):
            compared(methods=("random", name))
    with pytest.raises(ConfigError, match="name of two rows"):
        compared(methods=("random", "random"))
    with pytest.raises(ConfigError, match="name of two rows"):
        compared(methods=("random",), gates={"dense": "folder"})
    with pytest.raises(ConfigError, match="compares nothing"):
        compared(methods=())
    with pytest.raises(ConfigError, match="budgets"):
        compared(budgets=[])
    with pytest.raises(ConfigError, match="seeds"):
        compared(seeds=())
    with pytest.raises(CheckpointError):
        compared(methods=(), gates={"none": "no/such/folder"})
    with pytest.raises(AttachError, match="already"):
        compared(gateskip.attach(tiny()))


def test_too_little_text_stops_it() -> None:
    with pytest.raises(DataError, match="at least 1000"):
        compared(methods=("every_second", "random"), fit_tokens=200)


def row(method: str, saved: float, loss: float, seed: int | None = None) -> CompareRow:
    return CompareRow(
        method, seed, f"compute={1 - saved:g}", saved, saved, loss, loss - 1.0, 2.0, 0.5, 10
    )


def test_seeds_become_means() -> None:
    rows = [row("random", 0.2, 2.0 + seed, seed) for seed in range(3)] + [row("mine", 0.2, 1.5)]
    random, mine = grouped(rows)
    assert random.loss.interval == t_interval([2.0, 3.0, 4.0])
    assert random.loss_over_dense == pytest.approx(2.0)
    assert mine.loss.interval is None
    assert (mine.macs_saved, mine.agreement) == (0.2, 0.5)


def test_what_random_matches() -> None:
    rows = [
        CompareRow("dense", None, "", 0.0, 0.0, 1.0, 0.0, 2.7, 1.0, 10),
        row("random", 0.1, 1.5), row("random", 0.3, 3.0), row("better", 0.2, 1.4),
        row("between", 0.2, 2.0), row("as much", 0.3, 3.0), row("saves more", 0.4, 9.0),
        row("useless", 0.1, 3.5),
    ]  # fmt: skip
    assert [g.method for g in beaten_by_random(grouped(rows))] == ["as much", "useless"]
    assert beaten_by_random(grouped([row("mine", 0.2, 9.0)])) == []
