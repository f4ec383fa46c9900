"""The CPU kernels give what torch operations give: decisions, logits, caches, ledgers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import gateskip
from gateskip import kernels
from gateskip.execution import mask_rows
from gateskip.execution.rounding import rounded_rows
from gateskip.retrofit.attach import gated_branches
from gateskip.skipping.state import override, state_of
from models import FAMILIES, LAYERS, gated, medians, random_ids

pytestmark = pytest.mark.skipif(not kernels.available(), reason="numba is not installed")


def outputs(model: Any, ids: Tensor, mask: Tensor | None, thresholds: Any) -> list[Any]:
    """Logits of a prefill and of three decoding steps, the cache's keys, and the ledgers."""
    found: list[Any] = []
    prompt = ids.shape[1] - 3
    with override(state_of(model), thresholds=thresholds), gateskip.trace(model) as trace:
        first = None if mask is None else mask[:, :prompt]
        out = model(ids[:, :prompt], attention_mask=first, use_cache=True)
        found.append(out.logits if mask is None else out.logits[first.bool()])
        for at in range(prompt, ids.shape[1]):
            seen = None if mask is None else mask[:, : at + 1]
            out = model(ids[:, at : at + 1], attention_mask=seen, cache=out.cache, use_cache=True)
            found.append(out.logits)
    found += [layer.keys for layer in out.cache.layers] if mask is None else []
    return [found, trace]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("compensation", ["none", "mean", "low_rank"])
@torch.no_grad()
def test_kernels_are_torch(family: str, batch: int, compensation: str) -> None:
    model = gated(family, compensation=compensation)
    ids = random_ids(batch, 17)
    mask = None
    if batch > 1:
        mask = torch.ones_like(ids)
        mask[1, :6] = 0
    with kernels.using("torch"):
        thresholds = medians(model)
        expected, reference = outputs(model, ids, mask, thresholds)
    with kernels.using("numba"):
        found, trace = outputs(model, ids, mask, thresholds)
    for key, masks in reference.keep.items():
        assert all(torch.equal(a, b) for a, b in zip(masks, trace.keep[key], strict=True))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert 0.2 < trace.ledger.skip_rate < 0.8
    if batch == 1:  # ragged rows are padded only without kernels
        assert trace.ledger.macs_spent == reference.ledger.macs_spent


@pytest.mark.parametrize("kind", ["low_rank", "vector", "scalar"])
@pytest.mark.parametrize("threads", [1, 3])
@torch.no_grad()
def test_one_token_with_every_gate(kind: str, threads: int) -> None:
    model = gated("qwen3", kind=kind, compensation="low_rank")
    ids = random_ids(1, 12)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for thresholds in (medians(model), None):
            with kernels.using("torch"):
                expected, _ = outputs(model, ids, None, thresholds)
            with kernels.using("numba"):
                found, _ = outputs(model, ids, None, thresholds)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("family", ["llama", "mistral_window"])
@pytest.mark.parametrize("name", ["torch", "numba"])
@torch.no_grad()
def test_masks_too_large_for_a_table(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gated(family, compensation="mean")
    ids = random_ids(3, 17)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    with kernels.using(name):
        for given in (mask, None):
            thresholds = medians(model)
            expected, _ = outputs(model, ids, given, thresholds)
            monkeypatch.setattr(mask_rows, "TABLE", 0)
            found, _ = outputs(model, ids, given, thresholds)
            monkeypatch.undo()
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_plans_follow_what_changes() -> None:
    model = gated(compensation="low_rank")
    ids = random_ids(1, 12)
    thresholds = medians(model)

    def check() -> None:
        with kernels.using("torch"):
            expected, _ = outputs(model, ids, None, thresholds)
        found, _ = outputs(model, ids, None, thresholds)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)

    check()
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[2].mlp
    attention.q_proj.weight.mul_(0.5)  # in place: the address stays
    check()
    attention.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight * 2)
    check()
    mlp.skip_gate.bias.add_(0.3)
    model.model.layers[0].input_layernorm.weight.mul_(1.1)
    check()
    mlp.down_proj = torch.nn.Sequential(mlp.down_proj)  # wrapped: no longer the kernels' business
    check()
    calls: list[int] = []
    handle = mlp.register_forward_hook(lambda *_: calls.append(1))
    with override(state_of(model), thresholds=None):
        outputs(model, ids, None, None)
    assert len(calls) == 4, "a hook was not called"
    handle.remove()
    check()


@torch.no_grad()
def test_copies_make_their_own_plans_and_detach_leaves_none() -> None:
    model = gated(compensation="low_rank")
    ids = random_ids(1, 12)
    thresholds = medians(model)
    expected, _ = outputs(model, ids, None, thresholds)
    other = copy.deepcopy(model)
    for layer in other.model.layers:
        layer.mlp.down_proj.weight.zero_()
    changed, _ = outputs(other, ids, None, thresholds)
    assert not torch.equal(changed[1], expected[1])
    again, _ = outputs(model, ids, None, thresholds)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    with torch.inference_mode():
        inferred, _ = outputs(model, ids, None, thresholds)
    assert all(torch.equal(a, b) for a, b in zip(inferred, expected, strict=True))
    gateskip.detach(model)
    for layer in model.model.layers:
        assert not [name for name in vars(layer) if "gateskip" in name]


@torch.no_grad()
def test_autocast_goes_without_kernels() -> None:
    model = gated(compensation="low_rank")
    ids = random_ids(1, 12)
    thresholds = medians(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels.supported(torch.zeros(1))
        found, _ = outputs(model, ids, None, thresholds)
        with kernels.using("torch"):
            expected, _ = outputs(model, ids, None, thresholds)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def test_float64_compacts_too() -> None:
    model = gated(compensation="low_rank", dtype=torch.float64)
    ids = random_ids(2, 14)
    with override(state_of(model), thresholds=medians(model)):
        found = model(ids).logits
        with gateskip.execution(model, "masked"):
            expected = model(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_bfloat16_rows_are_rounded_up_and_counted() -> None:
    cpu = torch.device("cpu")
    expected = {0: 0, 16: 16, 17: 32, 600: 608, 1030: 1056}
    assert {n: rounded_rows(n, torch.bfloat16, cpu) for n in expected} == expected
    assert rounded_rows(600, torch.float32, cpu) == 600
    model = gated(compensation="low_rank", dtype=torch.bfloat16)
    ids = random_ids(2, 60)
    thresholds = medians(model)
    entered: dict[str, int] = {}
    handles = []
    for (layer, kind), module in gated_branches(model, state_of(model).family).items():
        name = "q_proj" if kind == "attention" else "gate_proj"

        def hook(_: Any, args: Any, out: Any, key: Any = (layer, kind)) -> None:
            entered[key] = entered.get(key, 0) + args[0].flatten(0, -2).shape[0]

        handles.append(module.get_submodule(name).register_forward_hook(hook))
    with override(state_of(model), thresholds=thresholds), gateskip.trace(model) as trace:
        model(ids)
    call = trace.calls[0]
    assert len(entered) == 2 * LAYERS
    assert sum(call.padding.values()) > 0
    for key, rows in entered.items():
        assert rows == int(call.computed[key].sum()) + call.padding.get(key, 0)
    plain = gateskip.skipping.ledger.Ledger.of([call.without_padding()])
    assert plain.macs_spent < trace.ledger.macs_spent
