"""The invariants, each against a slow oracle (families × attention × padding × K/V source)."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import gateskip
from gateskip import kernels
from gateskip.retrofit.attach import decoder_of, find_family, gated_branches, layers_of
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
    ("cohere", "sdpa", "left", "project", "low_rank"),
    ("cohere", "eager", "right", "previous", "none"),
    ("gemma2", "eager", "left", "project", "mean"),
    ("gemma2", "eager", "right", "previous", "none"),
    ("gemma3_text", "sdpa", "left", "previous", "low_rank"),
    ("gemma3_text", "sdpa", "none", "project", "mean"),
    ("gpt2", "sdpa", "left", "project", "none"),
    ("gpt2", "eager", "none", "previous", "mean"),
    ("gpt_neox", "sdpa", "left", "project", "low_rank"),
    ("gpt_neox", "eager", "right", "previous", "none"),
    ("gpt_oss", "eager", "left", "project", "none"),
    ("gpt_oss", "eager", "none", "previous", "low_rank"),
    ("granite", "sdpa", "right", "project", "mean"),
    ("granite", "eager", "left", "previous", "low_rank"),
    ("mixtral", "sdpa", "left", "project", "low_rank"),
    ("olmo2", "sdpa", "left", "project", "low_rank"),
    ("olmo2", "eager", "none", "previous", "mean"),
    ("phi3", "sdpa", "left", "project", "mean"),
    ("phi3", "sdpa", "right", "previous", "none"),
    ("qwen3_moe", "sdpa", "left", "project", "none"),
    ("qwen3_moe", "eager", "right", "previous", "low_rank"),
    ("smollm3", "sdpa", "left", "project", "low_rank"),
    ("smollm3", "eager", "none", "previous", "none"),
    ("llama", "sdpa", "left", "none", "none"),
    ("llama", "eager", "right", "none", "low_rank"),
    ("mistral_window", "sdpa", "left", "none", "mean"),
    ("qwen3", "sdpa", "right", "none", "low_rank"),
    ("gemma3_text", "sdpa", "left", "none", "none"),
    ("gemma2", "eager", "left", "none", "mean"),
    ("gpt2", "eager", "left", "none", "none"),
    ("gpt_neox", "sdpa", "none", "none", "low_rank"),
    ("gpt_oss", "eager", "left", "none", "none"),
    ("olmo2", "sdpa", "right", "none", "mean"),
]
FULL = list(
    product(
        FAMILIES, ("sdpa", "eager"), ("left", "right", "none"), ("project", "previous", "none"),
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
    layers = layers_of(model, find_family(model.config))
    classes = [type(layer) for layer in layers]
    dense = model(ids, attention_mask=mask, position_ids=positions).logits
    cached = through_cache(model, ids, mask, positions, 1)
    gateskip.attach(model, gateskip.GateConfig(init_std=0.0, init_bias=40.0))
    assert torch.equal(model(ids, attention_mask=mask, position_ids=positions).logits, dense)
    with kernels.using("torch"):  # the kernels sum in another order
        assert torch.equal(through_cache(model, ids, mask, positions, 1), cached)
    own = through_cache(model, ids, mask, positions, 1)[mask.bool()]
    torch.testing.assert_close(own, cached[mask.bool()], atol=1e-5, rtol=1e-5)
    assert set(before) < set(dict(model.named_parameters()))
    gateskip.detach(model)
    assert [type(layer) for layer in layers] == classes
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
    assert 0.2 < own.ledger.skip_rate < 0.7
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
            decoder_of(model, state.family)(ids, use_cache=False)
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


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_i6_flop_counter_sees_the_skips(family: str) -> None:
    model = gated(family, compensation="low_rank")
    ids = random_ids(1, 24)
    with override(state_of(model), thresholds=medians(model)):
        with FlopCounterMode(display=False) as counter, gateskip.trace(model) as trace:
            decoder_of(model, state_of(model).family)(ids, use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    linear = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm")) / 2
    call = trace.calls[0]
    attended = sum(
        float((call.keys_BT * call.keep[(layer, "attention")]).sum()) for layer in range(LAYERS)
    )
    expected = trace.ledger.macs_spent - state_of(model).shape.macs_per_key * attended
    assert abs(linear - expected) <= 0.02 * expected


@torch.no_grad()
def test_i6_a_fitted_gate_costs_one_product() -> None:
    model = gated()
    state, ids = state_of(model), random_ids(2, 20)
    with override(state, thresholds=medians(model)), gateskip.trace(model) as random:
        model(ids)
    decisions = [random.calls[0].keep]
    for module in gated_branches(model, state.family).values():
        module.skip_gate.set_direction(torch.ones(64) / 64, 1.0)  # type: ignore[union-attr, operator]
    with replay(state, decisions), gateskip.trace(model) as fitted:
        model(ids)
    per_gate = 2 * 64 * 4 - 64  # two thin products against one dot product
    assert random.ledger.pairs_kept == fitted.ledger.pairs_kept > 0
    saved = random.ledger.macs_spent - fitted.ledger.macs_spent
    assert saved == random.ledger.pairs_kept * per_gate


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


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_i1_detach_restores_everything(family: str) -> None:
    model = tiny(family)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules = {name: (id(module), type(module)) for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    gateskip.attach(model)
    gateskip.detach(model)
    assert {n: (id(m), type(m)) for n, m in model.named_modules()} == modules
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert not decoder_of(model, find_family(model.config))._forward_pre_hooks
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], value) for name, value in state.items())


@cases
@torch.no_grad()
def test_i2_through_the_cache(family: str, attention: str, side: str, kv: str, comp: str) -> None:
    model = gated(family, attention, kv_source=kv, compensation=comp)
    state, thresholds = state_of(model), medians(model)
    for batch in (1, 3):
        ids, mask, positions = padded(batch, 12, side)
        if side == "right":
            # A row that has ended keeps its padding; new tokens are real again after it.
            mask[:, 6:] = 1
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with override(state, thresholds=thresholds), gateskip.trace(model) as own:
            fast = through_cache(model, ids, mask, positions, 1)
        decisions = [call.keep for call in own.calls]
        with replay(state, decisions), gateskip.execution(model, "masked"):
            slow = through_cache(model, ids, mask, positions, 1)
        valid = mask.bool()
        torch.testing.assert_close(fast[valid], slow[valid], atol=1e-5, rtol=1e-5)
        with replay(state, decisions):  # replayed decisions take the general path, not the single
            again = through_cache(model, ids, mask, positions, 1)
        torch.testing.assert_close(again[valid], slow[valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "kv"), list(product(FAMILIES, ("project", "previous"))))
@torch.no_grad()
def test_i3_longer_chunks(family: str, kv: str) -> None:
    model = gated(family, kv_source=kv, compensation="low_rank")
    ids, mask, positions = padded(3, 20, "left")
    with override(state_of(model), thresholds=medians(model)):
        with gateskip.trace(model) as once:
            whole = model(ids, attention_mask=mask, position_ids=positions).logits
        with gateskip.trace(model) as stepwise:
            parts = through_cache(model, ids, mask, positions, 5)
    valid = mask.bool()
    torch.testing.assert_close(parts[valid], whole[valid], atol=2e-5, rtol=1e-4)
    for key, masks in stepwise.keep.items():
        assert torch.equal(torch.cat(masks, 1), once.keep[key][0]), key


@pytest.mark.parametrize("kv", ["project", "previous"])
@torch.no_grad()
def test_i4_i5_with_both_kinds_of_position_ids(kv: str) -> None:
    model = gated("qwen2", kv_source=kv, compensation="mean")
    ids, mask, positions = padded(3, 14, "left")
    thresholds = medians(model)
    with override(state_of(model), thresholds=thresholds):
        batch = model(ids, attention_mask=mask, position_ids=positions)
        changed = ids.clone()
        changed[:, 9:] = random_ids(3, 5, seed=4)
        other = model(changed, attention_mask=mask, position_ids=positions)
        early = mask.bool()[:, :9]
        torch.testing.assert_close(
            batch.logits[:, :9][early], other.logits[:, :9][early], atol=1e-5, rtol=1e-5
        )
        # A raw forward of a left-padded batch has position ids 0 1 2 3, generate's 0 0 0 1.
        raw = model(ids, attention_mask=mask)
        valid = mask.bool()
        torch.testing.assert_close(batch.logits[valid], raw.logits[valid], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kv", ["project", "previous"])
@torch.no_grad()
def test_i6_batch_one_decoding_runs_only_what_the_ledger_says(kv: str) -> None:
    model = gated("qwen3", kv_source=kv, compensation="none")
    ids, mask, positions = padded(1, 16, "none")
    thresholds = medians(model)
    rows, handles = counted(model)
    with override(state_of(model), thresholds=thresholds), gateskip.trace(model) as trace:
        through_cache(model, ids, mask, positions, 1)
    for handle in handles:
        handle.remove()
    assert 0.2 < trace.ledger.skip_rate < 0.8
    for layer in range(LAYERS):
        kept = sum(int(m.sum()) for m in trace.keep[(layer, "attention")])
        own_kv = ids.numel() if kv == "project" else kept
        assert rows.get(f"{layer}.self_attn.q_proj", 0) == kept
        assert rows.get(f"{layer}.self_attn.o_proj", 0) == kept
        assert rows.get(f"{layer}.self_attn.k_proj", 0) == own_kv
        assert rows.get(f"{layer}.self_attn.v_proj", 0) == own_kv
        kept = sum(int(m.sum()) for m in trace.keep[(layer, "mlp")])
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert rows.get(f"{layer}.mlp.{name}", 0) == kept


@torch.no_grad()
def test_i6_rows_of_the_ledger_add_up() -> None:
    model = gated(compensation="low_rank")
    ids, mask, positions = padded(3, 14, "left")
    with override(state_of(model), thresholds=medians(model)), gateskip.trace(model) as trace:
        model(ids, attention_mask=mask, position_ids=positions)
    ledger = trace.ledger
    assert sum(ledger.rows_dense) == pytest.approx(ledger.macs_dense)
    assert sum(ledger.rows_spent) == pytest.approx(ledger.macs_spent)
    assert ledger.pairs == int(mask.sum()) * 2 * LAYERS
    assert ledger.pairs_kept == sum(int(m.sum()) for masks in trace.keep.values() for m in masks)
    assert 0 < ledger.bytes_spent
    assert all(not bool((m & ~mask.bool()).any()) for masks in trace.keep.values() for m in masks)


@pytest.mark.parametrize("name", ["keep", "compute"])
@torch.no_grad()
def test_i7_supersets_for_the_same_inputs(name: str) -> None:
    """Every branch sees the dense model's inputs, so that only the thresholds differ."""
    model = with_table(gated())
    state, ids = state_of(model), random_ids(2, 20)

    class Scores:
        def __init__(self) -> None:
            self.seen: dict[Any, torch.Tensor] = {}

        def add(self, key: Any, score_BT: torch.Tensor, call: Any) -> None:
            self.seen[key] = score_BT.clone()

    scores = Scores()
    with override(state, thresholds=dict.fromkeys(state.branches, -1e9), scores=scores):
        model(ids)
    budgets = [gateskip.Budget(**{name: b}) for b in (1.0, 0.99, 0.9, 0.75, 0.6, 0.5, 0.35)]
    rows = [state.resolve(budget) for budget in budgets]
    for larger, smaller in pairwise(rows):
        for key, score in scores.seen.items():
            more = score >= (-1e9 if larger is None else larger[key])
            fewer = score >= (-1e9 if smaller is None else smaller[key])
            assert not bool((fewer & ~more).any())


