"""All layers in one kernel call: the same as one by one, and the cache stays Hugging Face's."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

import gateskip
from gateskip import kernels
from gateskip.execution import memory
from gateskip.execution.api import dense
from gateskip.skipping.state import override, state_of
from models import fed, gated, medians, padded, random_ids, tiny, with_table

pytestmark = pytest.mark.skipif(not kernels.available(), reason="numba is not installed")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("compensation", ["none", "mean", "low_rank"])
@pytest.mark.parametrize("kind", ["low_rank", "scalar"])
@torch.no_grad()
def test_one_by_one_is_the_whole(
    family: str, compensation: str, kind: str, stacked: list[bool]
) -> None:
    model = gated(family, compensation=compensation, kind=kind)
    ids = random_ids(1, 20)
    for thresholds in (medians(model), None):
        stacked.clear()
        with override(state_of(model), thresholds=thresholds):
            with gateskip.trace(model) as once:
                whole = model(ids).logits
            with gateskip.trace(model) as stepwise:
                found = fed(model, ids, DynamicCache(config=model.config))
        assert stacked == [True] * 14
        torch.testing.assert_close(found, whole, atol=2e-5, rtol=1e-4)
        for key, masks in stepwise.keep.items():
            assert torch.equal(torch.cat(masks, 1), once.keep[key][0])
        assert stepwise.ledger.pairs_kept == once.ledger.pairs_kept


@torch.no_grad()
def test_the_cache_outgrows_its_room(monkeypatch: pytest.MonkeyPatch, stacked: list[bool]) -> None:
    monkeypatch.setattr(memory, "ROOM", 3)
    model, ids = gated(compensation="low_rank"), random_ids(1, 40)
    with override(state_of(model), thresholds=medians(model)):
        cache = DynamicCache(config=model.config)
        found = fed(model, ids, cache)
        whole = model(ids, use_cache=True)
    assert all(stacked)
    torch.testing.assert_close(found, whole.logits, atol=2e-5, rtol=1e-4)
    assert cache.get_seq_length() == 40
    for ours, theirs in zip(cache.layers, whole.cache.layers, strict=True):
        assert ours.keys.shape == theirs.keys.shape
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("pads", [False, True])
def test_a_prefill_leaves_room_so_that_decoding_copies_no_cache(pads: bool) -> None:
    model, ids = gated(compensation="low_rank"), random_ids(2, 12)
    mask = padded(2, 12, "left")[1] if pads else torch.ones_like(ids)
    for thresholds in (medians(model), None):
        with override(state_of(model), thresholds=thresholds):
            cache = model(ids[:, :10], attention_mask=mask[:, :10], use_cache=True).cache
            places = [(part.keys.data_ptr(), part.values.data_ptr()) for part in cache.layers]
            for i in (10, 11):
                model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], cache=cache)
            after = [(part.keys.data_ptr(), part.values.data_ptr()) for part in cache.layers]
        assert after == places
        assert cache.get_seq_length() == 12
    with gateskip.execution(model, "masked"):  # which has no use for it
        cache = model(ids, use_cache=True).cache
    assert cache.layers[0].keys.is_contiguous()


@torch.no_grad()
def test_caches_are_copied_cropped_and_mixed_with_longer_calls(stacked: list[bool]) -> None:
    model, ids = gated(compensation="low_rank"), random_ids(1, 24)
    other = torch.cat((ids[:, :14], random_ids(1, 6, seed=8)), 1)
    with override(state_of(model), thresholds=medians(model)):
        wanted, changed = model(ids).logits, model(other).logits
        cache = DynamicCache(config=model.config)
        fed(model, ids[:, :14], cache)
        twin = copy.deepcopy(cache)
        found = fed(model, ids[:, 14:], cache, start=0)
        torch.testing.assert_close(found, wanted[:, 14:], atol=2e-5, rtol=1e-4)
        found = fed(model, other[:, 14:], twin, start=0)
        torch.testing.assert_close(found, changed[:, 14:], atol=2e-5, rtol=1e-4)
        cache.crop(-10)
        found = fed(model, other[:, 14:], cache, start=3)  # several tokens, then one by one
        torch.testing.assert_close(found, changed[:, 14:], atol=2e-5, rtol=1e-4)
    assert all(stacked)


@torch.no_grad()
def test_who_listens_is_heard(stacked: list[bool]) -> None:
    model, ids = gated(), random_ids(1, 10)
    calls: list[int] = []
    with override(state_of(model), thresholds=medians(model)):
        expected = model(ids, output_hidden_states=True).hidden_states
        cache = model(ids[:, :9], use_cache=True).cache
        found = model(ids[:, 9:], cache=cache, output_hidden_states=True).hidden_states
        for ours, whole in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[:, 0], whole[:, 9], atol=2e-5, rtol=1e-4)
        handle = model.model.layers[2].register_forward_hook(lambda *_: calls.append(1))
        fed(model, ids, DynamicCache(config=model.config))
        handle.remove()
    assert len(calls) == 5
    assert not any(stacked)


@torch.no_grad()
def test_the_head(stacked: list[bool]) -> None:
    model = gated().bfloat16()
    x = torch.randn(1, 1, 64).bfloat16()
    expected = torch.nn.functional.linear(x.float(), model.lm_head.weight.float())
    torch.testing.assert_close(model.lm_head(x).float(), expected, atol=0.02, rtol=0.01)
    assert type(model.lm_head) is not torch.nn.Linear
    with dense(model):
        assert type(model.lm_head) is torch.nn.Linear
    assert type(model.lm_head) is not torch.nn.Linear
    assert isinstance(model.lm_head, torch.nn.Linear)
    gateskip.detach(model)
    assert type(model.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["vector", "scalar"])
@pytest.mark.parametrize("batch", [2, 3, 5, 11])
@torch.no_grad()
def test_rows_of_a_batch_run_as_one(
    family: str, kind: str, batch: int, stacked: list[bool]
) -> None:
    model, ids = gated(family, compensation="low_rank", kind=kind), random_ids(batch, 15)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for thresholds in (medians(model), None):
        stacked.clear()
        with override(state_of(model), thresholds=thresholds):
            whole = model(ids, attention_mask=mask).logits
            for cache in (
                DynamicCache(config=model.config),
                StaticCache(config=model.config, max_cache_len=17),
            ):
                found = model(ids[:, :8], attention_mask=mask[:, :8], cache=cache).logits
                torch.testing.assert_close(
                    found[mask[:, :8] > 0], whole[:, :8][mask[:, :8] > 0], atol=2e-5, rtol=1e-4
                )
                for at in range(8, 15):
                    out = model(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], cache=cache)
                    torch.testing.assert_close(out.logits[:, 0], whole[:, at], atol=2e-5, rtol=1e-4)
                assert int(cache.get_seq_length()) == 15
        assert stacked == [True] * 14


@torch.no_grad()
def test_the_ledger_of_a_batch(stacked: list[bool]) -> None:
    model, ids = gated(compensation="low_rank"), random_ids(4, 9)
    ledgers = []
    for backend in ("numba", "torch"):
        with kernels.using(backend), override(state_of(model), thresholds=medians(model)):
            cache = model(ids[:, :8], use_cache=True).cache
            with gateskip.trace(model) as trace:
                model(ids[:, 8:], cache=cache, use_cache=True)
        ledgers.append(trace)
    ours, theirs = ledgers
    assert stacked == [True, False]
    for key, masks in ours.keep.items():
        assert torch.equal(masks[0], theirs.keep[key][0])
    assert ours.ledger.rows_spent == theirs.ledger.rows_spent
    assert ours.ledger.bytes_spent == theirs.ledger.bytes_spent


@torch.no_grad()
def test_a_budget_of_its_own_for_every_row(stacked: list[bool]) -> None:
    model, ids = with_table(gated(compensation="low_rank")), random_ids(3, 12)
    rows = [0.5, 1.0, 0.8]
    with gateskip.budget(model, keep=rows):
        found = fed(model, ids, DynamicCache(config=model.config))
    assert stacked == [True] * 6
    for i, keep in enumerate(rows):
        with gateskip.budget(model, keep=keep):
            torch.testing.assert_close(found[i : i + 1], model(ids[i : i + 1]).logits, atol=2e-5,
                                       rtol=1e-4)  # fmt: skip


@torch.no_grad()
def test_beams_move_their_rows(stacked: list[bool]) -> None:
    model, ids = with_table(gated(compensation="low_rank")), random_ids(2, 6)
    options = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, gateskip_budget={"keep": 0.7}, **options)
    assert all(stacked)
    assert len(stacked) >= 7
    with kernels.using("torch"):
        assert torch.equal(found, model.generate(ids, gateskip_budget={"keep": 0.7}, **options))


@torch.no_grad()
def test_a_full_static_cache_says_so(stacked: list[bool]) -> None:
    model, ids = gated(), random_ids(1, 6)
    cache = StaticCache(config=model.config, max_cache_len=6)
    with override(state_of(model), thresholds=medians(model)):
        fed(model, ids, cache, start=5)
        with pytest.raises((IndexError, RuntimeError)):
            model(ids[:, :1], cache=cache)
    assert stacked[-1] is False


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_weights_of_8_bits(family: str, stacked: list[bool]) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny(family)
    quantization.quantize_(model.model.layers, quantization.Int8WeightOnlyConfig())
    config = gateskip.GateConfig(init_std=0.3, init_bias=1.0, rank=4, compensation="low_rank")
    gateskip.attach(model, config)
    for batch in (1, 3):
        ids, found = random_ids(batch, 14), []
        for backend in ("torch", "numba"):
            stacked.clear()
            with kernels.using(backend), override(state_of(model), thresholds=medians(model)):
                found.append(fed(model, ids, DynamicCache(config=model.config)))
            assert all(stacked) == (backend == "numba")
        torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    # Asymmetric or mixed weights are left to the modules.
    model.model.layers[0].mlp.up_proj.weight.zero_point.fill_(1)
    vars(model.model.layers[0]).pop("_gateskip_plans")
    vars(model.model.layers[0]).pop("_gateskip_stack")
    stacked.clear()
    fed(model, random_ids(1, 8), DynamicCache(config=model.config))
    assert not any(stacked)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_several_tokens_of_a_row_at_once(
    batch: int, side: str, static: bool, stacked: list[bool]
) -> None:
    """Drafted tokens are checked in one call: decisions, logits and cache of one by one."""
    model = gated("qwen3", compensation="low_rank")
    ids, mask, places = padded(batch, 20, side)
    tail = torch.arange(20) >= 8

    def run(steps: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        cache = (
            StaticCache(config=model.config, max_cache_len=32)
            if static
            else DynamicCache(config=model.config)
        )
        parts, at = [], 0
        with gateskip.trace(model) as trace:
            for new in (8, *steps):
                end = at + new
                out = model(
                    ids[:, at:end], attention_mask=mask[:, :end], position_ids=places[:, at:end],
                    cache=cache, use_cache=True,
                )  # fmt: skip
                parts.append(out.logits)
                at = end
        masks = [torch.cat(each, 1)[:, tail] for each in trace.keep.values()]
        assert cache.get_seq_length() == 20
        return torch.cat(parts, 1)[:, tail], masks

    with override(state_of(model), thresholds=medians(model)):
        one, one_keep = run([1] * 12)
        stacked.clear()
        several, several_keep = run([5, 4, 3])
    assert stacked[-3:] == [True] * 3
    torch.testing.assert_close(several, one, atol=2e-5, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(several_keep, one_keep, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("budget", [1.0, 0.5])
@torch.no_grad()
def test_checked_tokens_are_the_same_to_the_bit(
    dtype: torch.dtype, batch: int, budget: float, stacked: list[bool]
) -> None:
    """So that checking a draft chooses what plain decoding would, near-ties in bfloat16 too."""
    model = with_table(gated("llama", compensation="low_rank", dtype=dtype))
    ids = random_ids(batch, 24, seed=3)

    def run(steps: list[int]) -> torch.Tensor:
        cache, at, parts = DynamicCache(config=model.config), 0, []
        for new in (9, *steps):
            out = model(ids[:, at : at + new], cache=cache, use_cache=True)
            parts.append(out.logits)
            at += new
        return torch.cat(parts, 1)[:, 9:]

    with gateskip.budget(model, keep=budget):
        one = run([1] * 15)
        stacked.clear()
        assert torch.equal(run([2, 3, 6, 4]), one)
    assert stacked == [True] * 4
