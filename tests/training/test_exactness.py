"""The same gradients whatever the padding, the packing, the checkpointing; gates under autocast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from test_trl import words
from torch import Tensor
from transformers import TrainingArguments

import gateskip
from gateskip.skipping.state import override, state_of
from gateskip.training import (
    GateSkipMixin,
    GateSkipTrainer,
    GateSkipTrainingConfig,
    make_dataset,
)
from gateskip.training.objective import GateObjective, SkipMeter
from models import gated, medians, random_ids, with_table

LENGTHS = (9, 5, 12, 7)


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def loss(logits_BTV: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
    """Sum of cross-entropies of next tokens; ``counted`` are those whose predecessor is theirs."""
    return torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1][counted[:, 1:]], ids[:, 1:][counted[:, 1:]], reduction="sum"
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("protected", [1, 2])
def test_packing_is_padding(family: str, attention: str, protected: int) -> None:
    """Sequences in one row see nothing of one another: decisions, loss and gradients agree."""
    rows = [random_ids(1, n, seed=i)[0] for i, n in enumerate(LENGTHS)]
    longest = max(LENGTHS)
    ids = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])
    mask = torch.stack([(torch.arange(longest) < n).long() for n in LENGTHS])
    packed = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    model = gated(family, attention, compensation="low_rank", protected_first=protected)
    thresholds = medians(model)
    found = []
    for given, counted in (
        ({"input_ids": ids, "attention_mask": mask}, mask.bool() & (mask.cumsum(-1) > 1)),
        ({"input_ids": packed, "position_ids": positions}, positions > 0),
    ):
        model.zero_grad()
        objective = GateObjective()
        with override(state_of(model), thresholds=thresholds, objective=objective):
            with gateskip.trace(model) as trace:
                logits = model(**given, use_cache=False).logits
        total = loss(logits, given["input_ids"], counted)
        (total + 10.0 * objective.mean()).backward()
        valid = mask.bool() if "attention_mask" in given else torch.ones_like(packed).bool()
        keep = {key: masks[0][valid] for key, masks in trace.keep.items()}
        found.append((total.detach(), gradients(model), keep))
    (loss_a, grads_a, keep_a), (loss_b, grads_b, keep_b) = found
    assert 0.2 < 1 - torch.stack([k.float().mean() for k in keep_a.values()]).mean() < 0.7
    for key, kept in keep_a.items():
        assert torch.equal(keep_b[key], kept), key
    torch.testing.assert_close(loss_b, loss_a, atol=1e-4, rtol=1e-5)
    assert grads_a.keys() == grads_b.keys()
    for name, grad in grads_a.items():
        scale = float(grad.abs().max()) + 1e-6
        torch.testing.assert_close(grads_b[name] / scale, grad / scale, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_trl_packing_trains_as_a_padded_batch(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    class Trainer(GateSkipMixin, SFTTrainer):  # type: ignore[misc]
        pass

    texts = [" ".join(f"w{(7 * i + 3 * j) % 120}" for j in range(6 + i)) for i in range(4)]
    config = GateSkipTrainingConfig(
        backbone="full", train_gates=True, penalty=0.5, budget_start=0.7, budget_end=0.7
    )
    changes = []
    for packing in (False, True):
        model = with_table(gated(compensation="low_rank"))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        arguments = SFTConfig(
            str(tmp_path), max_steps=1, per_device_train_batch_size=1 if packing else 4,
            use_cpu=True, report_to=[], bf16=False, learning_rate=1.0, optim="sgd",
            max_grad_norm=0.0, disable_tqdm=True, packing=packing, max_length=64,
            gradient_checkpointing=False, logging_steps=1,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=Dataset.from_list([{"text": t} for t in texts]),
            processing_class=words(), gateskip_args=config,
        )  # fmt: skip
        trainer.train()
        changes.append({n: before[n] - p.detach() for n, p in model.named_parameters()})
        (entry,) = [e for e in trainer.state.log_history if "loss" in e]
        assert entry["gate_penalty"] > 0
    for name, change in changes[0].items():
        scale = float(change.abs().max()) + 1e-6
        torch.testing.assert_close(changes[1][name] / scale, change / scale, atol=2e-3, rtol=0)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["compacted", "masked"])
def test_checkpointing_replays_decisions(reentrant: bool, mode: str) -> None:
    model = gated(compensation="low_rank").train()
    ids, thresholds = random_ids(3, 14), medians(model)
    found, meters = [], []
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        meter = SkipMeter()
        state = state_of(model)
        with override(state, thresholds=thresholds, recorder=meter):
            with gateskip.execution(model, mode):
                out = model(ids, use_cache=False).logits
                out.square().mean().backward()
        found.append(gradients(model))
        meters.append(meter.rates())
    assert meters[0] == meters[1], "counted once"
    assert 0.2 < meters[0]["skip_rate"] < 0.8
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-5)


def test_gates_stay_float32_under_autocast(tmp_path: Path) -> None:
    """Decisions are those of float32 arithmetic on what the bfloat16 stream holds."""
    model = with_table(gated(compensation="low_rank"))
    run = GateSkipTrainer(
        model,
        TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2,
            logging_steps=1, report_to=[], use_cpu=True, bf16=True, disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=make_dataset([random_ids(1, 12, seed=i)[0] for i in range(8)]),
        gateskip_args=GateSkipTrainingConfig(
            backbone="full", train_gates=True, penalty=0.1, budget_start=0.7, budget_end=0.7
        ),
    )  # fmt: skip
    seen: list[torch.dtype] = []
    for name, parameter in model.named_parameters():
        if ".skip_gate." in name:
            assert parameter.dtype == torch.float32
            parameter.register_hook(lambda grad: seen.append(grad.dtype))
    values: list[torch.dtype] = []
    for module in model.modules():
        if type(module).__name__ == "LowRankGate":
            module.register_forward_hook(lambda _m, _a, out: values.append(out.dtype))
    run.train()
    assert set(seen) == {torch.float32}
    assert set(values) == {torch.float32}
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_decisions_under_autocast_are_those_of_float32_scores(dtype: torch.dtype) -> None:
    model, ids = gated(), random_ids(2, 14)
    scores: dict[Any, Tensor] = {}

    class Taken:
        def add(self, key: Any, score_BT: Tensor, call: Any) -> None:
            scores[key] = score_BT

    thresholds = medians(model)
    with override(state_of(model), thresholds=thresholds, scores=Taken()):
        with torch.autocast("cpu", dtype), gateskip.trace(model) as trace:
            model(ids)
    first = (0, "attention")  # whose input no product has rounded yet
    assert scores[first].dtype == torch.float32
    with override(state_of(model), thresholds=thresholds, scores=Taken()):
        exact = scores[first].clone()
        model(ids)
    torch.testing.assert_close(scores[first], exact, atol=1e-5, rtol=1e-5)
    assert trace.ledger.skip_rate > 0.2


@pytest.mark.parametrize("kind", ["l2", "kl"])
def test_a_loss_of_several_forwards_counts_them_all(kind: str) -> None:
    """As preference losses that run chosen and rejected answers apart."""
    model = gated()
    state = state_of(model)
    long, short = random_ids(2, 20), random_ids(3, 7, seed=1)
    slopes = dict.fromkeys(state.branches, 0.5)

    def taken(*batches: torch.Tensor) -> GateObjective:
        objective = GateObjective(penalty=kind, slopes=slopes if kind == "kl" else None)
        with override(state, objective=objective):
            for ids in batches:
                model(ids)
        return objective

    one, other, both = taken(long), taken(short), taken(long, short)
    assert both.tokens == one.tokens + other.tokens == 61
    whole = one.mean() * one.tokens + other.mean() * other.tokens
    assert float(both.mean().detach()) == pytest.approx(float(whole.detach()) / 61)
    if kind == "kl":
        for key, value in both.values.items():
            assert float(value) == pytest.approx(float(one.values[key] + other.values[key]))
