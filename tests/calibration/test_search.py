"""Searched allocations: better than a bad start, nested, and blind or not to interactions."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

import gateskip
from gateskip.calibration import search as module
from gateskip.calibration.search import _hull, measure_loss, search
from gateskip.data import encode, to_batches
from gateskip.fitting.closed_loop import Allocation, keep_all
from gateskip.retrofit.attach import gate_of, gated_branches, layers_of
from gateskip.skipping.policy import OFF
from gateskip.skipping.state import state_of
from gateskip.training.recalibration import recalibrate
from models import gated, random_ids

WRONG = (1, "mlp")
BIAS = 1.5


@pytest.fixture(scope="module")
def misled() -> Any:
    """Gates of one branch say that it matters a lot, although it does nothing at all."""
    model = gated(init_std=0.5)
    state = state_of(model)
    state.fitted = True
    layer = layers_of(model, state.family)[WRONG[0]]
    with torch.no_grad():
        layer.mlp.down_proj.weight.zero_()
        gate_of(gated_branches(model, state.family)[WRONG]).bias += BIAS
    return model


@pytest.fixture(scope="module")
def text(misled: Any) -> list[torch.Tensor]:
    """What the model itself writes, so that skipping a branch that does something costs."""
    torch.manual_seed(0)
    ids = misled.generate(
        random_ids(40, 2), max_new_tokens=58, do_sample=True, pad_token_id=0, eos_token_id=None,
        temperature=0.5,
    )  # fmt: skip
    return list(ids.split(1))


def loss_at(model: Any, text: Any, split: Allocation, target: float) -> tuple[float, float]:
    batches = to_batches(encode(text))
    at = measure_loss(model, batches, keep_all(state_of(model)))
    for keep in torch.linspace(1.0, 0.3, 29).tolist():
        at = measure_loss(model, batches, split.thresholds(at.seen, keep))
        if at.seen.compute <= target:
            break
    return at.mean, at.seen.compute


@pytest.mark.parametrize("method", module.SEARCHES)
def test_a_search_finds_what_gates_do_not_know(misled: Any, text: Any, method: str) -> None:
    state = state_of(misled)
    batches = to_batches(encode(text))
    start = Allocation.of(state, "global", True, 30.0)
    count = []
    found = search(
        misled, batches, start, method=method, anchors=(0.85, 0.7), advance=lambda: count.append(1)
    )
    assert found.name == "searched"
    assert 0 < len(count) <= module.passes_of(method, len(state.branches), 2, 2)
    whole = measure_loss(misled, batches, keep_all(state))
    for keep in (0.85, 0.75):
        before = whole.seen.shares_at(start.thresholds(whole.seen, keep))[WRONG]
        after = whole.seen.shares_at(found.thresholds(whole.seen, keep))[WRONG]
        assert after < before
    before_loss, _ = loss_at(misled, text, start, 0.85)
    after_loss, spent = loss_at(misled, text, found, 0.85)
    assert spent <= 0.85
    assert after_loss < before_loss


def test_the_table_is_nested_and_keeps_its_promise(
    misled: Any, text: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(module, "ANCHORS", (0.85, 0.7))
    table = gateskip.calibrate(
        misled, text, allocation="searched", search="greedy", grid=(0.9, 0.8, 0.7, 0.6)
    )
    assert table.allocation == "searched"
    for column in zip(*table.thresholds, strict=True):
        assert all(b >= a for a, b in itertools.pairwise(column)), "I7"
    rows = gateskip.check_calibration(misled, {"same": text}, budgets=[gateskip.Budget(keep=0.8)])
    assert rows[0].kept
    again = gateskip.calibrate(
        misled, text, allocation="searched", searched_before=table, grid=(0.9, 0.8, 0.7, 0.6)
    )
    for keep in (0.9, 0.75, 0.6):
        budget = gateskip.Budget(keep=keep)
        pairs = zip(again.expected(budget), table.expected(budget), strict=True)
        assert all(a == pytest.approx(b, abs=0.05) for a, b in pairs)
    off = dict(zip(state_of(misled).branches, table.thresholds[-1], strict=True))[WRONG] >= OFF
    assert off, "a branch that does nothing is off for good"


def test_offsets_between_anchors() -> None:
    a, b = {(0, "mlp"): 0.0, (1, "mlp"): 4.0}, {(0, "mlp"): 2.0, (1, "mlp"): 9.0}
    split = Allocation("searched", a, found=((0.9, a), (0.5, b)))
    assert split.offsets_at(1.0) == split.offsets_at(0.9) == a
    assert split.offsets_at(0.7)[0, "mlp"] == pytest.approx(1.0)
    assert split.offsets_at(0.3) == b
    assert dataclasses.replace(split, found=()).offsets_at(0.7) == a


def test_hull_of_a_branch() -> None:
    points = [
        (0.5, 1.0, 0.8, 1.0),
        (0.6, 2.0, 0.5, 2.0),
        (3.0, 3.0, 0.3, 3.0),
        (3.5, 4.0, 0.0, 9.0),
    ]
    # From (0, 0) to the second at .3 a unit; then to the last at 1.45, below the third.
    assert _hull(points) == [points[1], points[3]]
    assert _hull([(-1.0, 1.0, 0.8, 1.0)]) == [(-1.0, 1.0, 0.8, 1.0)]


def test_unknown_search() -> None:
    with pytest.raises(gateskip.ConfigError, match="Did you mean 'greedy'"):
        gateskip.calibrate(gated(), [], allocation="searched", search="gredy")


def test_calibrating_again_while_training_does_not_search(
    misled: Any, text: Any, monkeypatch: Any
) -> None:
    table = gateskip.calibrate(
        misled, text, allocation="searched", search="greedy", grid=(0.9, 0.75)
    )
    monkeypatch.setattr("gateskip.calibration.thresholds.searched", lambda *_, **__: 1 / 0)
    again = recalibrate(misled, text, grid=(0.9, 0.75))
    assert again.allocation == "searched"
    assert again.keep[-1] == pytest.approx(table.keep[-1], abs=0.02)
