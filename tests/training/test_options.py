"""Penalties, schedules and thresholds of training: each value does what its name says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

import gateskip
from gateskip.errors import ConfigError, UnsupportedError
from gateskip.retrofit.attach import gate_of, gated_branches
from gateskip.skipping.quantile import BatchQuantile, lowest
from gateskip.skipping.state import override, state_of
from gateskip.training import GateSkipTrainer, GateSkipTrainingConfig, make_dataset
from gateskip.training.objective import GateObjective
from gateskip.training.penalty import GateMeans
from gateskip.training.presets import PRESETS, preset
from gateskip.training.schedule import budget_at, penalty_at
from gateskip.training.thresholds import RunningThresholds
from models import gated, medians, padded, random_ids, with_table

GATES: dict[str, Any] = {
    "backbone": "frozen", "train_gates": True, "train_compensation": False, "penalty": 1.0,
    "budget_unit": "keep", "budget_start": 0.7, "budget_end": 0.7,
}  # fmt: skip
TEXT = [random_ids(1, 100, seed=i)[0] for i in range(12)]


def data(rows: int = 16) -> Any:
    return make_dataset([random_ids(1, 9 + (5 * i) % 14, seed=i)[0] for i in range(rows)])


def trainer(
    folder: Path, config: dict[str, Any], *, model: Any = None, text: Any = None, **arguments: Any
) -> GateSkipTrainer:
    defaults: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return GateSkipTrainer(
        with_table(gated()) if model is None else model,
        TrainingArguments(str(folder), **(defaults | arguments)),
        train_dataset=data(), gateskip_args=GateSkipTrainingConfig(**config), calibration_data=text,
    )  # fmt: skip


def values(model: Any) -> dict[Any, Tensor]:
    """Σ mean g over valid tokens of the training rows, over their number, per branch."""
    batch = [data()[i]["input_ids"] for i in range(16)]
    totals: dict[Any, float] = {}
    tokens = 0
    for ids in batch:
        objective = GateObjective(penalty="l1")
        with override(state_of(model), objective=objective):
            model(ids[None])
        tokens += objective.tokens
        for key, total in objective.sums.items():
            totals[key] = totals.get(key, 0.0) + float(total.detach())
    return {key: torch.tensor(total / tokens) for key, total in totals.items()}


# -- penalties ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_penalties_by_token(kind: str) -> None:
    model, objective = gated(), GateObjective(penalty=kind)
    ids, mask, _ = padded(3, 12, "right")
    inputs: dict[Any, Tensor] = {}

    class Seen(GateObjective):
        def branch(self, key: Any, gate: Any, u_BTH: Tensor, call: Any) -> None:
            inputs[key] = u_BTH

    with override(state_of(model), objective=Seen()):
        model(ids, attention_mask=mask)
    with override(state_of(model), objective=objective):
        model(ids, attention_mask=mask)
    branches = gated_branches(model, state_of(model).family)
    g = torch.stack([gate_of(branches[key])(u)[mask.bool()] for key, u in inputs.items()])
    torch.testing.assert_close(objective.mean(), (g if kind == "l1" else g.square()).mean())


def test_kl_converges_to_its_target(tmp_path: Path) -> None:
    config = GATES | {"penalty_kind": "kl", "penalty_target": 0.4, "penalty": 20.0}
    run = trainer(tmp_path, config, max_steps=120, learning_rate=3e-2)
    start = values(run.model)
    run.train()
    found = values(run.model)
    assert max(abs(float(v) - 0.4) for v in start.values()) > 0.1
    assert all(float(v) == pytest.approx(0.4, abs=0.06) for v in found.values())
    assert run._means is not None
    assert run._means.value() < 0.01


def test_hinge_stops_at_the_budget(tmp_path: Path) -> None:
    config = GATES | {"penalty_kind": "hinge", "penalty_target": 0.5, "penalty": 100.0}
    run = trainer(tmp_path, config, max_steps=100, learning_rate=3e-2)
    run.train()
    found = values(run.model)
    mean = sum(map(float, found.values())) / len(found)
    assert mean == pytest.approx(0.5, abs=0.05), "and not to 0, as an L1 penalty would"
    assert max(map(float, found.values())) - min(map(float, found.values())) > 0.02


@pytest.mark.parametrize("kind", ["kl", "hinge"])
def test_slopes_are_the_penaltys_gradient(kind: str) -> None:
    keys = [(0, "attention"), (0, "mlp"), (1, "mlp")]
    means = GateMeans(kind, 0.45, keys, 0.9)
    base = [0.6, 0.3, 0.8]
    means.take(base)
    for i, (key, slope) in enumerate(means.slopes().items()):
        near = []
        for step in (1e-5, -1e-5):
            means.take([m + step * (i == j) for j, m in enumerate(base)])
            near.append(means.value())
        means.take(base)
        assert slope / len(keys) == pytest.approx((near[0] - near[1]) / 2e-5, rel=1e-3), key


@pytest.mark.parametrize("kind", ["l1", "kl", "hinge"])
def test_penalties_do_not_depend_on_accumulation(tmp_path: Path, kind: str) -> None:
    found = []
    for batch, accumulate in ((8, 1), (2, 4)):
        run = trainer(
            tmp_path, GATES | {"penalty_kind": kind, "penalty_target": 0.3}, max_steps=2,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
            optim="sgd", learning_rate=0.1, max_grad_norm=0.0,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        run.train()
        found.append({n: p.detach() for n, p in run.model.named_parameters() if "skip_gate" in n})
        if kind != "l1":
            assert run._means is not None
            found[-1]["means"] = torch.tensor(run._means.to_json())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-4)


def test_an_annealed_penalty(tmp_path: Path) -> None:
    config = GateSkipTrainingConfig(train_gates=True, penalty=1.0, penalty_end=0.2)
    assert [penalty_at(config, s, 5) for s in range(5)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert penalty_at(GateSkipTrainingConfig(train_gates=True, penalty=0.3), 7, 9) == 0.3
    run = trainer(tmp_path, GATES | {"penalty_end": 0.0}, learning_rate=0.0)
    run.train()
    entries = [e for e in run.state.log_history if "loss" in e]
    # The last step has λ = 0: the loss is the cross-entropy alone.
    assert entries[-1]["loss"] == pytest.approx(entries[-1]["cross_entropy"], abs=1e-4)
    first = entries[0]
    assert first["loss"] == pytest.approx(first["cross_entropy"] + first["gate_penalty"], abs=1e-4)


# -- schedules ------------------------------------------------------------------------------


def test_cosine_and_constant() -> None:
    cosine = GateSkipTrainingConfig(schedule="cosine", budget_end=0.6, budget_steps=0.5)
    found = [budget_at(cosine, step, 20, 0).compute for step in range(20)]
    assert found[0] == 1.0
    assert found[1] == pytest.approx(1.0 - 0.4 * (1 - math.cos(math.pi / 10)) / 2)
    assert found[5] == pytest.approx(0.8)
    assert found[10:] == [pytest.approx(0.6)] * 10
    constant = GateSkipTrainingConfig(schedule="constant", budget_end=0.6)
    assert {budget_at(constant, step, 20, 0).compute for step in range(20)} == {0.6}


def test_branches_with_budgets_of_their_own(tmp_path: Path) -> None:
    config = GATES | {
        "penalty": 0.0, "budget_attention": 0.3, "budget_mlp": 0.9, "schedule": "constant",
    }  # fmt: skip
    run = trainer(tmp_path, config, max_steps=1)
    run.train()
    (entry,) = [e for e in run.state.log_history if "loss" in e]
    assert entry["skip_rate_attention"] > entry["skip_rate_mlp"] + 0.3


# -- thresholds -----------------------------------------------------------------------------


def test_a_batch_quantile_keeps_what_it_says() -> None:
    model = gated()
    ids, mask, _ = padded(3, 20, "left")
    thresholds = dict.fromkeys(state_of(model).branches, BatchQuantile(0.6))
    with override(state_of(model), thresholds=thresholds), gateskip.trace(model) as trace:
        model(ids, attention_mask=mask)
    n = int(mask.sum())
    for masks in trace.keep.values():
        assert int(masks[0].sum()) == n - math.floor(0.4 * n + 1e-6)
    assert float(lowest(torch.tensor([2.0, 2.0, 2.0, 5.0]), 2)) == 2.0, "ties skip nobody more"


@torch.no_grad()
def test_a_batch_quantile_is_not_causal() -> None:
    """Labelled so: later tokens and other rows change what is skipped (I4, I5 do not hold)."""
    model = gated()
    thresholds = dict.fromkeys(state_of(model).branches, BatchQuantile(0.5))
    ids = random_ids(2, 16)
    changed = ids.clone()
    changed[:, 10:] = random_ids(2, 6, seed=9)
    with override(state_of(model), thresholds=thresholds), gateskip.trace(model) as trace:
        model(ids)
        model(changed)
        model(ids[:1])
    first = trace.keep.values()
    assert any(not torch.equal(a[:, :10], b[:, :10]) for a, b, _ in first), "I4"
    assert any(not torch.equal(a[:1], c) for a, _, c in first), "I5"


def test_training_with_batch_thresholds_needs_no_calibration(tmp_path: Path) -> None:
    config = GATES | {"thresholds": "batch", "schedule": "constant"}
    run = trainer(tmp_path, config, model=gated(), max_steps=2)
    run.train()
    for entry in (e for e in run.state.log_history if "loss" in e):
        assert entry["skip_rate_attention"] == pytest.approx(0.3, abs=0.02)
        assert entry["skip_rate_mlp"] == pytest.approx(0.3, abs=0.02)


def test_running_thresholds_reach_their_budget(tmp_path: Path) -> None:
    config = GATES | {"thresholds": "running", "threshold_momentum": 0.5, "schedule": "constant"}
    run = trainer(tmp_path, config, model=gated(), max_steps=8, learning_rate=0.0)
    run.train()
    entries = [e for e in run.state.log_history if "loss" in e]
    assert entries[0]["skip_rate"] == 0.0, "nothing is known before the first step"
    for entry in entries[3:]:
        assert entry["skip_rate"] == pytest.approx(0.3, abs=0.08)


def test_running_thresholds_do_not_depend_on_accumulation_and_resume(tmp_path: Path) -> None:
    config = GATES | {"thresholds": "running", "penalty_kind": "kl", "schedule": "constant"}

    def run(name: str, batch: int, **more: Any) -> GateSkipTrainer:
        return trainer(
            tmp_path / name, config, model=gated(), per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch, optim="sgd", learning_rate=0.05,
            max_grad_norm=0.0, **more,
        )  # fmt: skip

    whole, parts = run("a", 8, save_strategy="steps", save_steps=2), run("b", 2)
    whole.train()
    parts.train()

    def thresholds(made: GateSkipTrainer) -> list[float]:
        assert made._own is not None
        assert made._own.running is not None
        return [row[2] for row in made._own.running.to_json()]

    assert thresholds(parts) == pytest.approx(thresholds(whole), abs=1e-4)
    again = run("a", 8)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert thresholds(again) == thresholds(whole)
    for (name, a), (_, b) in zip(
        whole.model.named_parameters(), again.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    saved = json.loads((tmp_path / "a" / "checkpoint-2" / "gateskip_training.json").read_text())
    assert len(saved["averages"]["gate_means"]) == len(state_of(whole.model).branches)


@torch.no_grad()
def test_running_thresholds_are_causal() -> None:
    model = gated()
    running = RunningThresholds(0.9, medians(model))
    ids = random_ids(2, 16)
    changed = ids.clone()
    changed[:, 10:] = random_ids(2, 6, seed=9)
    with gateskip.trace(model) as trace:
        for batch in (ids, changed):
            given = running.thresholds(state_of(model).branches)
            with override(state_of(model), thresholds=given, scores=running):
                model(batch)
    for a, b in trace.keep.values():
        assert torch.equal(a[:, :10], b[:, :10])


def test_learned_thresholds_answer_to_cost(tmp_path: Path) -> None:
    """A higher price of MACs skips more; the learned thresholds are saved as a policy."""
    kept = []
    for weight in (0.01, 3.0):
        config = {
            "backbone": "frozen", "train_compensation": False, "thresholds": "learned",
            "decision_gradient": 0.5, "cost_weight": weight, "budget_unit": "keep",
            "budget_start": 0.7, "budget_end": 0.7,
        }  # fmt: skip
        run = trainer(tmp_path / str(weight), config, text=TEXT, max_steps=20, learning_rate=3e-2)
        before = {n for n, _ in run.model.named_parameters() if n.endswith("skip_gate.threshold")}
        assert len(before) == len(state_of(run.model).branches)
        gates = {n: p.detach().clone() for n, p in run.model.named_parameters() if n not in before}
        run.train()
        for name, parameter in run.model.named_parameters():
            assert name in before or torch.equal(parameter, gates[name]), "only thresholds move"
        model = run.finish()
        policy = state_of(model).policy
        assert policy is not None
        kept.append(policy.keep[-1])
        assert not any("threshold" in name for name, _ in model.named_parameters())
        gateskip.save(model, tmp_path / "saved")
        with torch.no_grad(), gateskip.budget(model, keep=policy.keep[-1]):
            with gateskip.trace(model) as trace:
                model(torch.stack(TEXT))
        assert 1 - trace.ledger.skip_rate == pytest.approx(policy.keep[-1], abs=0.02)
    assert kept[1] < kept[0] - 0.1


# -- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"penalty_kind": "l3"}, "penalty_kind='l3'"),
        ({"penalty_target": 0.0}, "penalty_target=0.0"),
        ({"penalty_end": 0.1}, "penalty_end=0.1 needs penalty="),
        ({"thresholds": "bach"}, "Did you mean 'batch'"),
        ({"thresholds": "batch"}, "set budget_unit='keep'"),
        ({"thresholds": "running"}, "set budget_unit='keep'"),
        ({"budget_mlp": 0.5}, "budget_attention and budget_mlp count tokens"),
        ({"thresholds": "learned"}, "needs decision_gradient="),
        ({"threshold_momentum": 1.0}, "threshold_momentum=1.0"),
        (
            {"thresholds": "batch", "budget_unit": "keep", "train_gates": True,
             "decision_gradient": 0.5},
            "known before the batch",
        ),
        (
            {"thresholds": "batch", "budget_unit": "keep", "calibrate_every": 5},
            "calibrate_every=5",
        ),
    ],
)  # fmt: skip
def test_contradictions(config: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        GateSkipTrainingConfig(**config)


def test_learned_thresholds_need_a_beginning_and_text(tmp_path: Path) -> None:
    config = {"thresholds": "learned", "decision_gradient": 0.5, "cost_weight": 0.1}
    with pytest.raises(ConfigError, match="needs calibration_data="):
        trainer(tmp_path, config)
    with pytest.raises(ConfigError, match="begin at calibrated ones"):
        trainer(tmp_path, config, model=gated(), text=TEXT)
    with pytest.raises(ConfigError, match="a gate for every branch"):
        trainer(tmp_path, config, model=with_table(gated(kind="shared")), text=TEXT)
    with pytest.raises(UnsupportedError, match="use_reentrant"):
        trainer(
            tmp_path, config, text=TEXT, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )  # fmt: skip


def test_straight_through_weighs_one_branch(tmp_path: Path) -> None:
    config = GATES | {"penalty": 0.0, "decision_gradient": 0.5}
    with pytest.raises(ConfigError, match="decision='layer' skips two at once"):
        trainer(tmp_path, config, model=with_table(gated(decision="layer")))


# -- presets --------------------------------------------------------------------------------


def test_presets(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'paper'"):
        preset("papr")
    for name, recipe in PRESETS.items():
        TrainingArguments(str(tmp_path), **recipe.trainer)
        assert recipe.gate.to_json(), name
    paper = preset("paper")
    assert (paper.gate.kind, paper.gate.kv_source) == ("vector", "previous")
    model = gateskip.attach(gateskip.detach(gated()), gateskip.GateConfig(**paper.gate.to_json()))
    run = GateSkipTrainer(
        model,
        TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=8, logging_steps=1,
            report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
            **(paper.trainer | {"warmup_steps": 1}),
        ),
        train_dataset=data(), gateskip_args=paper.training,
    )  # fmt: skip
    run.train()
    entries = [e for e in run.state.log_history if "loss" in e]
    assert entries[0]["skip_rate"] == 0.0, "the budget begins at 1, and the paper's code skips one"
    assert entries[-1]["skip_rate"] > 0.03
    assert all("gate_penalty" in entry for entry in entries)
