"""The loss of a step, against written-out references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gateskip.errors import UnsupportedError
from gateskip.retrofit.attach import gate_of, gated_branches, layers_of
from gateskip.skipping.state import override, state_of
from gateskip.training.objective import GateObjective, SkipMeter, labelled
from models import gated, padded, random_ids


def reference_penalty(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean over branches, valid tokens and channels of g², from inputs caught by hooks."""
    state = state_of(model)
    inputs: dict[str, Tensor] = {}
    handles = []
    for index, layer in enumerate(layers_of(model, state.family)):
        for name in (state.family.attention_norm, state.family.mlp_norm):
            norm = getattr(layer, name)
            key = f"{index}.{name}"
            handles.append(
                norm.register_forward_hook(lambda _m, _a, out, key=key: inputs.update({key: out}))
            )
    model(ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    terms = []
    for (index, kind), module in gated_branches(model, state.family).items():
        name = state.family.attention_norm if kind == "attention" else state.family.mlp_norm
        g = gate_of(module)(inputs[f"{index}.{name}"].detach())
        terms.append(g[mask.bool()].square().mean())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_penalty_and_its_gradient(side: str) -> None:
    model = gated()
    ids, mask, _ = padded(3, 12, side)
    expected = reference_penalty(model, ids, mask)
    expected.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert wanted
    assert all(".skip_gate." in n for n in wanted), "the gates' input is detached"
    model.zero_grad()
    penalty = GateObjective()
    with override(state_of(model), objective=penalty):
        model(ids, attention_mask=mask)
    found = penalty.mean()
    found.backward()
    torch.testing.assert_close(found, expected)
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name])


def test_penalty_over_a_batch_of_more_tokens() -> None:
    model, penalty = gated(), GateObjective()
    ids, mask, _ = padded(3, 12, "right")
    with override(state_of(model), objective=penalty):
        model(ids, attention_mask=mask)
    valid = int(mask.sum())
    torch.testing.assert_close(penalty.mean(2 * valid), penalty.mean() / 2)


def test_penalty_under_gradient_checkpointing() -> None:
    model, ids = gated(), random_ids(2, 10)
    plain = GateObjective()
    with override(state_of(model), objective=plain):
        model(ids)
    plain.mean().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    penalty = GateObjective()
    with override(state_of(model), objective=penalty):
        loss = model(ids).logits.sum() * 0
    (loss + penalty.mean()).backward()
    for name, gradient in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def test_penalty_says_when_no_gradient_can_reach_the_gates() -> None:
    model, ids = gated(), random_ids(2, 10)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    penalty = GateObjective()
    with override(state_of(model), objective=penalty):
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embeds)
    with pytest.raises(UnsupportedError, match="use_reentrant"):
        penalty.mean()


def test_labelled_positions_are_those_before_a_label() -> None:
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 7, -100, 8]])
    assert labelled(labels).tolist() == [[False, True, True], [True, False, True]]


def test_meter_counts_by_branch_kind() -> None:
    from models import medians

    model, meter = gated(), SkipMeter()
    ids, mask, _ = padded(3, 12, "right")
    with override(state_of(model), thresholds=medians(model), recorder=meter):
        model(ids, attention_mask=mask)
    with override(state_of(model), thresholds=medians(model), execution="masked"):
        from gateskip.execution.api import trace

        with trace(model) as seen:
            model(ids, attention_mask=mask)
    rates = meter.rates()
    assert rates["skip_rate"] == pytest.approx(seen.ledger.skip_rate)
    assert 0 < rates["skip_rate_mlp"] < 1
    assert meter.rates() == {}


def test_what_is_penalised_of_the_cost() -> None:
    objective = GateObjective(costs={(0, "mlp"): 1.0, (1, "mlp"): 3.0}, temperature=1.0)
    # Of 10 tokens 9 and 4 are kept, softly.
    spent = torch.tensor([9.0 * 0.25, 4.0 * 0.75], requires_grad=True)
    objective.spent = {(0, "mlp"): spent[0], (1, "mlp"): spent[1]}
    objective.tokens = 10
    found = {kind: objective.excess(kind, 0.6) for kind in ("linear", "hinge", "absolute")}
    assert float(found["linear"].detach()) == pytest.approx(0.525)
    assert float(found["hinge"].detach()) == pytest.approx(0.3 * 0.25)  # the first branch alone
    assert float(found["absolute"].detach()) == pytest.approx(0.075)
    # Half of an accumulated batch counts half.
    assert float(objective.excess("hinge", 0.6, 20).detach()) == pytest.approx(0.3 * 0.25 / 2)
    found["absolute"].backward()
    assert spent.grad is not None
    assert (spent.grad < 0).all()  # below the target: keep more
    # A branch without a threshold keeps everyone.
    objective.shares = {(0, "mlp"): 0.25, (1, "mlp"): 0.75, (2, "mlp"): 1.0}
    assert float(objective.cost().detach()) == pytest.approx(1.525)
    assert float(objective.excess("absolute", 0.6).detach()) == pytest.approx(0.925)
