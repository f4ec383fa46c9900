"""A table keeps its promises: shares, budgets by every measure, text that is too short."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import gateskip
from gateskip.calibration import thresholds as calibration
from gateskip.config import Budget, RowBudgets
from gateskip.costs import net_share
from gateskip.data import Batch
from gateskip.fitting import quantiles
from gateskip.fitting.closed_loop import keep_all, measure
from gateskip.retrofit.attach import gate_of, gated_branches
from gateskip.skipping.latency import LatencyRecord, this_machine
from gateskip.skipping.policy import OFF, ThresholdTable
from gateskip.skipping.state import override, state_of
from models import gated as random_gates
from models import random_ids, with_table

TEXT = [random_ids(1, 60, seed=n) for n in range(120)]
OTHER = [random_ids(1, 60, seed=1000 + n) for n in range(120)]


def gated(**options: Any) -> Any:
    """A tiny gated model that counts as fitted."""
    model = random_gates(**options)
    state_of(model).fitted = True
    return model


@pytest.fixture(scope="module")
def calibrated() -> Any:
    model = gated(compensation="low_rank", init_std=0.5)
    gateskip.calibrate(model, TEXT, grid=(0.9, 0.75, 0.6, 0.45))
    return model


def test_the_table_says_what_it_realises(calibrated: Any) -> None:
    """Rows between measured grid points, too, and branch by branch, on the text itself."""
    state = state_of(calibrated)
    table = state.policy
    ids = torch.cat(TEXT)
    batch = Batch(ids, torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool))
    for keep, compute, row, shares in zip(
        table.keep, table.compute, table.thresholds, table.shares, strict=True
    ):
        seen = measure(calibrated, [batch], dict(zip(state.branches, row, strict=True)))
        assert seen.keep == pytest.approx(keep, abs=0.01)
        assert seen.compute == pytest.approx(compute, abs=0.01)
        for key, share in zip(state.branches, shares, strict=True):
            assert seen.shares[key] == pytest.approx(share, abs=0.03)
    assert table.protected == pytest.approx(1 / 60)
    for column in zip(*table.thresholds, strict=True):
        assert all(b >= a for a, b in itertools.pairwise(column)), "I7"


def test_held_out_text_keeps_what_was_asked(calibrated: Any) -> None:
    rows = gateskip.check_calibration(calibrated, {"same": OTHER})
    assert len(rows) == 5
    for row in rows:
        assert row.kept
        assert abs(row.keep - row.expected) < 0.01
        assert row.branch_mean <= row.branch_95 <= row.branch_worst


def test_drift_is_reported(calibrated: Any) -> None:
    same = [torch.full((1, 60), 5 + n % 3) for n in range(30)]
    budget = Budget(keep=0.7)
    rows = gateskip.check_calibration(calibrated, {"same": OTHER, "other": same}, budgets=[budget])
    drift = {row.data: abs(row.keep - row.expected) for row in rows}
    assert [row.data for row in rows if not row.kept] == ["other"]
    assert drift["other"] > 0.02 > drift["same"]


def test_a_check_needs_thresholds_and_text(calibrated: Any) -> None:
    with pytest.raises(gateskip.BudgetError, match="calibrate"):
        gateskip.check_calibration(gated(), {"a": OTHER})
    with pytest.raises(gateskip.DataError, match="1000"):
        gateskip.check_calibration(calibrated, {"a": OTHER[:3]})


def test_streamed_calibration_is_close_to_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gated(init_std=0.5)
    exact = gateskip.calibrate(model, TEXT, grid=(0.8, 0.5))
    assert exact.rank_error == 0.0
    monkeypatch.setattr(quantiles.Quantiles.__init__, "__defaults__", (256,))
    streamed = gateskip.calibrate(model, TEXT, grid=(0.8, 0.5))
    assert 0.0 < streamed.rank_error < 0.1
    assert streamed.keep[-1] == pytest.approx(exact.keep[-1], abs=0.02)
    assert streamed.keep[0] == 1.0, "the lowest row keeps everybody, whatever was thinned out"


def test_text_that_is_too_short_for_the_grid() -> None:
    with pytest.raises(gateskip.DataError, match=r"steps of 0\.001.*at least 10000"):
        gateskip.calibrate(gated(), TEXT, grid=(0.9, 0.899))
    for grid in ((), (0.5, 0.6), (1.0, 0.5), (0.5, 0.0)):
        with pytest.raises(gateskip.ConfigError, match="grid"):
            gateskip.calibrate(gated(), TEXT, grid=grid)


def test_scores_that_are_not_numbers() -> None:
    model = gated()
    module = next(iter(gated_branches(model, state_of(model).family).values()))
    with torch.no_grad():
        next(gate_of(module).parameters()).fill_(math.nan)
    with pytest.raises(gateskip.DataError, match="not finite"):
        gateskip.calibrate(model, TEXT)


def test_a_budget_below_the_floor_says_what_is_protected(calibrated: Any) -> None:
    with pytest.raises(gateskip.BudgetError, match=r"below the floor 0\.4.*longer grid"):
        gateskip.set_budget(calibrated, keep=0.2)
    with pytest.raises(gateskip.BudgetError, match=r"1\.7% of the tokens are protected"):
        gateskip.set_budget(calibrated, keep=0.01)


def test_compute_of_a_workload(calibrated: Any) -> None:
    """Attention costs more in long texts, so a budget keeps another number of tokens there."""
    state = state_of(calibrated)
    own = (60, 0)
    at_home = state.resolve(Budget(compute=0.8))
    same = state.resolve(Budget(compute=0.8, workload=own))
    for key, value in at_home.items():
        assert same[key] == pytest.approx(value, abs=2e-3)
    costs = state.costs()
    for length in (60, 240, 4000):
        budget = Budget(compute=0.7, workload=(length // 2, length // 2))
        spent = net_share(costs, state.expected(budget), (length + 1) / 2)
        assert spent == pytest.approx(0.7, abs=0.01)
    kept = [
        sum(state.expected(Budget(compute=0.7, workload=(length, 0))).values())
        for length in (60, 4000)
    ]
    assert kept[0] != pytest.approx(kept[1], abs=0.05)


def record(**changes: Any) -> LatencyRecord:
    given: dict[str, Any] = {
        "machine": this_machine(), "weight_bytes": 4, "prompt": 100, "new": 50, "batch": 1,
        "keep": (1.0, 0.75, 0.45), "prefill": (1.0, 0.9, 0.5), "decode": (0.8, 0.6, 0.7),
        "dense_prefill": 1.0, "dense_decode": 1.0,
    }  # fmt: skip
    return LatencyRecord(**(given | changes))


def test_latency_budgets() -> None:
    model = with_table(gated())
    state = state_of(model)
    with pytest.raises(gateskip.BudgetError, match="nothing was measured on this machine"):
        gateskip.set_budget(model, latency=0.9)
    state.latency = (record(machine="another"), record(keep=(1.0, 0.75, 0.25)))
    state.latency += (record(weight_bytes=2, prefill=(0.1, 0.1, 0.1), keep=(1.0, 0.75, 0.25)),)
    # decode alone: 0.8, 0.7 (the dearer of the two below), 0.7
    assert state.resolve(Budget(latency=0.9, workload=(0, 10))) is None, "dense is slower"
    prefill = state.resolve(Budget(latency=0.9, workload=(10, 0)))
    assert prefill == pytest.approx(state.resolve(Budget(keep=0.75)))
    half = state.resolve(Budget(latency=0.75, workload=(0, 1)))
    assert half == pytest.approx(state.resolve(Budget(keep=0.875)))
    mixed = record(keep=(1.0, 0.75, 0.25)).shares(None)
    assert mixed == pytest.approx(((100 + 40) / 150, (90 + 30) / 150, (50 + 35) / 150))
    with pytest.raises(gateskip.BudgetError, match="below the floor"):
        gateskip.set_budget(model, latency=0.3)


def test_measured_latency_replaces_what_was_measured_here() -> None:
    model = with_table(gated())
    found = gateskip.measure_latency(model, TEXT, prompt=24, new=4, repeats=2, progress=False)
    assert found.keep[0] == 1.0
    assert found.keep[-1] == 0.25
    assert min(*found.prefill, *found.decode, found.dense_prefill, found.dense_decode) > 0
    assert state_of(model).latency == (found,)
    again = gateskip.measure_latency(model, TEXT, prompt=16, new=4, repeats=1)
    assert state_of(model).latency == (again,), "one record of a machine"
    assert LatencyRecord.from_json(json.loads(json.dumps(dataclasses.asdict(again)))) == again
    gateskip.calibrate(model, TEXT, grid=(0.8,))
    assert state_of(model).latency == (), "of other thresholds"
    for bad in ({"prompt": 0}, {"repeats": 0}):
        with pytest.raises(gateskip.ConfigError, match="at least 1"):
            gateskip.measure_latency(model, TEXT, **bad)
    with pytest.raises(gateskip.DataError, match="Give more text"):
        gateskip.measure_latency(model, TEXT[:2], prompt=200)


def test_units_and_workloads_are_checked() -> None:
    for bad in (
        {"keep": 0.5, "latency": 0.5}, {}, {"latency": 0.0}, {"compute": 0.5, "workload": (0, 0)},
        {"keep": 0.5, "workload": (5, 5)}, {"compute": 0.5, "workload": (5,)},
        {"latency": 0.5, "workload": (-1, 5)}, {"workload": (5, 5)},
    ):  # fmt: skip
        with pytest.raises(gateskip.BudgetError):
            Budget(**bad)
    budget = Budget.of({"compute": 0.5, "workload": [512, 128]})
    assert budget == Budget(compute=0.5, workload=(512, 128))
    assert Budget.of(budget.to_json()) == budget
    rows = Budget.of({"latency": [0.5, 1.0], "workload": (8, 8)})
    assert isinstance(rows, RowBudgets)
    assert [row.workload for row in rows.rows] == [(8, 8)] * 2


@torch.no_grad()
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_a_branch_that_is_off_computes_nobody(backend: str) -> None:
    """In prefill, decoding alone and in a batch; protected tokens, too."""
    from gateskip import kernels

    if backend == "numba" and not kernels.available():
        pytest.skip("numba is not installed")
    model = gated()
    state = state_of(model)
    off = [(1, "attention"), (2, "mlp")]
    thresholds = {key: OFF if key in off else -math.inf for key in state.branches}
    for batch in (1, 3):
        ids = random_ids(batch, 8)
        with kernels.using(backend), override(state, thresholds=thresholds):
            with gateskip.trace(model) as trace, gateskip.execution(model, "compacted"):
                whole = model(ids).logits
                first = model(ids[:, :1], use_cache=True)  # one protected token is decoded
                cache, parts = first.cache, [first.logits]
                for at in range(1, 8):
                    parts.append(model(ids[:, at : at + 1], cache=cache, use_cache=True).logits)
            with gateskip.execution(model, "masked"):
                masked = model(ids).logits
        torch.testing.assert_close(whole, masked, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
        for key, kept in trace.keep.items():
            assert all(bool(mask.any()) == (key not in off) for mask in kept)


def test_thresholds_of_another_gate_set(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        model = gated(seed=seed)
        gateskip.save(with_table(model), tmp_path / name)
    source = (tmp_path / "b" / "gateskip_config.json").read_text()
    (tmp_path / "a" / "gateskip_config.json").write_text(source)
    fresh = gateskip.detach(gated())
    with pytest.raises(gateskip.CheckpointError, match="another gate set"):
        gateskip.load(tmp_path / "a", base=fresh)
    config = json.loads(source)
    config["policy"]["thresholds"] = [row[:-1] for row in config["policy"]["thresholds"]]
    (tmp_path / "b" / "gateskip_config.json").write_text(json.dumps(config))
    with pytest.raises(gateskip.CheckpointError, match="another gate set"):
        gateskip.load(tmp_path / "b", base=gateskip.detach(gated()))


def test_a_latency_budget_of_another_machine_is_not_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_table(gated())
    state_of(model).latency = (record(keep=(1.0, 0.75, 0.25)),)
    gateskip.set_budget(model, latency=0.9, workload=(5, 0))
    gateskip.save(model, tmp_path / "g")
    loaded = gateskip.load(tmp_path / "g", base=gateskip.detach(gated()))
    assert state_of(loaded).default_budget == Budget(latency=0.9, workload=(5, 0))
    monkeypatch.setattr("gateskip.skipping.policy.this_machine", lambda: "elsewhere")
    state_module = __import__("gateskip.skipping.state", fromlist=["_thresholds"])
    state_module._thresholds.cache_clear()
    with pytest.warns(UserWarning, match="not in force"):
        loaded = gateskip.load(tmp_path / "g", base=gateskip.detach(gated()))
    assert state_of(loaded).default_budget is None


def test_old_tables_serve_all_that_they_can() -> None:
    table = state_of(with_table(gated())).policy
    data = table.to_json()
    for name in ("shares", "protected", "rank_error"):
        del data[name]
    old = ThresholdTable.from_json(json.loads(json.dumps(data)))
    assert old.resolve(Budget(compute=0.8)) == table.thresholds[1]
    with pytest.raises(gateskip.BudgetError, match="calibrate again"):
        old.resolve(Budget(compute=0.8, workload=(5, 5)), {})


def test_memory_of_a_pass_does_not_grow_with_text() -> None:
    """What a pass keeps of the text is bounded: quantiles and sums, no masks of tokens."""
    model = gated()
    ids = torch.cat(TEXT)
    batch = Batch(ids, torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool))
    seen = measure(model, [batch] * 4, keep_all(state_of(model)))
    assert {type(value) for value in seen.scores.values()} == {quantiles.Quantiles}
    held = sum(len(scores.weighted().values) for scores in seen.scores.values())
    assert held <= len(seen.scores) * 3 * quantiles.CAPACITY
    assert calibration.MINIMUM_TOKENS == 1000
