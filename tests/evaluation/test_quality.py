"""The dense arm is the dense model bit for bit; rows agree with an independent computation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import gateskip
from gateskip.config import Budget
from gateskip.errors import AttachError, BudgetError, DataError
from gateskip.evaluation.quality import evaluate
from gateskip.execution.api import dense
from models import gated, random_ids, tiny, with_table


@pytest.fixture
def model() -> Any:
    return with_table(gated(compensation="low_rank"))


@pytest.fixture
def texts() -> list[Tensor]:
    return [random_ids(1, length, seed=length) for length in (9, 17, 17, 30)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_is_the_dense_model(dtype: torch.dtype) -> None:
    ids = random_ids(2, 12)
    untouched, model = tiny(dtype=dtype), with_table(gated(dtype=dtype))
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    gateskip.set_budget(model, keep=0.5)
    with torch.no_grad():
        before = model(ids).logits
        with dense(model):
            assert torch.equal(model(ids).logits, untouched(ids).logits)
            answer = model.generate(ids, **options)
            assert type(model.model.layers[0]) is type(untouched.model.layers[0])
        assert torch.equal(answer, untouched.generate(ids, **options))
        assert torch.equal(model(ids).logits, before), "gates are back"
        assert not torch.equal(before, untouched(ids).logits)


def test_dense_restores_after_an_error(model: Any) -> None:
    ids = random_ids(1, 6)
    gateskip.set_budget(model, keep=0.5)
    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises(RuntimeError, match="stop"), dense(model):
            raise RuntimeError("stop")
        assert torch.equal(model(ids).logits, before)
    assert len(model.model._forward_pre_hooks) == 1
    gateskip.detach(model)
    assert not model.model._forward_pre_hooks


def test_rows(model: Any, texts: list[Tensor]) -> None:
    rows = evaluate(model, texts, budgets=[Budget(keep=0.5), Budget(compute=0.8)])
    assert [(r.arm, r.keep, r.compute) for r in rows] == [
        ("dense", None, None),
        ("gateskip", 0.5, None),
        ("gateskip", None, 0.8),
    ]
    assert rows[0].agreement == 1.0
    assert rows[0].skip_rate == rows[0].macs_saved == 0.0
    assert {r.tokens for r in rows} == {sum(t.shape[1] - 1 for t in texts)}
    assert rows[1].skip_rate > rows[2].skip_rate > 0
    assert all(r.perplexity == pytest.approx(math.exp(r.loss)) for r in rows)


def test_loss_and_agreement_one_text_at_a_time(model: Any, texts: list[Tensor]) -> None:
    found = evaluate(model, texts, budgets=[Budget(keep=0.5)], batch_tokens=64)
    untouched, losses, agreed, total = tiny(), [0.0, 0.0], 0, 0
    with torch.no_grad(), gateskip.budget(model, keep=0.5):
        for ids in texts:
            logits = [m(ids).logits[0, :-1] for m in (untouched, model)]
            for number, each in enumerate(logits):
                losses[number] += float(
                    torch.nn.functional.cross_entropy(each, ids[0, 1:], reduction="sum")
                )
            agreed += int((logits[0].argmax(-1) == logits[1].argmax(-1)).sum())
            total += ids.shape[1] - 1
    assert [row.loss for row in found] == pytest.approx([loss / total for loss in losses], rel=1e-4)
    assert found[1].agreement == pytest.approx(agreed / total, abs=1.5 / total)


def test_skip_rate_is_the_trace_of_the_same_texts(model: Any) -> None:
    ids = random_ids(1, 20)
    row = evaluate(model, [ids], budgets=[Budget(keep=0.5)])[1]
    with torch.no_grad(), gateskip.budget(model, keep=0.5), gateskip.trace(model) as trace:
        model(ids)
    assert row.skip_rate == pytest.approx(trace.ledger.skip_rate)
    assert row.macs_saved == pytest.approx(1 - trace.ledger.compute)


def test_model_mode_is_restored(model: Any, texts: list[Tensor]) -> None:
    model.train()
    evaluate(model, texts, budgets=[])
    assert model.training


def test_errors_come_first(model: Any, texts: list[Tensor]) -> None:
    with pytest.raises(AttachError):
        evaluate(tiny(), texts)
    with pytest.raises(BudgetError, match="floor"):
        evaluate(model, texts, budgets=[Budget(keep=0.01)])
    with pytest.raises(BudgetError, match="calibrate"):
        evaluate(gated(), texts, budgets=[Budget(keep=0.5)])
    with pytest.raises(DataError, match="tokenizer"):
        evaluate(model, ["text"])
    with pytest.raises(DataError):
        evaluate(model, [])
