"""Quantise first, then attach: 8-bit weights (torchao) and 4-bit ones (bitsandbytes) on a CPU."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import gateskip
from gateskip.retrofit.attach import gated_branches
from gateskip.skipping.state import override, replay, state_of
from models import medians, padded, random_ids, tiny

pytestmark = pytest.mark.filterwarnings("ignore")


def quantisation(name: str) -> Any:
    if name == "int8":
        pytest.importorskip("torchao")
        from transformers import TorchAoConfig

        return TorchAoConfig(importlib.import_module("torchao.quantization").Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    config = tiny().config
    config.intermediate_size = 128  # 4-bit blocks are 64 wide
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    return folder


def loaded(base: Path, name: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantisation(name), dtype=torch.bfloat16
    ).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("name", ["int8", "nf4"])
@torch.no_grad()
def test_gates_on_a_quantised_model(name: str, base: Path, tmp_path: Path) -> None:
    model = loaded(base, name)
    ids, mask, _ = padded(3, 20, "left")
    dense = model(ids, attention_mask=mask).logits
    gateskip.attach(model, gateskip.GateConfig(init_std=0.0, init_bias=40.0))
    assert torch.equal(model(ids, attention_mask=mask).logits, dense)
    gateskip.detach(model)
    config = gateskip.GateConfig(compensation="low_rank", compensation_rank=4)
    gateskip.attach(model, config)
    texts = [random_ids(1, 40, seed=i)[0] for i in range(30)]
    gateskip.fit(model, texts)
    gateskip.calibrate(model, texts)
    state, valid = state_of(model), mask.bool()
    for module in gated_branches(model, state.family).values():
        assert module.skip_gate.bias.dtype == torch.float32  # type: ignore[union-attr]
    with override(state, thresholds=medians(model)), gateskip.trace(model) as trace:
        fast = model(ids, attention_mask=mask).logits
    assert trace.ledger.skip_rate > 0.2
    decisions = [{k: v[0] for k, v in trace.keep.items()}]
    with replay(state, decisions), gateskip.execution(model, "masked"):
        slow = model(ids, attention_mask=mask).logits
    # bfloat16, and products that round differently by row count
    assert (fast - slow)[valid].float().norm() < 0.05 * slow[valid].float().norm()
    options: dict[str, Any] = {"max_new_tokens": 5, "gateskip_budget": {"keep": 0.6}}
    assert model.generate(ids, attention_mask=mask, **options).shape == (3, 25)
    assert model.generate(ids[:1], **options).shape == (1, 25)
    gateskip.save(model, tmp_path / "gates")
    again = gateskip.load(
        tmp_path / "gates", base=base, quantization_config=quantisation(name), dtype="bfloat16"
    )
    with gateskip.budget(model, keep=0.6), gateskip.budget(again, keep=0.6):
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_gates_of_the_plain_model_fit_its_quantised_form(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    gateskip.attach(model, gateskip.GateConfig(kind="scalar"))
    gateskip.save(model, tmp_path / "gates")
    for name in ("int8", "nf4"):
        gateskip.load(tmp_path / "gates", base=loaded(base, name))
    other = tiny().config
    other.intermediate_size = 128
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(other).bfloat16().save_pretrained(tmp_path / "other")
    with pytest.raises(gateskip.CheckpointError, match="other weights"):
        gateskip.load(tmp_path / "gates", base=loaded(tmp_path / "other", "int8"))
