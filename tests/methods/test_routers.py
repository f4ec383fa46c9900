"""Mixture-of-Depths, Router-Tuning, FlexiDepth and SkipGPT: routers that are trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import gateskip
from gateskip import methods
from gateskip.errors import BudgetError, ConfigError
from gateskip.retrofit.attach import layers_of
from gateskip.skipping.compensation import compensation_of
from gateskip.skipping.state import override, state_of
from method_models import applied, routed, trained
from models import padded, random_ids, tiny


@torch.no_grad()
def test_top_k_keeps_exactly_k_of_every_sequence() -> None:
    from gateskip.skipping.quantile import SequenceTopK

    model, (ids, mask, _) = routed(), padded(3, 20, "left")
    thresholds = dict.fromkeys(state_of(model).branches, SequenceTopK(0.3))
    with override(state_of(model), thresholds=thresholds), gateskip.trace(model) as trace:
        found = model(ids, attention_mask=mask).logits
        with gateskip.execution(model, "masked"):
            masked = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], masked[mask.bool()], atol=1e-4, rtol=1e-4)
    for keep in trace.keep.values():
        for row, real in zip(keep[0], mask.bool(), strict=True):
            assert int(row.sum()) == -(-int(real.sum()) * 3 // 10)
            assert not row[~real].any()
    lonely = torch.zeros_like(mask)  # the last row has its first token alone
    lonely[:2], lonely[2, -1] = 1, 1
    with override(state_of(model), thresholds=thresholds), gateskip.trace(model) as trace:
        model(ids, attention_mask=lonely)
    assert all(int(keep[0][2].sum()) == 1 for keep in trace.keep.values())
    # It is not causal: later tokens take places.
    other = ids.clone()
    other[:, 12:] = random_ids(3, 8, seed=5)
    with override(state_of(model), thresholds=thresholds):
        again = model(other, attention_mask=mask).logits
    assert not torch.allclose(again[:, :12], found[:, :12], atol=1e-3)


@torch.no_grad()
def test_a_layer_is_weighed_as_a_whole() -> None:
    model, dense, ids = routed(), tiny(), random_ids(2, 12)
    assert torch.equal(model(ids).logits, dense(ids).logits)
    for index, layer in enumerate(layers_of(model, state_of(model).family)):
        gate = layer.self_attn.skip_gate
        gate.slope.fill_(0.0)
        gate.offset.fill_(0.0 if index == 1 else 1.0)
    del dense.model.layers[1]
    for index, layer in enumerate(dense.model.layers):
        layer.self_attn.layer_idx = index
    dense.config.num_hidden_layers = 3
    expected = dense(ids, use_cache=False).logits
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected)


def test_routers_train_and_learn_to_predict(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    model = routed(auxiliary=0.5)
    options = methods.METHODS.get("mixture_of_depths")(every=1, auxiliary=0.5).training(model, 0.7)
    assert options.budget_end == pytest.approx(0.7, abs=0.05)
    rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in random_ids(64, 32)]
    trainer = gateskip.GateSkipTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=16, per_device_train_batch_size=4, use_cpu=True,
            report_to=[], learning_rate=3e-2, disable_tqdm=True, logging_steps=4,
        ),
        gateskip_args=dataclasses.replace(options, backbone="frozen"),
        train_dataset=rows,
    )  # fmt: skip
    trainer.train()
    logged = [log for log in trainer.state.log_history if "top_k_prediction" in log]
    assert logged[-1]["top_k_prediction"] < logged[0]["top_k_prediction"] - 0.02
    assert logged[-1]["skip_rate"] == pytest.approx(1 - options.budget_end, abs=0.03)
    for layer in layers_of(model, state_of(model).family):
        assert float(layer.self_attn.skip_gate.slope.detach()) != 0.0


def test_routers_cannot_save_more_than_their_layers() -> None:
    method = methods.METHODS.get("mixture_of_depths")(every=2)
    with pytest.raises(BudgetError, match=r"save \d+% at most; gate more"):
        method.training(applied("mixture_of_depths"), 0.4)
    with pytest.raises(ConfigError, match="form='retrofti'"):
        applied("mixture_of_depths", form="retrofti")
    with pytest.raises(ConfigError, match="placement='layer'"):
        gateskip.GateConfig(kind="router")
    with pytest.raises(ConfigError, match="'router', 'bottleneck'"):
        gateskip.GateConfig(kind="scalar", placement="layer", decision="layer", compensation="none")
    with pytest.raises(ConfigError, match="kind='router' has nothing to fit"):
        gateskip.fit(applied("mixture_of_depths"), list(random_ids(20, 64)))
    scratch = applied("mixture_of_depths", form="scratch")
    assert not any("slope" in name for name, _ in scratch.named_parameters())


@pytest.mark.parametrize("name", ["router_tuning", "skipgpt"])
def test_routers_come_down_to_their_target(name: str, tmp_path: Path) -> None:
    # Noise lets a token go at any score.
    drawn = {"start": 2.0, "noise": 1.0, "temperature_start": 5.0} if name == "skipgpt" else {}
    model = applied(name, **drawn)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    compute = 0.9 if name == "router_tuning" else 0.7
    method = methods.METHODS.get(name)(cost=20.0, **drawn)
    options = method.stages(model, compute)[0][1]
    found, logged = trained(model, options, tmp_path, steps=30, rate=2e-2)
    # The share of what routers may save that a budget is: all branches are of one size here.
    target = options.cost_target
    costs = [log["expected_cost"] for log in logged if "expected_cost" in log]
    assert costs[0] > target
    if name == "skipgpt":
        assert costs[-1] == pytest.approx(target, abs=0.08)
    else:  # nothing draws it back from below
        assert 0.2 < costs[-1] < target + 0.05
    assert logged[-2]["skip_rate"] > 0.05
    changed = {k for k, p in found.named_parameters() if not torch.equal(p, before[k])}
    assert changed
    assert all("score_" in key for key in changed)  # the model is frozen
    with pytest.raises(BudgetError, match="below what routers"):
        methods.METHODS.get(name)().training(applied(name), 0.05)


@torch.no_grad()
def test_flexidepth_skips_into_an_adapter() -> None:
    model, ids = applied("flexidepth"), random_ids(2, 16)
    layer = layers_of(model, state_of(model).family)[1]
    layer.self_attn.skip_gate.bias.fill_(-0.7)  # G is about a third, and differs by token
    layer.self_attn.skip_gate.up.mul_(30.0)
    with (
        override(state_of(model), thresholds=dict.fromkeys(state_of(model).branches, -0.7)),
        gateskip.trace(model) as trace,
    ):
        hidden = model(ids, output_hidden_states=True).hidden_states
    kept = trace.keep[1, "attention"][0]
    assert torch.equal(kept, trace.keep[1, "mlp"][0])
    assert 0 < int((~kept).sum()) < kept.numel() - 2
    h = hidden[1]
    u = layer.input_layernorm(h)
    g = layer.self_attn.skip_gate(u)
    assert float(g.std()) > 0.01
    inner = h + compensation_of(layer.self_attn)(u)
    out = inner + compensation_of(layer.mlp)(layer.post_attention_layernorm(inner))
    expected = h + (1 - g) * (out - h)
    torch.testing.assert_close(hidden[2][~kept], expected[~kept], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(hidden[2][kept], expected[kept], atol=1e-2)


def test_flexidepth_draws_routers_down(tmp_path: Path) -> None:
    model = applied("flexidepth")
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    options = methods.METHODS.get("flexidepth")(penalty=5.0).training(model, 0.75)
    found, logged = trained(model, options, tmp_path, steps=40, rate=5e-2)
    rates = [log["skip_rate"] for log in logged if "skip_rate" in log]
    assert rates[0] == 0.0
    assert rates[-1] > 0.2
    changed = {k for k, p in found.named_parameters() if not torch.equal(p, before[k])}
    assert any("skip_gate" in key for key in changed)
    assert any("skip_compensation" in key for key in changed)
    assert all("skip_" in key for key in changed)  # the model is frozen
    with pytest.raises(ConfigError, match="kind='bottleneck' has nothing to fit"):
        gateskip.fit(found, list(random_ids(20, 64)))


def test_skipgpt_adapts_the_model_afterwards() -> None:
    model = applied("skipgpt")
    method = methods.METHODS.get("skipgpt")(noise=1.0, temperature_start=5.0)
    (first, routers), (second, adapts) = method.stages(model, 0.7)
    assert (first + second, routers.backbone, adapts.backbone) == (1.0, "frozen", "lora")
    assert not adapts.train_gates
    assert adapts.budget_end == 0.7
    assert (routers.decision_noise, adapts.decision_noise) == (1.0, 0.0)
    assert (routers.decision_gradient_start, routers.decision_gradient) == (5.0, 1.0)
