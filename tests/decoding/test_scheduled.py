"""Budgets within a generation: causal, per row, and what a schedule says is what is spent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gateskip
from gateskip.decoding import ExitLayer, Moment, by_entropy, by_position
from gateskip.errors import BudgetError, ConfigError
from models import gated, padded, random_ids, with_table

NEW = 12


@pytest.fixture(scope="module")
def model() -> Any:
    built = with_table(gated("llama", compensation="low_rank"))
    built.generation_config.eos_token_id = None
    return built


def scheduled(model: Any, ids: Any, schedule: Any, mask: Any = None, **more: Any) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    return gateskip.generate_scheduled(
        model, ids, schedule=schedule, attention_mask=mask, max_new_tokens=NEW, do_sample=False,
        **more,
    )  # fmt: skip


def plain(model: Any, ids: Any, mask: Any = None, **more: Any) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **more)


@pytest.mark.parametrize("batch", [1, 3])
def test_one_budget_throughout_is_plain_decoding(model: Any, batch: int) -> None:
    ids, mask, _ = padded(batch, 9, "left")
    with gateskip.budget(model, keep=0.6):
        wanted = plain(model, ids, mask)
        assert torch.equal(scheduled(model, ids, lambda moment: None, mask), wanted)
    found = scheduled(model, ids, by_position((None, 0.6)), mask, prompt=0.6)
    assert torch.equal(found, wanted)


def test_by_position(model: Any) -> None:
    ids = random_ids(1, 9)
    with gateskip.trace(model) as trace:
        scheduled(model, ids, by_position((4, 1.0), (8, 0.75), (None, 0.25)))
    kept = [float(torch.stack([m.float().mean() for m in call.keep.values()]).mean())
            for call in trace.calls[1:]]  # fmt: skip
    assert all(share == 1.0 for share in kept[:4])
    assert all(share < 1.0 for share in kept[8:])
    assert sum(kept[4:8]) / 4 > sum(kept[8:]) / len(kept[8:])


def test_a_schedule_sees_the_past_alone(model: Any) -> None:
    ids, moments = random_ids(2, 9), []

    def schedule(moment: Moment) -> Any:
        moments.append(moment)
        return [1.0, 0.5] if moment.new_tokens % 2 else {"keep": 0.75}

    found = scheduled(model, ids, schedule)
    assert [m.new_tokens for m in moments] == list(range(1, NEW))
    for moment in moments:
        assert torch.equal(moment.ids, found[:, : 9 + moment.new_tokens])
        assert moment.entropy.shape == (2,)
    shorter = gateskip.generate_scheduled(
        model, ids, schedule=schedule, max_new_tokens=5, do_sample=False,
        attention_mask=torch.ones_like(ids),
    )  # fmt: skip
    assert torch.equal(shorter, found[:, : 9 + 5])


def test_by_entropy_asks_every_row(model: Any) -> None:
    ids = random_ids(4, 9)
    entropies = []
    rule = by_entropy(0.905, low=0.25, high=1.0)

    def watched(moment: Moment) -> Any:
        entropies.append(moment.entropy)
        return rule(moment)

    with gateskip.trace(model) as trace:
        scheduled(model, ids, watched)
    for entropy, call in zip(entropies, trace.calls[1:], strict=True):
        kept = torch.stack(list(call.keep.values())).float().mean((0, 2))
        assert ((kept == 1.0) | (entropy <= 0.905)).all()
    seen = torch.stack(entropies)
    assert bool((seen > 0.905).any())
    assert bool((seen <= 0.905).any())


def test_other_policies(model: Any) -> None:
    ids = random_ids(1, 9)
    with gateskip.trace(model) as trace:
        scheduled(model, ids, lambda moment: ExitLayer(2))
    for call in trace.calls[1:]:
        assert not any(bool(m.any()) for (layer, _), m in call.keep.items() if layer >= 2)


def test_bad_arguments(model: Any) -> None:
    ids = random_ids(1, 9)
    with pytest.raises(ConfigError, match="schedule="):
        scheduled(model, ids, 0.5)
    with pytest.raises(ConfigError, match="last part"):
        by_position((4, 1.0))
    with pytest.raises(ConfigError, match="rise"):
        by_position((8, 1.0), (4, 0.5), (None, 0.2))
    with pytest.raises(BudgetError, match=r"keep=1\.5"):
        by_position((None, 1.5))
    with pytest.raises(ConfigError, match="threshold"):
        by_entropy(2.0, low=0.5, high=1.0)
    with pytest.raises(BudgetError, match="floor"):
        scheduled(model, ids, lambda moment: 0.01)
    with pytest.raises(BudgetError, match="2 rows"):
        scheduled(model, random_ids(3, 9), lambda moment: [1.0, 0.5])
    with pytest.raises(ConfigError, match="schedule='cheap'"):
        scheduled(model, ids, lambda moment: "cheap")
