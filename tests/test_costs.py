"""Costs against counts by hand and against real modules."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import gateskip
from gateskip.config import GateConfig
from gateskip.costs import (
    ModelShape,
    branch_cost,
    break_even_skip_rate,
    compensation_macs,
    gate_macs,
    gate_parameters,
    saved_macs,
)
from gateskip.errors import ConfigError
from gateskip.gates import GATES
from gateskip.retrofit.attach import branch_module, find_family, layers_of
from gateskip.skipping.ledger import Ledger
from models import FAMILIES, gated, needed_by, padded, tiny, with_table

SHAPE = ModelShape(
    layers=2, hidden=8, heads=4, kv_heads=2, head_dim=3, intermediate=10, vocab=20, weight_bytes=2
)


def test_shape_by_hand() -> None:
    assert SHAPE.macs_q_o == 2 * 8 * 12
    assert SHAPE.macs_kv == 2 * 8 * 6
    assert SHAPE.macs_per_key == 2 * 12
    assert SHAPE.macs_mlp == 3 * 8 * 10
    assert SHAPE.macs_lm_head == 8 * 20
    assert SHAPE.dense_macs(5) == 2 * (192 + 96 + 240 + 24 * 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_shape_of_a_model_is_its_weights(family: str) -> None:
    model = tiny(family)
    spec = find_family(model.config)
    shape = spec.shape(model)

    def weights(module: Any) -> int:
        """Numbers in matrices that a token meets: of stacked experts, those that it uses."""
        share = shape.experts_per_token / max(shape.experts, 1)
        return round(
            sum(
                p.numel() * (share if p.dim() == 3 else 1)
                for n, p in module.named_parameters()
                if p.dim() > 1 and "bias" not in n and "norm" not in n
            )
        )

    for index, layer in enumerate(layers_of(model, spec)):
        attention = branch_module(layer, spec, "attention")
        assert shape.macs_q_o + shape.macs_kv == weights(attention)
        assert shape.macs_mlp_of(index) == weights(branch_module(layer, spec, "mlp"))
    assert shape.macs_lm_head == model.lm_head.weight.numel()
    assert shape.weight_bytes == 4
    assert find_family(model.config).shape(tiny(family, dtype=torch.bfloat16)).weight_bytes == 2


@pytest.mark.parametrize("kind", GATES.names())
def test_gate_parameters_are_the_modules(kind: str) -> None:
    config = GateConfig(kind=kind, rank=4, groups=6, **needed_by(kind))
    gate = GATES.get(kind).build(config, 24, torch.Generator())
    assert gate_parameters(kind, 24, 4, 6) == sum(p.numel() for p in gate.parameters())
    numbers = ("bias", "slope")
    weights = sum(p.numel() for n, p in gate.named_parameters() if n not in numbers)
    assert gate_macs(kind, 24, 4, 6) == weights


def test_unknown_gate_kind() -> None:
    with pytest.raises(ConfigError, match="cubic"):
        gate_macs("cubic", 8, 2)


def test_branch_costs_by_hand() -> None:
    config = GateConfig(rank=2, compensation="low_rank", compensation_rank=3)
    attention, mlp = branch_cost(SHAPE, config, (0, "attention")), branch_cost(
        SHAPE, config, (1, "mlp")
    )  # fmt: skip
    assert (attention.computed, attention.per_key) == (192 + 96, 24)
    assert (mlp.computed, mlp.per_key) == (240, 0)
    assert attention.kept_gate == mlp.kept_gate == 2 * 8 * 2
    assert attention.decision == mlp.decision == 8
    assert attention.skipped == 96 + 2 * 8 * 3
    assert mlp.skipped == 2 * 8 * 3
    assert saved_macs(attention, 5) == 288 + 24 * 5 + 32 - 96 - 48


def test_options_change_costs() -> None:
    base = GateConfig(rank=2, compensation="none")
    key = (0, "attention")
    assert branch_cost(SHAPE, base, key).skipped == 96
    previous = dataclasses.replace(base, kv_source="previous")
    assert branch_cost(SHAPE, previous, key).skipped == 0
    paper = dataclasses.replace(base, importance="mean_gate")
    assert branch_cost(SHAPE, paper, key).decision == gate_macs("low_rank", 8, 2)
    mean = dataclasses.replace(base, compensation="mean")
    assert branch_cost(SHAPE, mean, key).skipped == 96
    assert compensation_macs("mean", 8, 3) == 0
    ungated = dataclasses.replace(base, branches=("mlp",))
    cost = branch_cost(SHAPE, ungated, key)
    assert (cost.kept_gate, cost.decision, cost.skipped) == (0, 0, 0)
    assert cost.computed == 288


@pytest.mark.parametrize("kind", ["low_rank", "scalar", "vector"])
@pytest.mark.parametrize("kv_source", ["project", "previous", "none"])
def test_break_even_is_where_spent_meets_dense(kind: str, kv_source: str) -> None:
    shape = ModelShape(
        layers=3, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=192, vocab=10
    )
    config = GateConfig(kind=kind, rank=2, compensation_rank=2, kv_source=kv_source)  # type: ignore[arg-type]
    rate, keys = break_even_skip_rate(shape, config, 20.0), 20.0
    dense = spent = 0.0
    for branch in ("attention", "mlp"):
        cost = branch_cost(shape, config, (0, branch))
        full = cost.computed + cost.per_key * keys
        dense += full
        spent += cost.decision + (1 - rate) * (full + cost.kept_gate) + rate * cost.skipped
    assert spent == pytest.approx(dense)
    assert 0 < rate


def test_break_even_is_never_reached_when_a_skip_saves_nothing() -> None:
    config = GateConfig(compensation_rank=1000)
    assert break_even_skip_rate(SHAPE, config, 4.0) == float("inf")


def test_branches_add_up_to_the_dense_model() -> None:
    config, keys = GateConfig(), 7.0
    total = 0.0
    for layer in range(SHAPE.layers):
        for kind in ("attention", "mlp"):
            cost = branch_cost(SHAPE, config, (layer, kind))
            total += cost.computed + cost.per_key * keys
    assert total == SHAPE.dense_macs(keys)


@pytest.mark.parametrize(
    "options", [{"layer_step": 2}, {"branches": ("attention",)}, {"branches": ("mlp",)}, {}]
)
@torch.no_grad()
def test_padding_costs_a_policy_nothing(options: dict[str, Any]) -> None:
    model = with_table(gated(**options))
    ids, mask, _ = padded(4, 20, "left")
    with gateskip.budget(model, keep=0.8), gateskip.trace(model) as together:
        model(ids, attention_mask=mask)
    with gateskip.budget(model, keep=0.8), gateskip.trace(model) as alone:
        for row in range(4):
            model(ids[row : row + 1, 2 * row :])
    found = Ledger.of(call.without_padding() for call in together.calls)
    expected = Ledger.of(call.without_padding() for call in alone.calls)
    assert found.macs_dense == pytest.approx(expected.macs_dense)
    assert found.compute == pytest.approx(expected.compute, rel=1e-9)
