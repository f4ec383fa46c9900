"""The loss of a step, against written-out references."""

from __future__ import annotations

from typing import Any

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


def test_decisions_learn_from_skipped_tokens_where_all_is_computed() -> None:
    """The gradient of a score is ⟨∂L/∂out, g ⊙ o⟩ · p (1 − p) / T, of skipped tokens as of kept."""
    model = gated(importance="head", compensation="none")
    ids, state = random_ids(2, 12), state_of(model)
    thresholds = dict.fromkeys(state.branches, 0.0)
    gates = [gate_of(m) for m in gated_branches(model, state.family).values()]
    for number, gate in enumerate(gates):  # the last branch alone skips
        assert gate.score_weight is not None
        gate.set_head(torch.randn(64, generator=torch.Generator().manual_seed(number)), 0.0)
        if number < len(gates) - 1:
            gate.set_head(torch.zeros(64), 5.0)
    seen: dict[str, Tensor] = {}
    layer = layers_of(model, state.family)[-1]
    hooks = [
        layer.post_attention_layernorm.register_forward_hook(
            lambda _m, _a, out: seen.update(u=out.detach())
        ),
        layer.mlp.register_forward_hook(lambda _m, _a, out: seen.update(o=out.detach())),
    ]
    found = {}
    for everyone in (False, True):
        model.zero_grad()
        objective = GateObjective(penalty=None, temperature=2.0, everyone=everyone)
        with override(state, objective=objective, thresholds=thresholds, execution="masked"):
            out = model.model(ids).last_hidden_state
        out.retain_grad()
        last = layer_output(model, ids, state, thresholds)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
        (out * weight).sum().backward()
        found[everyone] = gates[-1].score_weight.grad.clone()  # type: ignore[union-attr]
    for hook in hooks:
        hook.remove()
    # Written out, from the norm's gradient at the layer's output.
    u, o = seen["u"], seen["o"]
    h = last.detach().requires_grad_(True)
    (model.model.norm(h) * weight).sum().backward()
    assert h.grad is not None
    score = gates[-1].score(u).detach()
    p = torch.sigmoid(score / 2.0)
    each = (h.grad * gates[-1](u).detach() * o).sum(-1) * p * (1 - p) / 2.0
    kept = score >= 0.0
    kept[:, 0] = True  # protected
    assert 0 < int(kept.sum()) < kept.numel()
    torch.testing.assert_close(found[True], (each[..., None] * u).sum((0, 1)), atol=1e-4, rtol=1e-3)
    wanted = (each[..., None] * u)[kept].sum(0)
    torch.testing.assert_close(found[False], wanted, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(found[True], found[False], atol=1e-2)


def layer_output(model: nn.Module, ids: Tensor, state: Any, thresholds: Any) -> Tensor:
    """What the last layer gives to the final norm."""
    caught: list[Tensor] = []
    decoder: Any = model.model
    hook = decoder.norm.register_forward_pre_hook(lambda _m, args: caught.append(args[0]))
    with torch.no_grad(), override(state, thresholds=thresholds, execution="masked"):
        decoder(ids)
    hook.remove()
    return caught[0]


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
