"""What a user does with every family: fit, calibrate, generate, train."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gateskip
from gateskip.retrofit.attach import head_of
from gateskip.retrofit.families import FAMILIES as REGISTERED
from gateskip.retrofit.head import LogitHead
from gateskip.skipping.state import override, state_of
from gateskip.training.objective import GateObjective
from models import FAMILIES, gated, medians, padded, random_ids, tiny

families = pytest.mark.parametrize("family", FAMILIES)


def test_every_registered_family_is_tested() -> None:
    assert {name.removesuffix("_window") for name in FAMILIES} == set(REGISTERED.names())


@families
def test_fit_calibrate_generate(family: str) -> None:
    model = gateskip.attach(
        tiny(family), gateskip.GateConfig(compensation="low_rank", compensation_rank=4)
    )
    texts = [random_ids(1, 40, seed=i)[0] for i in range(30)]
    gateskip.fit(model, texts)
    gateskip.calibrate(model, texts)
    # A new model repeats one token, whatever is skipped; a penalty makes it depend on logits.
    options: dict[str, Any] = {
        "max_new_tokens": 8, "do_sample": False, "repetition_penalty": 3.0,
        "gateskip_budget": {"keep": 0.6},
    }  # fmt: skip
    ids, mask, _ = padded(3, 14, "left")
    with gateskip.trace(model) as trace:
        batch = model.generate(ids, attention_mask=mask, **options)
    assert trace.ledger.skip_rate > 0.1
    with gateskip.execution(model, "masked"):
        reference = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(batch, reference)
    alone = model.generate(ids[:1], **options)
    assert torch.equal(alone[0], batch[0])


@families
def test_a_training_step(family: str) -> None:
    model = gated(family, compensation="low_rank").train()
    ids, mask, _ = padded(3, 20, "right")
    thresholds, losses = medians(model, 0.3), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        objective = GateObjective()
        with override(state_of(model), thresholds=thresholds, objective=objective):
            found = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
        loss = found + objective.mean()
        loss.backward()
        losses.append(float(loss.detach()))
        gates = [p.grad for n, p in model.named_parameters() if "skip_gate" in n]
        assert all(g is not None and bool(g.isfinite().all()) for g in gates)
        assert any(bool(g.any()) for g in gates if g is not None)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@families
@torch.no_grad()
def test_our_head_makes_the_familys_logits(family: str) -> None:
    model = gated(family)
    state, ids = state_of(model), random_ids(2, 9)
    head = head_of(model)
    assert head is not None
    hidden = model.get_submodule(state.family.decoder)(ids).last_hidden_state
    found = LogitHead(head, state.family, model.config)(hidden)
    torch.testing.assert_close(found, model(ids).logits, atol=1e-6, rtol=1e-6)