@pytest.mark.parametrize("kv", ["project", "previous"])
@torch.no_grad()
def test_i8_select_reset_and_use_again(kv: str) -> None:
    model = gated(kv_source=kv, compensation="mean")
    ids = random_ids(3, 14)
    with override(state_of(model), thresholds=medians(model)):
        whole = model(ids).logits
        cache = model(ids[:, :10], use_cache=True).cache
        cache.batch_select_indices(torch.tensor([2, 0]))
        chosen = model(ids[[2, 0], 10:], cache=cache, use_cache=True).logits
        torch.testing.assert_close(chosen, whole[[2, 0], 10:], atol=1e-5, rtol=1e-4)
        assert {cache.get_seq_length(layer) for layer in range(LAYERS)} == {14}
        for _ in range(2):
            cache.reset()
            assert {cache.get_seq_length(layer) for layer in range(LAYERS)} == {0}
            again = model(ids[:2], cache=cache, use_cache=True).logits
            torch.testing.assert_close(again, whole[:2], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_i10_two_equal_models_and_two_equal_runs() -> None:
    first, second = gated("qwen3", compensation="mean"), gated("qwen3", compensation="mean")
    ids, mask, positions = padded(3, 14, "left")
    thresholds = medians(first)
    assert medians(second) == thresholds
    results = []
    for model in (first, second, first):
        with override(state_of(model), thresholds=thresholds):
            results.append(through_cache(model, ids, mask, positions, 3))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("family", "comp"),
    [
        pytest.param(f, c, marks=() if (f, c) == ("qwen3", "mean") else pytest.mark.slow)
        for f, c in product(FAMILIES, ("none", "mean"))
    ],
)
@torch.no_grad()
def test_bfloat16_through_the_cache(family: str, comp: str) -> None:
    model = gated(family, compensation=comp, dtype=torch.bfloat16)
    state = state_of(model)
    thresholds = medians(model)
    for batch in (1, 2):
        ids, mask, positions = padded(batch, 12, "left")
        with override(state, thresholds=thresholds), gateskip.trace(model) as own:
            fast = through_cache(model, ids, mask, positions, 1)
        with (
            replay(state, [call.keep for call in own.calls]),
            gateskip.execution(model, "masked"),
        ):
            slow = through_cache(model, ids, mask, positions, 1)
        valid = mask.bool()
        difference = (fast - slow)[valid].float().abs()
        assert float(difference.max()) <= 2e-2 * float(slow[valid].float().abs().max())
