"""Nulls: chance, places and tokens."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gateskip
from gateskip.errors import UnsupportedError
from gateskip.skipping.rule import rule_of
from gateskip.skipping.state import override, state_of
from method_models import applied, known, trained
from models import padded, random_ids


@torch.no_grad()
def test_random_seeds_differ_and_know_nothing_of_tokens() -> None:
    ids, masks = random_ids(2, 40), []
    for model in (known("random"), known("random"), applied("random", seed=1)):
        with gateskip.budget(model, keep=0.6), gateskip.trace(model) as trace:
            model(ids if masks else random_ids(2, 40, seed=7))
        masks.append(torch.cat([keep[0].flatten() for keep in trace.keep.values()]))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def scores(model: Any, ids: Tensor) -> dict[Any, Tensor]:
    class Seen(dict[Any, Tensor]):
        def add(self, key: Any, score_BT: Tensor, call: Any) -> None:
            self[key] = score_BT

    seen = Seen()
    keeps = dict.fromkeys(state_of(model).branches, float("-inf"))
    with torch.no_grad(), override(state_of(model), scores=seen, thresholds=keeps):
        model(ids)
    return seen


def test_token_identity_knows_the_token_alone() -> None:
    model, ids = known("token_identity"), random_ids(1, 30)
    ids[0, 20] = ids[0, 10]
    rule: Any = rule_of(state_of(model))
    for key, found in scores(model, ids).items():
        assert float((found[0, 10] - found[0, 20]).abs()) <= rule.step
        expected = rule.tables[key][ids[0]]
        torch.testing.assert_close(found[0], expected, atol=rule.step, rtol=0)
        assert expected.std() > 10 * rule.step
    with pytest.raises(UnsupportedError, match="needs input_ids"), gateskip.budget(model, keep=0.8):
        model(inputs_embeds=model.get_input_embeddings()(ids))


def test_position_knows_the_place_alone() -> None:
    model = known("position")
    a, b = (scores(model, random_ids(1, 30, seed=s)) for s in (1, 2))
    assert all(torch.equal(a[key], b[key]) for key in a)
    ids, mask, positions = padded(2, 20, "left")
    with gateskip.budget(model, keep=0.7), gateskip.trace(model) as trace, torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions)
    pads = int((mask[1] == 0).sum()) or int((mask[0] == 0).sum())
    assert pads
    for keep in trace.keep.values():
        rows = [row[real.bool()] for row, real in zip(keep[0], mask, strict=True)]
        least = min(map(len, rows))
        assert torch.equal(rows[0][:least], rows[1][:least])


def test_trained_at_random_is_stochastic_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gateskip.training.objective import SkipMeter

    kept: list[Tensor] = []
    plain = SkipMeter.record
    monkeypatch.setattr(
        SkipMeter, "record",
        lambda self, call: (kept.append(call.keep[2, "mlp"]), plain(self, call))[1],
    )  # fmt: skip
    model = applied("random")
    state = state_of(model)
    rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in random_ids(4, 32)]
    options = gateskip.GateSkipTrainingConfig(
        backbone="full", budget_start=0.7, budget_end=0.7, schedule="constant",
        train_compensation=False,
    )  # fmt: skip
    found, _ = trained(model, options, tmp_path, steps=3, rate=1e-4, rows=rows)
    assert len(kept) == 3
    for one, other in itertools.combinations(kept, 2):
        assert not torch.equal(one, other), "every step draws anew"
    assert all(torch.equal(each[0], each[1]) for each in kept), "by place alone"
    ids = random_ids(2, 32)
    with torch.no_grad(), gateskip.budget(found, compute=0.7):
        with gateskip.trace(found) as first:
            found(ids)
        with gateskip.trace(found) as again:
            found(ids)
    assert torch.equal(first.keep[2, "mlp"][0], again.keep[2, "mlp"][0])
    assert state.config.seed == 0
