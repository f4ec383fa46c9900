"""Methods that take branches out for good."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import gateskip
from gateskip.errors import BudgetError, ConfigError, UnsupportedError
from gateskip.methods.gate_norm import coupling
from gateskip.retrofit.attach import gated_branches, layers_of
from gateskip.skipping.compensation import compensation_of
from gateskip.skipping.policy import OFF
from gateskip.skipping.state import state_of
from method_models import STATIC, applied, known, low
from models import random_ids, tiny


@pytest.mark.parametrize("name", STATIC)
def test_static_budgets_are_nested_and_never_exceeded(name: str) -> None:
    state = state_of(known(name))
    assert state.policy is not None
    last: set[Any] = set()
    for budget in (0.97, 0.9, 0.85, 0.8):
        thresholds = state.resolve(gateskip.Budget(compute=budget))
        assert thresholds is not None
        off = {key for key, value in thresholds.items() if value >= OFF}
        assert last <= off
        assert off
        assert all(value >= OFF or value == float("-inf") for value in thresholds.values())
        last = off
        with (
            torch.no_grad(),
            gateskip.budget(known(name), compute=budget),
            gateskip.trace(known(name)) as trace,
        ):
            known(name)(random_ids(4, 64))
        assert trace.ledger.compute <= budget + 1e-6
    with pytest.raises(BudgetError, match="below the floor"):
        state.resolve(gateskip.Budget(compute=0.05))


@pytest.mark.parametrize("name", STATIC)
@torch.no_grad()
def test_masked_is_physically_removed(name: str, tmp_path: Path) -> None:
    model, ids = known(name), random_ids(2, 20)
    budget = gateskip.Budget(compute=low(model))
    with gateskip.budget(model, compute=budget.value):
        expected = model(ids).logits
    report = gateskip.export_static(model, tmp_path / "plain", budget=budget)
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    torch.testing.assert_close(plain(ids).logits, expected, atol=1e-5, rtol=1e-4)
    if name in ("shortgpt", "every_second", "fixed_layers", "layerskip"):
        assert report.layers == len(layers_of(plain, state_of(model).family)) < 4
    out = plain.generate(ids, max_new_tokens=4, do_sample=False)
    with gateskip.budget(model, compute=budget.value):
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), out)


def silent(model: Any, layer: int, kinds: tuple[str, ...]) -> Any:
    """The model with branches that add nothing."""
    parts = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}
    for kind in kinds:
        nn.init.zeros_(model.model.layers[layer].get_submodule(parts[kind]).weight)
    return model


def first_off(model: Any) -> set[Any]:
    table = state_of(model).policy
    assert table is not None
    pairs = zip(state_of(model).branches, table.thresholds[1], strict=True)
    return {key for key, value in pairs if value >= OFF}


def test_what_adds_nothing_goes_first() -> None:
    both = ("attention", "mlp")
    layer = applied("shortgpt", model=silent(tiny(), 2, both))
    assert first_off(layer) == {(2, "attention"), (2, "mlp")}
    for kind in both:
        branch = applied("llm_drop", model=silent(tiny(), 1, (kind,)))
        assert first_off(branch) == {(1, kind)}
    only = applied("llm_drop", target="mlp", model=silent(tiny(), 1, ("attention",)))
    assert {kind for _, kind in first_off(only)} == {"mlp"}


@torch.no_grad()
def test_block_influence_is_one_minus_the_cosine() -> None:
    from gateskip.data import encode
    from gateskip.methods.influence import Influence

    for family in ("llama", "gpt_neox"):  # sequential and parallel
        model, ids = tiny(family), random_ids(3, 24)
        # The last of the hidden states has passed the final norm.
        hidden = model(ids, output_hidden_states=True).hidden_states[:-1]
        gateskip.attach(model)
        found = Influence.of(model, encode(list(ids), None, 64)).layers
        for index, (before, after) in enumerate(itertools.pairwise(hidden)):
            cosine = nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
            assert found[index] == pytest.approx(float(1 - cosine.mean()), rel=1e-4)


@torch.no_grad()
def test_gate_norm_is_the_norm_of_the_product_and_invariant_to_scale() -> None:
    q, k = torch.randn(4 * 8, 24), torch.randn(2 * 8, 24)
    heads = zip(q.view(4, 8, 24), k.view(2, 8, 24).repeat_interleave(2, 0), strict=True)
    expected = torch.stack([torch.linalg.matrix_norm(a.T @ b) for a, b in heads]).mean()
    assert coupling(q, k, 4, 2) == pytest.approx(float(expected), rel=1e-5)
    assert coupling(q * 3.0, k / 3.0, 4, 2) == pytest.approx(float(expected), rel=1e-5)
    uncoupled = tiny()
    nn.init.zeros_(uncoupled.model.layers[3].self_attn.q_proj.weight)
    assert first_off(applied("gate_norm", model=uncoupled)) == {(3, "attention")}
    with pytest.raises(UnsupportedError, match="q_proj and k_proj"):
        applied("gate_norm", model=(other := tiny("gpt2")))
    with pytest.raises(gateskip.AttachError, match="has no gates"):  # as it was given
        state_of(other)


def test_layerskip_keeps_the_first_layers() -> None:
    assert first_off(applied("layerskip")) == {(3, "attention"), (3, "mlp")}
    with pytest.raises(ConfigError, match="layer_dropout"):
        gateskip.GateSkipTrainingConfig(layer_dropout=0.1, budget_end=0.8)
    with pytest.raises(ConfigError, match="measure='sofmax'"):
        applied("calm", measure="sofmax")


@pytest.mark.parametrize("name", ["shortgpt", "llm_drop", "gate_norm"])
@torch.no_grad()
def test_linear_maps_bring_back_some_of_what_is_removed(name: str) -> None:
    ids, budget = random_ids(8, 64, seed=9), 0.9 if name == "gate_norm" else 0.85
    model, expected = applied(f"{name}_linear", rank=16, compute=budget), tiny()(ids).logits

    def error() -> float:
        with gateskip.budget(model, compute=budget), gateskip.trace(model) as trace:
            found = float((model(ids).logits - expected).square().mean())
        assert trace.ledger.compute <= budget + 1e-6  # the maps included
        return found

    with_maps = error()
    for module in gated_branches(model, state_of(model).family).values():
        for parameter in compensation_of(module).parameters():
            parameter.zero_()
    assert with_maps < 0.9 * error()


def test_half_of_the_layers_is_half_of_the_macs_whatever_rounding_says() -> None:
    table = state_of(known("shortgpt")).policy
    assert table is not None
    assert table.compute == pytest.approx((1.0, 0.75, 0.5, 0.25))
    for error in (-1e-12, 0.0, 1e-12):
        rounded = dataclasses.replace(table, compute=tuple(c + error for c in table.compute))
        assert rounded.resolve(gateskip.Budget(compute=0.5)) == table.thresholds[2]
