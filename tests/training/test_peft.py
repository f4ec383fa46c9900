"""PEFT around, below and beside gates; preference training by TRL."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from test_trl import words
from torch import Tensor

import gateskip
from gateskip.errors import AttachError, ConfigError
from gateskip.retrofit.attach import gate_of, gated_branches
from gateskip.skipping.state import state_of
from gateskip.training import GateSkipMixin, GateSkipTrainingConfig
from models import gated, random_ids, tiny, with_table

IDS = random_ids(2, 14)


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False, **options)


@torch.no_grad()
def logits(model: Any, keep: float = 0.6) -> Tensor:
    with gateskip.budget(model, keep=keep):
        found: Tensor = model.eval()(IDS).logits
    return found


def gated_model(**options: Any) -> Any:
    return with_table(gated(compensation="low_rank", **options))


def test_all_linear_leaves_gates_alone() -> None:
    model = gated_model()
    wrapped = peft.get_peft_model(model, lora())
    names = [name for name, _ in wrapped.named_parameters() if "lora_" in name]
    assert names
    assert not any("skip_" in name for name in names)
    frozen = [p for n, p in wrapped.named_parameters() if "skip_" in n]
    assert not any(p.requires_grad for p in frozen), "PEFT freezes all that is not its own"


def test_a_wrapped_model_is_gated_by_every_name() -> None:
    model = gated_model()
    before = logits(model)
    wrapped = peft.get_peft_model(model, lora())
    assert state_of(wrapped) is state_of(model)
    with gateskip.trace(wrapped) as trace:
        changed = logits(wrapped)
    assert trace.ledger.skip_rate > 0.2
    assert not torch.allclose(changed, before, atol=1e-3)
    with wrapped.disable_adapter():
        torch.testing.assert_close(logits(wrapped), before, msg="gates stay on without adapters")
    call = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with gateskip.trace(wrapped) as trace:
        wrapped.generate(input_ids=IDS, gateskip_budget={"keep": 0.6}, **call)
    assert trace.ledger.skip_rate > 0.2
    gateskip.set_budget(wrapped, keep=0.5)
    merged = wrapped.merge_and_unload()
    assert merged is model
    assert state_of(merged).default_budget == gateskip.Budget(keep=0.5)
    torch.testing.assert_close(logits(merged), changed, atol=1e-4, rtol=1e-4)


def test_gates_on_a_wrapped_model(tmp_path: Path) -> None:
    base = tiny()
    wrapped = peft.get_peft_model(copy.deepcopy(base), lora())
    with torch.no_grad():
        expected = wrapped.eval()(IDS).logits
    assert gateskip.attach(wrapped, gateskip.GateConfig(init_std=0.0, init_bias=40.0)) is wrapped
    with torch.no_grad():
        torch.testing.assert_close(wrapped(IDS).logits, expected)
    with pytest.raises(AttachError, match="gated already"):
        gateskip.attach(wrapped)
    gateskip.fit(wrapped, [random_ids(1, 60, seed=n) for n in range(20)])
    gateskip.calibrate(wrapped, [random_ids(1, 60, seed=n) for n in range(20)], grid=(0.8, 0.6))
    gateskip.save(wrapped, tmp_path)
    loaded = gateskip.load(tmp_path, base=copy.deepcopy(base))
    torch.testing.assert_close(logits(loaded), logits(wrapped), atol=1e-4, rtol=1e-4)
    gateskip.detach(wrapped)
    with torch.no_grad():
        assert torch.equal(wrapped(IDS).logits, expected)


def test_several_adapters_on_one_gated_model() -> None:
    wrapped = peft.get_peft_model(gated_model(), lora(), adapter_name="first")
    first = logits(wrapped)
    wrapped.add_adapter("second", lora())
    wrapped.set_adapter("second")
    second = logits(wrapped)
    assert not torch.allclose(first, second, atol=1e-3)
    wrapped.set_adapter("first")
    torch.testing.assert_close(logits(wrapped), first)


@pytest.mark.filterwarnings("ignore")
def test_sft_trainer_with_an_adapter_of_its_own(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    class Trainer(GateSkipMixin, SFTTrainer):  # type: ignore[misc]
        pass

    rows = [{"text": " ".join(f"w{(7 * i + 3 * j) % 120}" for j in range(12))} for i in range(16)]
    config = GateSkipTrainingConfig(train_gates=True, penalty=0.1, budget_start=0.7, budget_end=0.7)
    arguments = SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, logging_steps=1, use_cpu=True,
        report_to=[], bf16=False, learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip

    def made(options: GateSkipTrainingConfig) -> Any:
        return Trainer(
            gated_model(), arguments, train_dataset=Dataset.from_list(rows),
            processing_class=words(), gateskip_args=options, peft_config=lora(),
        )  # fmt: skip

    with pytest.raises(ConfigError, match="peft_config= trains adapters"):
        made(GateSkipTrainingConfig(backbone="full"))
    trainer = made(config)
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    kinds = {"skip_gate", "skip_compensation", "lora_"}
    assert {kind for kind in kinds if any(kind in name for name in trained)} == kinds
    assert all(any(kind in name for kind in kinds) for name in trained)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trained
    assert all("gate_penalty" in e for e in trainer.state.log_history if "loss" in e)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapter", [True, False])
def test_dpo_trainer(tmp_path: Path, adapter: bool) -> None:
    """The reference: the model's own path again, dense; or with an adapter, the gated model
    without it. Either way it gets no gradient, and the penalty is the policy's alone."""
    from trl import DPOConfig, DPOTrainer

    class Trainer(GateSkipMixin, DPOTrainer):  # type: ignore[misc]
        pass

    tiny().save_pretrained(tmp_path / "base")
    words().save_pretrained(tmp_path / "base")
    model = gated_model()
    model.config._name_or_path = str(tmp_path / "base")
    rows = [
        {"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2} w{i + 3}", "rejected": f" w{i + 5}"}
        for i in range(8)
    ]
    config = GateSkipTrainingConfig(
        backbone="lora" if adapter else "full", train_gates=True, penalty=0.1, budget_start=0.7,
        budget_end=0.7,
    )  # fmt: skip
    arguments = DPOConfig(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, logging_steps=1,
        use_cpu=True, report_to=[], bf16=False, learning_rate=1e-2, disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = Trainer(
        model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=words(),
        gateskip_args=config, **({"peft_config": lora()} if adapter else {}),
    )  # fmt: skip
    if not adapter:
        assert trainer.ref_model is not None
        with pytest.raises(AttachError):
            state_of(trainer.ref_model)
    family = state_of(model).family
    gates = [gate_of(m) for m in gated_branches(model, family).values()]
    before = [next(gate.parameters()).detach().clone() for gate in gates]
    trainer.train()
    assert any(not torch.equal(next(g.parameters()), b) for g, b in zip(gates, before, strict=True))
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert entries
    for entry in entries:
        assert 0.0 < entry["gate_penalty"] < 1.0
        assert 0.05 < entry["skip_rate"] < 0.95


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("own", [True, False])
def test_lora_beside_4bit_weights(tmp_path: Path, own: bool) -> None:
    """Adapters train below gates, by us or by PEFT's wrapper; the change is saved as factors and
    comes back as layers, since packed weights cannot take it up."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainingArguments

    from gateskip.training import GateSkipTrainer, make_dataset

    config = tiny().config
    config.intermediate_size = 128  # 4-bit blocks are 64 wide
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path / "base")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=nf4, dtype=torch.bfloat16
    )
    if not own:
        model = peft.get_peft_model(model, lora())
    gateskip.attach(model, gateskip.GateConfig(init_std=0.3, init_bias=1.0, compensation_rank=4))
    texts = [random_ids(1, 60, seed=n) for n in range(20)]
    gateskip.fit(model, texts)
    gateskip.calibrate(model, texts, grid=(0.8, 0.5))
    run = GateSkipTrainer(
        model,
        TrainingArguments(
            str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, report_to=[],
            learning_rate=1e-2, use_cpu=True, disable_tqdm=True, save_strategy="no",
            logging_steps=1,
        ),
        train_dataset=make_dataset([random_ids(1, 12, seed=i)[0] for i in range(8)]),
        gateskip_args=GateSkipTrainingConfig(
            backbone="lora", train_gates=True, budget_unit="keep", budget_start=0.7, budget_end=0.7
        ),
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}
    run.train()
    moved = [n for n, p in run.model.named_parameters() if n in before and
             not torch.equal(before[n], p)]  # fmt: skip
    for kind in ("lora_A", "lora_B", "skip_gate", "skip_compensation"):
        assert any(kind in name for name in moved), kind
    model = run.finish()
    trained = logits(model)
    gateskip.save(model, tmp_path / "gates")
    again = gateskip.load(
        tmp_path / "gates", base=tmp_path / "base", quantization_config=nf4, dtype="bfloat16"
    )
    error = (logits(again) - trained).abs().float()
    spread = float(trained.float().std())
    assert float(error.mean()) < 0.1 * spread, "rounding of bfloat16 decides for a few"
    gateskip.save(again, tmp_path / "more")
    assert (tmp_path / "more" / "gateskip_model.safetensors").stat().st_size > 0
