"""The invariants, each against a slow oracle (families × attention × padding × K/V source)."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import gateskip
from gateskip.retrofit.attach import layers_of
from gateskip.skipping.state import override, replay, state_of
from models import (
    FAMILIES,
    LAYERS,
    gated,
    medians,
    padded,
    random_ids,
    through_cache,
    tiny,
    with_table,
)

PAIRWISE = [
    ("llama", "sdpa", "left", "project", "none"),
    ("llama", "eager", "right", "previous", "low_rank"),
    ("llama", "sdpa", "none", "previous", "mean"),
    ("mistral", "eager", "left", "project", "mean"),
    ("mistral", "sdpa", "right", "previous", "none"),
    ("mistral_window", "sdpa", "left", "previous", "low_rank"),
    ("mistral_window", "eager", "none", "project", "mean"),
    ("qwen2", "sdpa", "left", "project", "low_rank"),
    ("qwen2", "eager", "none", "previous", "none"),
    ("qwen3", "sdpa", "right", "project", "low_rank"),
    ("qwen3", "eager", "left", "previous", "mean"),
    ("qwen3", "sdpa", "none", "project", "none"),
]
FULL = list(
    product(
        FAMILIES, ("sdpa", "eager"), ("left", "right", "none"), ("project", "previous"),
        ("none", "mean", "low_rank"),
    )
)  # fmt: skip
CASES = [pytest.param(*case) for case in PAIRWISE] + [
    pytest.param(*case, marks=pytest.mark.slow) for case in FULL if case not in PAIRWISE
]
cases = pytest.mark.parametrize(("family", "attention", "side", "kv", "comp"), CASES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@torch.no_grad()
def test_i1_unit_gates_are_the_dense_model(family: str, attention: str, side: str) -> None:
    model = tiny(family, attention)
    ids, mask, positions = padded(3, 14, side)
    before = {n: (p.clone(), id(p)) for n, p in model.named_parameters()}
    classes = [type(layer) for layer in model.model.layers]
    dense = model(ids, attention_mask=mask, position_ids=positions).logits
    cached = through_cache(model, ids, mask, positions, 1)
    gateskip.attach(model, gateskip.GateConfig(init_std=0.0, init_bias=40.0))
    assert torch.equal(model(ids, attention_mask=mask, position_ids=positions).logits, dense)
    assert torch.equal(through_cache(model, ids, mask, positions, 1), cached)
    assert set(before) < set(dict(model.named_parameters()))
    gateskip.detach(model)
    assert [type(layer) for layer in model.model.layers] == classes
    after = dict(model.named_parameters())
    assert set(after) == set(before)
    for name, (value, identity) in before.items():
        assert torch.equal(after[name], value)
        assert id(after[name]) == identity
    assert torch.equal(model(ids, attention_mask=mask, position_ids=positions).logits, dense)
    assert "generate" not in vars(model)


@cases
@torch.no_grad()
def test_i2_compacted_is_masked(family: str, attention: str, side: str, kv: str, comp: str) -> None:
    model = gated(family, attention, kv_source=kv, compensation=comp)
    ids, mask, _ = padded(3, 14, side)
    state, valid = state_of(model), mask.bool()
    with override(state, thresholds=medians(model)), gateskip.trace(model) as own:
        fast = model(ids, attention_mask=mask).logits
    assert 0.3 < own.ledger.skip_rate < 0.7
    decisions = [{k: v[0] for k, v in own.keep.items()}]
    with replay(state, decisions), gateskip.execution(model, "masked"):
        slow = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(fast[valid], slow[valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv", ["project", "previous"])
def test_i2_backward(kv: str) -> None:
    model = gated(kv_source=kv, compensation="low_rank")
    ids, mask, _ = padded(3, 14, "right")
    grads: list[dict[str, torch.Tensor]] = []
    thresholds = medians(model)
    for mode in ("masked", "compacted"):
        model.zero_grad()
        with override(state_of(model), thresholds=thresholds), gateskip.execution(model, mode):
            logits = model(ids, attention_mask=mask, use_cache=False).logits
        logits[mask.bool()].square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert any("skip_gate" in name for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-4)


@cases
@pytest.mark.parametrize("steps", [1, 3])
@torch.no_grad()
def test_i3_cached_is_uncached(
    family: str, attention: str, side: str, kv: str, comp: str, steps: int
) -> None:
    model = gated(family, attention, kv_source=kv, compensation=comp)
    for batch in (1, 3):
        ids, mask, positions = padded(batch, 14, "none" if side == "right" else side)
        with override(state_of(model), thresholds=medians(model)):
            with gateskip.trace(model) as once:
                whole = model(ids, attention_mask=mask, position_ids=positions).logits
            with gateskip.trace(model) as stepwise:
                parts = through_cache(model, ids, mask, positions, steps)
        valid = mask.bool()
        torch.testing.assert_close(parts[valid], whole[valid], atol=2e-5, rtol=1e-4)
        for key, masks in stepwise.keep.items():
            assert torch.equal(torch.cat(masks, 1), once.keep[key][0]), key


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_i4_causal(family: str) -> None:
    model = gated(family, compensation="low_rank")
    ids = random_ids(2, 16)
    changed = ids.clone()
    changed[:, 10:] = random_ids(2, 6, seed=9)
    with override(state_of(model), thresholds=medians(model)), gateskip.trace(model) as trace:
        a, b = model(ids).logits[:, :10], model(changed).logits[:, :10]
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for first, second in trace.keep.values():
        assert torch.equal(first[:, :10], second[:, :10])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_i5_rows_do_not_depend_on_mates(family: str, side: str) -> None:
    model = gated(family, compensation="low_rank")
    ids, mask, positions = padded(3, 14, side)
    with override(state_of(model), thresholds=medians(model)):
        batch = model(ids, attention_mask=mask, position_ids=positions).logits
        for row in range(3):
            real = mask[row].bool()
            alone = model(ids[row][real][None]).logits[0]
            torch.testing.assert_close(batch[row][real], alone, atol=1e-5, rtol=1e-4)


def counted(model: Any) -> tuple[dict[str, int], list[Any]]:
    """Hooks that count the rows entering every projection of the first two layers."""
    rows: dict[str, int] = {}
    handles = []
    for index, layer in enumerate(layers_of(model, state_of(model).family)):
        for name, module in layer.named_modules():
            if name.endswith("_proj"):

                def count(_: Any, inputs: Any, label: str = f"{index}.{name}") -> None:
                    rows[label] = rows.get(label, 0) + inputs[0].shape[:-1].numel()

                handles.append(module.register_forward_pre_hook(count))
    return rows, handles


@pytest.mark.parametrize("kv", ["project", "previous"])
@pytest.mark.parametrize("side", ["none", "left"])
@torch.no_grad()
def test_i6_ledger_is_what_hooks_count(kv: str, side: str) -> None:
    model = gated(kv_source=kv)
    ids, mask, positions = padded(3, 14, side)
    rows, handles = counted(model)
    with override(state_of(model), thresholds=medians(model)), gateskip.trace(model) as trace:
        # medians() above ran its own passes through the hooks
        rows.clear()
        through_cache(model, ids, mask, positions, 1)
    for handle in handles:
        handle.remove()
    for layer in range(LAYERS):
        attention, mlp = (layer, "attention"), (layer, "mlp")
        computed = {
            key: sum(int(call.computed[key].sum()) for call in trace.calls)
            for key in (attention, mlp)
        }
        skipped = sum(int((call.valid_BT & ~call.keep[attention]).sum()) for call in trace.calls)
        assert rows.get(f"{layer}.self_attn.q_proj", 0) == computed[attention]
        assert rows.get(f"{layer}.self_attn.o_proj", 0) == computed[attention]
        own_kv = skipped if kv == "project" else 0
        assert rows.get(f"{layer}.self_attn.k_proj", 0) == computed[attention] + own_kv
        assert rows.get(f"{layer}.mlp.down_proj", 0) == computed[mlp]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_i6_formula_is_the_flop_counter(family: str) -> None:
    model = gated(family, "eager")
    state, ids = state_of(model), random_ids(2, 12)
    with FlopCounterMode(display=False) as counter, gateskip.budget(model, keep=1.0):
        with gateskip.trace(model) as trace:
            model.model(ids, use_cache=False)
    shape = state.shape
    # The counter sees the full score rectangle, the formula the visible triangle.
    triangle = sum(
        float((c.keys_BT * c.valid_BT).sum()) for c in trace.calls for _ in range(LAYERS)
    )
    rectangle = 2 * 12 * 12 * LAYERS
    gates = 2 * LAYERS * ids.numel() * 2 * 64 * 4
    rotary = ids.numel() // 2 * 8  # inverse frequencies times positions, where it is a product
    counted_macs = counter.get_total_flops() / 2
    expected = trace.ledger.macs_dense + shape.macs_per_key * (rectangle - triangle) + gates
    assert counted_macs - expected in (0, rotary, 2 * rotary, 12 * 8)


@torch.no_grad()
def test_i6_flop_counter_sees_the_skips() -> None:
    model = gated(compensation="none")
    ids = random_ids(1, 24)
    with override(state_of(model), thresholds=medians(model)):
        with FlopCounterMode(display=False) as counter, gateskip.trace(model) as trace:
            model.model(ids, use_cache=False)
    linear = sum(
        flops for op, flops in counter.get_flop_counts()["Global"].items() if "mm" in str(op)
    ) / 2  # fmt: skip
    call = trace.calls[0]
    attended = sum(
        float((call.keys_BT * call.keep[(layer, "attention")]).sum()) for layer in range(LAYERS)
    )
    expected = trace.ledger.macs_spent - state_of(model).shape.macs_per_key * attended
    assert abs(linear - expected) <= 0.02 * expected


@torch.no_grad()
def test_i7_larger_budgets_never_keep_fewer() -> None:
    model = with_table(gated())
    state, ids = state_of(model), random_ids(2, 20)
    assert state.policy is not None
    for name in ("keep", "compute"):
        budgets = [gateskip.Budget(**{name: b}) for b in (0.95, 0.8, 0.6, 0.5, 0.4)]
        rows = [state.resolve(b) for b in budgets]
        for larger, smaller in pairwise(rows):
            assert larger is not None
            assert smaller is not None
            assert all(smaller[key] >= larger[key] for key in state.branches)
    with gateskip.trace(model) as trace:
        for keep in (0.9, 0.6, 0.3):
            with gateskip.budget(model, keep=keep):
                model(ids)
    first = trace.keep[(0, "attention")]  # the only branch with the same inputs in all three
    assert not bool((first[1] & ~first[0]).any())
    assert not bool((first[2] & ~first[1]).any())


@torch.no_grad()
def test_i8_crop_reorder_reset_reuse() -> None:
    model = gated()
    ids = random_ids(3, 14)
    with override(state_of(model), thresholds=medians(model)):
        whole = model(ids).logits
        cache = model(ids[:, :10], use_cache=True).cache
        cache.crop(-2)
        again = model(ids[:, 8:], cache=cache, use_cache=True).logits
        torch.testing.assert_close(again, whole[:, 8:], atol=1e-5, rtol=1e-4)
        cache.crop(-6)
        order = torch.tensor([2, 0, 1])
        cache.reorder_cache(order)
        turned = model(ids[order, 8:], cache=cache, use_cache=True).logits
        torch.testing.assert_close(turned, whole[order, 8:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_i10_deterministic() -> None:
    model = gated(compensation="low_rank")
    ids = random_ids(2, 16)
    with override(state_of(model), thresholds=medians(model)):
        assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kv", ["project", "previous"])
@torch.no_grad()
def test_bfloat16_compacted_is_masked(kv: str) -> None:
    model = gated(kv_source=kv, compensation="low_rank", dtype=torch.bfloat16)
    ids, mask, _ = padded(3, 14, "left")
    state = state_of(model)
    with override(state, thresholds=medians(model)), gateskip.trace(model) as own:
        fast = model(ids, attention_mask=mask).logits
    with (
        replay(state, [{k: v[0] for k, v in own.keep.items()}]),
        gateskip.execution(model, "masked"),
    ):
        slow = model(ids, attention_mask=mask).logits
    valid = mask.bool()
    scale = slow[valid].float().std()
    assert float((fast - slow)[valid].float().abs().max()) < 0.1 * float(scale)
