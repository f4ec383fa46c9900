"""Budgets by row: each row is what it would be alone under its budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gateskip
from models import gated, random_ids, with_table

KEEPS = [0.7, 1.0, 0.4]


@pytest.fixture(scope="module")
def model() -> Any:
    built = with_table(gated("qwen3", compensation="low_rank"))
    built.generation_config.eos_token_id = None
    return built


def generated(model: Any, ids: Tensor, budget: Any, **options: Any) -> Tensor:
    torch.manual_seed(3)
    given: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "repetition_penalty": 2.0}
    found: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), gateskip_budget=budget, **(given | options)
    )
    return found


@pytest.mark.parametrize("as_type", [list, tuple, torch.tensor])
@torch.no_grad()
def test_a_forward(model: Any, as_type: Any) -> None:
    ids = random_ids(3, 14)
    with gateskip.budget(model, keep=as_type(KEEPS)), gateskip.trace(model) as trace:
        together = model(ids).logits
    for row, keep in enumerate(KEEPS):
        with gateskip.budget(model, keep=keep), gateskip.trace(model) as alone:
            expected = model(ids[row : row + 1]).logits[0]
        torch.testing.assert_close(together[row], expected, atol=1e-5, rtol=1e-4)
        for key, (keep_mask,) in alone.keep.items():
            assert torch.equal(trace.keep[key][0][row], keep_mask[0])
    spent = trace.ledger.rows_spent
    assert spent[2] < spent[0] < spent[1], "the ledger tells rows apart"


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2},
     {"cache_implementation": "static"}],
)  # fmt: skip
@pytest.mark.parametrize("execution", ["compacted", "masked"])
def test_generate(model: Any, options: dict[str, Any], execution: str) -> None:
    ids = random_ids(3, 9)
    with gateskip.execution(model, execution):
        together = generated(model, ids, {"keep": torch.tensor(KEEPS)}, **options)
        each = options.get("num_return_sequences", 1)
        for row, keep in enumerate(KEEPS):
            alone = generated(model, ids[row : row + 1], {"keep": keep}, **options)
            assert torch.equal(together[row * each : (row + 1) * each], alone)


def test_samples_share_their_rows_budget(model: Any) -> None:
    ids = random_ids(2, 9)
    with gateskip.trace(model) as trace:
        generated(model, ids, {"keep": [1.0, 0.3]}, do_sample=True, num_return_sequences=3)
    spent = trace.ledger.rows_spent
    assert max(spent[3:]) < min(spent[:3])


def test_one_row(model: Any) -> None:
    ids = random_ids(1, 9)
    expected = generated(model, ids, {"keep": 0.4})
    assert torch.equal(generated(model, ids, {"keep": [0.4]}), expected)
    assert torch.equal(generated(model, ids, {"compute": [1.0]}), generated(model, ids, None))


@torch.no_grad()
def test_bad_rows(model: Any) -> None:
    ids = random_ids(4, 9)
    with pytest.raises(gateskip.BudgetError, match="2 rows, the batch 4"):
        with gateskip.budget(model, keep=[0.5, 0.9]):
            model(ids)
    with pytest.raises(gateskip.BudgetError, match="3 rows, the prompts 4"):
        generated(model, ids, {"keep": KEEPS})
    for bad in ({"keep": []}, {"keep": [0.5, 2.0]}, {"keep": [0.5], "compute": [0.5]},
                {"keep": [[0.5]]}, {"keep": [0.5, 0.01]}):  # fmt: skip
        with pytest.raises(gateskip.BudgetError):
            generated(model, ids, bad)
    with pytest.raises(gateskip.BudgetError, match="number"):
        gateskip.set_budget(model, keep=[0.5, 0.9])  # type: ignore[arg-type]
