"""``importance="head"``: a score of its own beside the gate, in every execution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, TrainingArguments

import gateskip
from gateskip import kernels
from gateskip.retrofit.attach import gate_of, gated_branches
from gateskip.skipping.state import override, state_of
from gateskip.training import GateSkipTrainer, GateSkipTrainingConfig, make_dataset
from models import gated, medians, random_ids, tiny, with_table


def gates(model: Any) -> list[Any]:
    return [gate_of(m) for m in gated_branches(model, state_of(model).family).values()]


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("kind", ["scalar", "low_rank"])
@torch.no_grad()
def test_it_decides_and_the_gate_scales(kind: str, backend: str) -> None:
    if backend == "numba" and not kernels.available():
        pytest.skip("numba is not installed")
    model = gated(kind=kind, importance="head", compensation="low_rank")
    ids, thresholds = random_ids(1, 16), medians(model)
    with kernels.using(backend), override(state_of(model), thresholds=thresholds):
        with gateskip.trace(model) as compacted:
            logits = model(ids).logits
        with gateskip.execution(model, "masked"):
            torch.testing.assert_close(model(ids).logits, logits, atol=1e-5, rtol=1e-4)
        cache = DynamicCache(config=model.config)
        steps = [model(ids[:, i : i + 1], cache=cache).logits for i in range(16)]
        torch.testing.assert_close(torch.cat(steps, 1), logits, atol=2e-5, rtol=1e-4)
        for gate in gates(model):  # other values, the same decisions where nothing else changed
            gate.bias.fill_(-1.0)
        with gateskip.trace(model) as changed:
            assert not torch.allclose(model(ids).logits, logits, atol=1e-3)
    first = (0, "attention")
    assert 0.2 < compacted.ledger.skip_rate < 0.8
    assert torch.equal(changed.keep[first][0], compacted.keep[first][0])


def test_a_fit_writes_the_head_only_and_saves_it(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "base")
    config = gateskip.GateConfig(kind="scalar", importance="head", compensation="none")
    model = gateskip.attach(tiny(), config)
    before = [gate.weight.detach().clone() for gate in gates(model)]
    texts = [random_ids(1, 64, seed=i)[0] for i in range(40)]
    report = gateskip.fit(model, texts)
    assert min(report.r2.values()) > 0.05
    for gate, weight in zip(gates(model), before, strict=True):
        assert torch.equal(gate.weight, weight)
        assert bool(gate.score_weight.any())
    gateskip.calibrate(model, texts)
    gateskip.save(model, tmp_path / "gates")
    loaded = gateskip.load(tmp_path / "gates", base=str(tmp_path / "base"))
    gateskip.set_budget(model, keep=0.6)
    gateskip.set_budget(loaded, keep=0.6)
    with torch.no_grad():
        assert torch.equal(loaded(texts[0][None]).logits, model(texts[0][None]).logits)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_training_gates_leaves_the_head_unless_decisions_train(
    tmp_path: Path, temperature: float
) -> None:
    model = with_table(gated(kind="scalar", importance="head", compensation="low_rank"))
    heads = [gate.score_weight.detach().clone() for gate in gates(model)]
    values = [gate.weight.detach().clone() for gate in gates(model)]
    options = GateSkipTrainingConfig(
        backbone="frozen", train_gates=True, decision_gradient=temperature,
        budget_start=0.7, budget_end=0.7,
    )  # fmt: skip
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = make_dataset([random_ids(1, 16, seed=i)[0] for i in range(16)])
    GateSkipTrainer(model, arguments, train_dataset=rows, gateskip_args=options).train()
    for gate, head, value in zip(gates(model), heads, values, strict=True):
        assert torch.equal(gate.score_weight, head) == (temperature == 0.0)
        assert not torch.equal(gate.weight, value)
