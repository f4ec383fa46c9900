"""CALM, FREE and LayerSkip: tokens that leave early."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import gateskip
from gateskip import methods
from gateskip.errors import ConfigError
from gateskip.execution.api import dense as without_gates
from gateskip.skipping.policy import OFF
from gateskip.skipping.rule import rule_of
from gateskip.skipping.state import override, state_of
from method_models import applied, trained
from models import random_ids, tiny


@pytest.mark.parametrize("measure", ["softmax", "state", "probe"])
@torch.no_grad()
def test_exits_from_none_to_all(measure: str) -> None:
    model, ids = applied("calm", measure=measure, decay=0.0), random_ids(2, 16)
    state, dense = state_of(model), tiny()
    keys = state.branches

    def at(confidence: float) -> tuple[Tensor, Any]:
        with (
            override(state, thresholds=dict.fromkeys(keys, -confidence / 0.9)),
            gateskip.trace(model) as trace,
        ):
            return model(ids).logits, trace

    found, trace = at(1.001)  # nobody is that sure
    torch.testing.assert_close(found, dense(ids).logits, atol=1e-5, rtol=1e-5)
    assert trace.ledger.skip_rate == 0.0
    assert trace.ledger.compute > 1.0  # who was asked costs
    found, trace = at(-1.1)  # everybody leaves after the first layer, the first token apart
    short = tiny()
    del short.model.layers[1:]
    expected = short(ids, use_cache=False).logits
    torch.testing.assert_close(found[:, 1:], expected[:, 1:], atol=1e-4, rtol=1e-4)
    assert trace.ledger.skip_rate == pytest.approx(15 / 16 * 3 / 4)


@torch.no_grad()
def test_thresholds_of_exits_fall_with_the_place() -> None:
    ids, (decay, horizon) = random_ids(1, 64), (8.0, 16)
    model = applied("calm", decay=decay, horizon=horizon)
    state, dense = state_of(model), tiny()
    h = dense(ids, output_hidden_states=True).hidden_states[1]
    top = dense.lm_head(dense.model.norm(h)).softmax(-1)[0].topk(2).values
    sure = top[:, 0] - top[:, 1]
    level = float(sure.median())
    place = torch.arange(1, 65)

    def leaves(fall: float) -> Tensor:
        found = sure >= 0.9 * level + 0.1 * (-fall * place / horizon).exp()
        found[0] = False  # the first token is protected
        return found

    with (
        override(state, thresholds=dict.fromkeys(state.branches, -level)),
        gateskip.trace(model) as trace,
    ):
        model(ids)
    assert torch.equal(~trace.keep[1, "attention"][0][0], leaves(decay))
    assert not torch.equal(leaves(decay), leaves(0.0))
    assert not torch.equal(leaves(decay), leaves(-decay))


def test_exits_under_a_bound_on_the_loss() -> None:
    model = applied("calm")
    texts = [random_ids(1, 20, seed=500 + n) for n in range(120)]
    report = gateskip.control_risk(model, texts, max_loss_increase=0.5, confidence=0.9)
    assert report.met
    assert report.budget.value < 1.0
    assert state_of(model).default_budget == report.budget
    strict = gateskip.control_risk(model, texts, min_agreement=0.95, confidence=0.9)
    assert not strict.met


def asked(model: Any, ids: Tensor) -> tuple[int, Any]:
    """(rows that reached the LM head of an exit rule, the trace) of a call at a budget."""
    rows, rule = [0], cast(Any, rule_of(state_of(model)))
    handle = rule.head.register_forward_pre_hook(
        lambda _, args: rows.__setitem__(0, rows[0] + args[0].shape[0])
    )
    with gateskip.budget(model, compute=0.8), gateskip.trace(model) as trace:
        model(ids)
    handle.remove()
    return rows[0], trace


@torch.no_grad()
def test_calls_of_the_head_are_counted() -> None:
    rows, trace = asked(applied("calm"), random_ids(2, 16))
    record = trace.calls[0]
    assert rows == sum(int(tokens.sum()) for tokens, _ in record.asked.values())
    # Asked is who was there before.
    for layer in range(1, 4):
        there = trace.keep[layer - 1, "attention"][0] if layer > 1 else torch.ones(2, 16).bool()
        assert torch.equal(record.asked[layer, "attention"][0], there.sum(1))
    # Who has left does not come back.
    for layer in range(1, 4):
        before, now = (trace.keep[i, "attention"][0] for i in (layer - 1, layer))
        assert not (now & ~before).any()


@torch.no_grad()
def test_free_leaves_after_the_shallow_model_or_not_at_all() -> None:
    model, ids = applied("free", layers=2), random_ids(2, 16)
    state = state_of(model)
    rows, trace = asked(model, ids)
    assert rows == 32  # everybody is asked once
    masks = [trace.keep[layer, "attention"][0] for layer in range(4)]
    assert all(mask.all() for mask in masks[:2])
    assert torch.equal(masks[2], masks[3])
    assert 0 < int(masks[2].sum()) < 32
    # At a threshold that everybody passes it is the shallow model, the first token apart.
    with override(state, thresholds=dict.fromkeys(state.branches, 1.1)):
        found = model(ids).logits
    short = tiny()
    del short.model.layers[2:]
    expected = short(ids, use_cache=False).logits
    torch.testing.assert_close(found[:, 1:], expected[:, 1:], atol=1e-4, rtol=1e-4)
    for layers in (0, 4):
        with pytest.raises(ConfigError, match=f"layers={layers}"):
            applied("free", layers=layers)


def test_free_draws_shallow_states_to_deep_ones(tmp_path: Path) -> None:
    from gateskip.training.exit_loss import exit_weights, layer_distance

    assert exit_weights("shallow", 4, 7, 2) == pytest.approx([0, 2 / 6, 0, 4 / 6])
    states = [torch.full((3, 5), float(value), requires_grad=True) for value in (1, 2, 4, 8)]
    distance = layer_distance(states, 2)  # layers 0 and 1 to 1 and 3
    assert float(distance.detach()) == pytest.approx(((1 - 2) ** 2 + (2 - 8) ** 2) / 2)
    distance.backward()
    assert states[3].grad is None
    assert states[1].grad is not None
    model = applied("free", layers=2)
    options = methods.METHODS.get("free")(layers=2, distill=5.0).training(model, 0.75)
    options = dataclasses.replace(options, backbone="full")
    model, logged = trained(model, options, tmp_path, steps=16, rate=5e-3)
    distances = [log["exit_distillation"] for log in logged if "exit_distillation" in log]
    assert distances[-1] < 0.9 * distances[0]


def test_exits_that_were_saved_before_they_could_end() -> None:
    from gateskip.methods.exits import ExitRule

    tensors = dict(ExitRule("state", decay=1.0, horizon=9, first=2, last=3).tensors())
    again = ExitRule.of_tensors(tensors)
    assert (again.measure, again.horizon, again.first, again.last) == ("state", 9, 2, 3)
    tensors["settings"] = tensors["settings"][:4]
    assert ExitRule.of_tensors(tensors).last is None


def test_rows_without_labels_have_no_distance(tmp_path: Path) -> None:
    model = applied("free", layers=2)
    options = methods.METHODS.get("free")(layers=2).training(model, 0.75)
    rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in random_ids(8, 32)]
    for row in rows[:4]:
        row["labels"] = [-100] * 32
    _, logged = trained(
        model, options, tmp_path, steps=1, rate=0.0, rows=rows, gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    whole = applied("free", layers=2)
    _, expected = trained(
        whole, options, tmp_path / "whole", steps=1, rate=0.0, rows=rows[4:],
        train_sampling_strategy="sequential",
    )  # fmt: skip
    for name in ("exit_distillation", "exit_loss"):
        assert logged[0][name] == pytest.approx(expected[0][name], rel=1e-4), name


def test_deeper_layers_are_dropped_more_often() -> None:
    from gateskip.skipping.quantile import RowDropout
    from gateskip.training.thresholds import OwnThresholds

    model = applied("layerskip")
    options = methods.METHODS.get("layerskip")(layer_dropout=0.4).training(model, 0.75)
    found = OwnThresholds(model, options).now({})["thresholds"]
    rates = [found[layer, "attention"].rate for layer in range(4)]
    assert rates == pytest.approx([0.4 * (2 ** (layer / 3) - 1) for layer in range(4)])
    assert all(found[layer, "mlp"].rate == rate for layer, rate in enumerate(rates))
    assert OwnThresholds(model, options).now(None) == {}, "not while evaluating"
    torch.manual_seed(0)
    free = torch.ones(20_000, 1, dtype=torch.bool)
    gone = RowDropout(0.3).threshold(torch.zeros(20_000, 1), free, free) >= OFF
    assert float(gone.float().mean()) == pytest.approx(0.3, abs=0.01)


def test_losses_of_all_layers(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    from gateskip.training.exit_loss import exit_weights

    assert exit_weights("weighed", 3, 0) == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert exit_weights("rotating", 4, 5) == pytest.approx([0.0, 0.2 / 3.8, 0.0, 3.6 / 3.8])
    turns = [exit_weights("rotating", 9, step) for step in range(4)]
    assert all(sum(turn) == pytest.approx(1.0) and turn[-1] > 0.0 for turn in turns)
    assert {i for turn in turns for i, weight in enumerate(turn) if weight} == set(range(1, 9))
    rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in random_ids(8, 32)]
    ids = torch.tensor([row["input_ids"] for row in rows])
    for name, kind in (("calm", "weighed"), ("layerskip", "rotating")):
        model = applied(name)
        options = methods.METHODS.get(name)().training(model, 0.75)
        assert options.exit_loss == kind

        def trainer(steps: int, dropout: float, model: Any = model, options: Any = options) -> Any:
            return gateskip.GateSkipTrainer(
                model=model,
                args=TrainingArguments(
                    output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=8,
                    use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1,
                ),
                gateskip_args=dataclasses.replace(
                    options, backbone="full", layer_dropout=dropout
                ),
                train_dataset=rows,
            )  # fmt: skip

        made = trainer(1, 0.0)
        model.train()
        found = made.compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
        model.eval()
        with torch.no_grad(), without_gates(model):
            hidden = list(model(ids, output_hidden_states=True).hidden_states[1:])
            hidden[:-1] = [model.model.norm(h) for h in hidden[:-1]]
            losses = [
                nn.functional.cross_entropy(
                    model.lm_head(h)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
                )
                for h in hidden
            ]
        weights = exit_weights(kind, 4, 0)
        expected = sum(w * float(loss) for w, loss in zip(weights, losses, strict=True))
        assert float(found.detach()) == pytest.approx(expected, rel=1e-4), name
        found.backward()
        assert model.model.layers[1].mlp.down_proj.weight.grad is not None
        if name == "layerskip":
            dropped = trainer(8, 0.5)
            dropped.train()
            skipped = [log["skip_rate"] for log in dropped.state.log_history if "skip_rate" in log]
            assert max(skipped) > 0.0


@torch.no_grad()
def test_exits_have_one_threshold() -> None:
    model = applied("calm")
    with pytest.raises(ConfigError, match="exits have one threshold"):
        gateskip.calibrate(model, list(random_ids(20, 64)), allocation="uniform")
    # What is promised between grid points holds on the text itself.
    texts, table = list(random_ids(20, 64)), state_of(model).policy
    assert table is not None
    for keep in (0.93, 0.87, 0.8, 0.73):
        if keep < table.floor("keep"):
            continue
        with gateskip.budget(model, keep=keep), gateskip.trace(model) as trace:
            model(torch.stack(texts))
        assert 1.0 - trace.ledger.skip_rate == pytest.approx(keep, abs=0.02)
