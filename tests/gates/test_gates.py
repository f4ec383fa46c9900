"""Every gate kind: linear scores, the cached decision vector, float32 for ever."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from gateskip.config import GateConfig
from gateskip.errors import ConfigError
from gateskip.gates import GATES, Gate
from gateskip.skipping.score import Norm, branch_score, single_score
from models import needed_by

HIDDEN = 48
KINDS = [kind for kind in GATES.names() if kind not in ("unit", "router", "bottleneck")]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_linear_kind = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mlp"])


def built(kind: str, **options: Any) -> Gate:
    config = GateConfig(kind=kind, init_std=0.3, init_bias=0.7, rank=4, groups=6, **needed_by(kind),
                        **options)  # fmt: skip
    gate = GATES.get(kind).build(config, HIDDEN, torch.Generator().manual_seed(0))
    gate.score_scale.fill_(1.7)
    gate.score_shift.fill_(0.4)
    return gate


def norm() -> LlamaRMSNorm:
    module = LlamaRMSNorm(HIDDEN, eps=1e-5)
    nn.init.normal_(module.weight, 1.0, 0.3)
    return module


def test_kinds() -> None:
    assert KINDS == ["grouped", "low_rank", "mlp", "scalar", "shared", "vector"]


def test_the_unit_gate_is_one() -> None:
    gate, u = built("unit"), torch.randn(2, 5, HIDDEN) * 100
    assert torch.equal(gate(u), torch.ones(2, 5, 1))
    assert list(gate.parameters()) == []
    assert gate.factors() is not None
    with pytest.raises(ConfigError, match="nothing to fit"):
        gate.set_direction(torch.ones(HIDDEN), 0.0)


def test_the_router_is_one_at_first_or_the_papers() -> None:
    gate, u = built("router"), torch.randn(2, 5, HIDDEN)
    assert torch.equal(gate(u), torch.full((2, 5, 1), 0.7)), "a is 0: r = b"
    with torch.no_grad():
        gate.slope.fill_(2.0)
    torch.testing.assert_close(gate(u), 0.7 + 2.0 * gate.logits(u))
    torch.testing.assert_close(gate.score(u), (u @ gate.weight - 0.4) / 1.7)
    gate(u).sum().backward()
    assert all(p.grad is not None for p in gate.parameters())
    config = GateConfig(kind="router", init_std=0.3, init_bias=0.0, **needed_by("router"))
    paper = GATES.get("router").build(config, HIDDEN, torch.Generator().manual_seed(0))
    assert torch.equal(paper(u), paper.logits(u))
    assert [name for name, _ in paper.named_parameters()] == ["weight"]
    half = gate.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert half(u.bfloat16()).dtype == half.weight.dtype == torch.float32
    with pytest.raises(ConfigError, match="learned, not fitted"):
        gate.set_direction(torch.ones(HIDDEN), 0.0)


def test_a_bottleneck_is_one_value_that_bends() -> None:
    gate, (a, b) = built("bottleneck"), torch.randn(2, 5, HIDDEN)
    assert gate(a).shape == (5, 1)
    assert [tuple(p.shape) for p in gate.parameters()] == [(4, HIDDEN), (1, 4), (1,)]
    middle = gate.logits((a + b) / 2)
    assert not torch.allclose(middle, (gate.logits(a) + gate.logits(b)) / 2, atol=1e-3)
    torch.testing.assert_close(gate.score(a), (gate.logits(a)[..., 0] - 0.4) / 1.7)
    config = GateConfig(kind="bottleneck", **needed_by("bottleneck"))
    fresh = GATES.get("bottleneck").build(config, HIDDEN, torch.Generator().manual_seed(0))
    assert abs(float(fresh(a).detach().mean()) - 0.9933) < 2e-3
    assert float(fresh(a).detach().std()) > 1e-6


@every_kind
def test_values(kind: str) -> None:
    # Another seed than the weights': equal draws would line up with them and saturate.
    torch.manual_seed(5)
    gate, u = built(kind), torch.randn(2, 5, HIDDEN)
    g = gate(u)
    assert g.shape == (2, 5, 1 if kind == "scalar" else HIDDEN)
    assert g.dtype == torch.float32
    assert bool(((g > 0) & (g < 1)).all())
    assert torch.equal(g, gate.logits(u).sigmoid())
    with torch.no_grad():
        assert torch.equal(gate(u), g)
        assert gate(u.to(torch.bfloat16)).dtype == torch.float32


@every_kind
def test_initial_values(kind: str) -> None:
    config = GateConfig(kind=kind, groups=6)
    generator = torch.Generator().manual_seed(0)
    gate = GATES.get(kind).build(config, HIDDEN, generator)
    torch.manual_seed(5)
    g = gate(torch.randn(100, HIDDEN)).detach()
    assert abs(float(g.mean()) - 0.9933) < 2e-3
    again = GATES.get(kind).build(config, HIDDEN, torch.Generator().manual_seed(0))
    for a, b in zip(gate.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["low_rank", "vector"])
def test_spread_of_the_weights_is_init_std(kind: str) -> None:
    config = GateConfig(kind=kind, init_std=0.02, init_bias=0.0, rank=16)
    gate = GATES.get(kind).build(config, 256, torch.Generator().manual_seed(0))
    with torch.no_grad():
        weight = gate.logits(torch.eye(256))
    assert abs(float(weight.std()) - 0.02) < 2e-3


@every_linear_kind
def test_mean_logit_weights_are_the_mean_of_the_logits(kind: str) -> None:
    gate, u = built(kind), torch.randn(7, HIDDEN)
    w, b = gate.mean_logit_weights()
    torch.testing.assert_close(u @ w + b, gate.logits(u).mean(-1), atol=1e-5, rtol=1e-5)
    w, b = gate.decision_weights()
    expected = (gate.logits(u).mean(-1) - 0.4) / 1.7
    torch.testing.assert_close(u @ w + b, expected, atol=1e-5, rtol=1e-5)


@every_kind
def test_set_direction(kind: str) -> None:
    gate, u, w = built(kind), torch.randn(7, HIDDEN), torch.randn(HIDDEN)
    gate.set_direction(w, -0.3)
    z = gate.logits(u)
    torch.testing.assert_close(z, (u @ w - 0.3)[:, None].expand_as(z), atol=1e-5, rtol=1e-5)
    mean_w, mean_b = gate.mean_logit_weights()
    torch.testing.assert_close(mean_w, w)
    assert mean_b.item() == pytest.approx(-0.3)
    gate(u).sum().backward()
    assert all(p.grad is not None for p in gate.parameters())


@every_kind
def test_decision_vector_follows_every_change(kind: str) -> None:
    gate = built(kind).eval()
    first, shift = gate.decision_vector()
    assert not first.requires_grad
    assert gate.decision_vector()[0] is first, "cached"

    def fresh() -> tuple[torch.Tensor, float]:
        with torch.no_grad():
            w, b = gate.decision_weights()
        return w, float(b)

    def follows() -> None:
        w, b = gate.decision_vector()
        expected_w, expected_b = fresh()
        assert torch.equal(w, expected_w)
        assert b == expected_b

    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.add_(0.5)
            follows()
    assert gate.decision_vector()[1] != shift
    gate.score_shift.fill_(2.0)
    follows()
    gate.score_scale.mul_(3.0)
    follows()
    gate.load_state_dict(built(kind).state_dict())
    follows()
    assert torch.equal(gate.decision_vector()[0], first)
    gate.set_direction(torch.ones(HIDDEN), 0.0)
    follows()
    optimiser = torch.optim.AdamW(gate.parameters(), lr=0.1)
    gate(torch.randn(3, HIDDEN)).sum().backward()
    optimiser.step()
    follows()
    gate.bias = nn.Parameter(gate.bias.detach() + 1.0)
    follows()
    gate.to(torch.bfloat16)
    follows()
    twin = copy.deepcopy(gate)
    with torch.no_grad():
        twin.bias.add_(1.0)
    assert twin.decision_vector()[1] != gate.decision_vector()[1]
    follows()


@every_kind
@pytest.mark.parametrize("change", ["half", "bfloat16", "double"])
def test_float32_stays(kind: str, change: str) -> None:
    gate = built(kind)
    before = {name: value.clone() for name, value in gate.state_dict().items()}
    holder = nn.Sequential(nn.Linear(2, 2), gate)
    getattr(holder, change)()
    assert holder[0].weight.dtype != torch.float32
    for name, value in gate.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])


@every_kind
def test_moves_between_devices(kind: str) -> None:
    gate = built(kind).to("meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.float32 for p in gate.parameters())


@every_kind
@pytest.mark.parametrize("grad", [True, False])
def test_branch_score_is_the_mean_logit(kind: str, grad: bool) -> None:
    gate, layer_norm, h = built(kind), norm(), torch.randn(2, 9, HIDDEN) * 3
    with torch.set_grad_enabled(grad):
        score, _ = branch_score(
            h, Norm(layer_norm, layer_norm.variance_epsilon, "rms"), gate, "mean_logit"
        )
        expected = (gate.logits(layer_norm(h)).mean(-1) - 0.4) / 1.7
    assert score.shape == (2, 9)
    torch.testing.assert_close(score, expected, atol=1e-5, rtol=1e-5)
    assert score.requires_grad == grad


@every_kind
def test_score_gradients_reach_the_gate_only(kind: str) -> None:
    gate, layer_norm = built(kind), norm()
    h = torch.randn(2, 4, HIDDEN, requires_grad=True)
    for importance in ("mean_logit", "mean_gate"):
        gate.zero_grad()
        branch_score(h, Norm(layer_norm, 1e-5, "rms"), gate, importance)[0].sum().backward()
        assert h.grad is None
        assert layer_norm.weight.grad is None
        assert all(p.grad is not None for p in gate.parameters())


@every_kind
def test_mean_gate_is_the_mean_gate(kind: str) -> None:
    gate, layer_norm, h = built(kind), norm(), torch.randn(2, 9, HIDDEN)
    score, _ = branch_score(h, Norm(layer_norm, 1e-5, "rms"), gate, "mean_gate")
    torch.testing.assert_close(score, gate(layer_norm(h)).mean(-1))


@every_linear_kind
@torch.no_grad()
def test_single_score_is_branch_score(kind: str) -> None:
    gate, layer_norm = built(kind), norm()
    for scale in (1e-3, 1.0, 300.0):
        h = torch.randn(1, 1, HIDDEN) * scale
        w, b = gate.decision_vector()
        eps = layer_norm.variance_epsilon
        expected, _ = branch_score(h, Norm(layer_norm, eps, "rms"), gate, "mean_logit")
        single = single_score(h.view(-1), w * layer_norm.weight.float(), b, eps)
        assert single == pytest.approx(float(expected), abs=1e-5, rel=1e-5)


def test_scores_follow_a_fused_optimiser() -> None:
    """PyTorch's fused optimisers change weights without counting up their versions."""
    from gateskip.retrofit.attach import gate_of, gated_branches
    from gateskip.skipping.score import Norm, branch_score
    from gateskip.skipping.state import state_of
    from models import gated, random_ids

    model, h = gated(), torch.randn(1, 5, 64)
    state = state_of(model)
    module = gated_branches(model, state.family)[(0, "attention")]
    gate, norm = gate_of(module), model.model.layers[0].input_layernorm
    optimizer = torch.optim.AdamW([*gate.parameters(), norm.weight], lr=0.1, fused=True)

    def check() -> None:
        with torch.no_grad():
            found, _ = branch_score(h, Norm(norm, norm.variance_epsilon, "rms"), gate, "mean_logit")
            expected = gate.logits(norm(h)).mean(-1)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(gate(norm(h)), gate.logits(norm(h)).sigmoid())

    check()
    for _ in range(2):
        model.train()
        check()
        (model(random_ids(2, 8)).logits.square().mean() + gate(norm(h)).sum()).backward()
        optimizer.step()
        check()
    model.eval()
    check()
