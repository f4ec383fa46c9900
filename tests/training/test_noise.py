"""Decisions that are tried out: noise on scores while they learn (Gumbel-softmax of two)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

import gateskip
from gateskip.errors import ConfigError
from gateskip.gates import GATES
from gateskip.skipping.state import override, state_of
from gateskip.training import GateSkipTrainer, GateSkipTrainingConfig, make_dataset
from gateskip.training.dataset import Collator
from gateskip.training.objective import GateObjective
from gateskip.training.schedule import temperature_at
from models import gated, random_ids, with_table

NOISY: dict[str, Any] = {
    "backbone": "full", "train_gates": True, "decision_gradient": 0.5, "decision_noise": 1.0,
    "cost_weight": 0.5, "budget_start": 0.7, "budget_end": 0.7,
}  # fmt: skip


def trainer(folder: Path, config: dict[str, Any], **options: Any) -> GateSkipTrainer:
    arguments: dict[str, Any] = {
        "max_steps": 1, "learning_rate": 1e-3, "logging_steps": 1, "report_to": [],
        "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return GateSkipTrainer(
        with_table(gated(compensation="low_rank")),
        TrainingArguments(str(folder), **(arguments | options)),
        train_dataset=make_dataset([random_ids(1, 24, seed=i)[0] for i in range(8)]),
        gateskip_args=GateSkipTrainingConfig(**config),
    )


@torch.no_grad()
def test_a_token_is_kept_with_the_probability_that_its_score_says() -> None:
    model = with_table(gated(kind="scalar"))
    ids, key = random_ids(16, 64), (1, "mlp")
    thresholds = dict.fromkeys(state_of(model).branches, -math.inf) | {key: 0.0}
    gate = model.model.layers[1].mlp.skip_gate
    gate.weight.zero_()  # every token has one score
    for score in (0.7, -1.5):
        gate.bias.fill_(score)
        with override(state_of(model), thresholds=thresholds, noise=1.0):
            with gateskip.trace(model) as one:
                model(ids)
            with gateskip.trace(model) as other:
                model(ids)
        kept = [trace.keep[key][0][:, 1:].float().mean() for trace in (one, other)]
        expected = 1.0 / (1.0 + math.exp(-score))
        for share in kept:  # four standard deviations of 1,024 tokens
            assert float(share) == pytest.approx(expected, abs=0.065)
        assert not torch.equal(one.keep[key][0], other.keep[key][0])
        assert bool(one.keep[0, "attention"][0].all()), "a branch that keeps all has no noise"


def gradients(run: GateSkipTrainer) -> dict[str, Tensor]:
    run.model.train()
    torch.manual_seed(0)
    batch = Collator()([run.train_dataset[i] for i in range(4)])
    run.compute_loss(run.model, batch).backward()
    found = {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}
    run.model.zero_grad(set_to_none=True)
    return {name: g for name, g in found.items() if g is not None}


def test_recomputed_and_masked_steps_see_the_same_noise(tmp_path: Path) -> None:
    plain = gradients(trainer(tmp_path, NOISY))
    silent = gradients(trainer(tmp_path, NOISY | {"decision_noise": 0.0}))
    name = next(name for name in plain if name.endswith("skip_gate.bias"))
    assert not torch.allclose(plain[name], silent[name], rtol=0.1)
    run = trainer(tmp_path, NOISY)
    run.model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients(run)
    with gateskip.execution(run.model, "masked"):
        masked = gradients(run)
    for other in (again, masked):
        assert other.keys() == plain.keys()
        for name, g in plain.items():
            scale = float(g.abs().max()) + 1e-6
            torch.testing.assert_close(other[name] / scale, g / scale, atol=2e-3, rtol=0)


def test_the_gradient_is_that_of_the_decision_that_was_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    gate: Any = GATES.get("scalar").build(gateskip.GateConfig(kind="scalar"), 8, generator)
    u, o, noise = torch.randn(6, 8), torch.randn(6, 8), torch.randn(6)
    objective = GateObjective(penalty=None, temperature=0.5, everyone=True)
    objective.decision(gate, o, u, 0.2, None, o, noise).sum().backward()
    p = torch.sigmoid((gate.score(u) + noise - 0.2) / 0.5)
    (expected,) = torch.autograd.grad((p[:, None] * o).sum(), [gate.weight])
    torch.testing.assert_close(gate.weight.grad, expected)


def test_inference_draws_nothing(tmp_path: Path) -> None:
    run = trainer(tmp_path, NOISY, max_steps=2)
    run.train()
    model, ids = run.finish(), random_ids(2, 24)
    with torch.no_grad(), gateskip.budget(model, compute=0.7):
        assert torch.equal(model(ids).logits, model(ids).logits)
    losses = {run.evaluate(make_dataset(list(ids)))["eval_loss"] for _ in range(2)}
    assert len(losses) == 1


def test_the_temperature_falls_linearly() -> None:
    falls = GateSkipTrainingConfig(
        train_gates=True, decision_gradient=1.0, decision_gradient_start=5.0
    )
    assert [temperature_at(falls, step, 5) for step in range(5)] == [5.0, 4.0, 3.0, 2.0, 1.0]
    flat = GateSkipTrainingConfig(train_gates=True, decision_gradient=0.5)
    assert temperature_at(flat, 3, 5) == 0.5


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"decision_noise": 1.0}, "decision_noise=1.0 needs decision_gradient="),
        ({"decision_gradient_start": 5.0}, "decision_gradient_start=5.0 needs decision_gradient="),
        (
            {"decision_gradient_start": 0.0, "decision_gradient": 1.0},
            "decision_gradient_start=0.0 must be above 0",
        ),
        ({"decision_noise": -1.0, "decision_gradient": 1.0}, "decision_noise=-1.0 must not"),
    ],
)
def test_noise_needs_decisions_that_learn(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        GateSkipTrainingConfig(train_gates=True, **options)
