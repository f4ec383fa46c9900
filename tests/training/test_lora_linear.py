"""LoRA layers with their backward written out, against PEFT's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear

from gateskip.training.lora_linear import LoraLinear, speed_up

INPUTS, OUTPUTS = 24, 40


def layers(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(PEFT's, ours) with the same weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, dtype=dtype)).requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["0"], **options)
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.3
    ours = copy.deepcopy(model)
    speed_up(ours)
    assert type(model[0]) is Linear
    assert type(ours[0]) is LoraLinear
    return model, ours


def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad}
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", [(7, INPUTS), (2, 5, INPUTS), (0, INPUTS)])
def test_the_same_sums(shape: tuple[int, ...]) -> None:
    theirs, ours = layers()
    x = torch.randn(*shape)
    expected, found = run(theirs, x), run(ours, x)
    assert found.keys() == expected.keys()
    assert sum("lora_" in name for name in found) == 2
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_as_near_as_rounding_allows() -> None:
    theirs, ours = layers(torch.bfloat16)
    x = torch.randn(200, INPUTS).bfloat16()
    expected, found = run(theirs, x), run(ours, x)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        error = (found[name].float() - value.float()).norm() / value.float().norm()
        assert error < 0.01, name


def test_it_is_peft_where_it_is_no_plain_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    from gateskip.training import lora_linear

    x = torch.randn(6, INPUTS)

    def taken(model: nn.Module) -> bool:
        with monkeypatch.context() as patch:
            calls: list[int] = []
            real = lora_linear._LoraProduct.apply

            def count(*args: Any) -> Any:
                calls.append(1)
                return real(*args)

            patch.setattr(lora_linear._LoraProduct, "apply", count)
            model(x)
            return bool(calls)

    theirs, ours = layers()
    assert taken(ours)
    ours[0].enable_adapters(False)
    assert not taken(ours)
    torch.testing.assert_close(ours(x), theirs[0].base_layer(x))
    ours[0].enable_adapters(True)
    with torch.autocast("cpu", torch.bfloat16):
        assert not taken(ours)
    hook = ours[0].base_layer.register_forward_hook(lambda *_: None)
    assert not taken(ours)
    hook.remove()
    ours[0].merge()
    assert not taken(ours)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    for options in ({"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}):
        assert not taken(layers(**options)[1]), options  # type: ignore[arg-type]
