"""Caches and generation modes of Hugging Face: compacted equals masked in all of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import gateskip
from gateskip.skipping.state import override, state_of
from models import FAMILIES, gated, medians, padded, random_ids, tiny, with_table

families = pytest.mark.parametrize("family", FAMILIES)
sources = pytest.mark.parametrize("kv", ["project", "previous", "none"])
NEW = 8


def built(family: str = "qwen3", kv: str = "project", **options: Any) -> Any:
    model = with_table(gated(family, kv_source=kv, compensation="low_rank", **options))
    model.generation_config.eos_token_id = None  # tiny models would end at random
    gateskip.set_budget(model, keep=0.6)
    return model


def generated(model: Any, ids: Tensor, **options: Any) -> Tensor:
    torch.manual_seed(3)
    given: dict[str, Any] = {
        "max_new_tokens": NEW, "do_sample": False, "repetition_penalty": 2.0,
        "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    found: Tensor = model.generate(ids, **(given | options))
    return found


MODES: dict[str, dict[str, Any]] = {
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 5},
    "beams_returned": {"num_beams": 4, "num_return_sequences": 3},
    "samples_returned": {"do_sample": True, "num_return_sequences": 4},
    "no_cache": {"use_cache": False},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [1, 3])
@sources
def test_modes(mode: str, batch: int, kv: str) -> None:
    model, ids = built(kv=kv), random_ids(batch, 13)
    with gateskip.trace(model) as trace:
        fast = generated(model, ids, **MODES[mode])
    assert trace.ledger.skip_rate > 0.1
    with gateskip.execution(model, "masked"):
        slow = generated(model, ids, **MODES[mode])
    assert torch.equal(fast, slow)
    if "num_return_sequences" not in MODES[mode]:
        assert torch.equal(fast, generated(model, ids)), "another cache, other tokens"


@families
@torch.no_grad()
def test_static_cache_holds_what_a_dynamic_one_does(family: str) -> None:
    model, ids = gated(family, compensation="low_rank"), random_ids(3, 12)
    with override(state_of(model), thresholds=medians(model)):
        found = []
        for cache in (
            DynamicCache(config=model.config),
            StaticCache(config=model.config, max_cache_len=32),
        ):
            parts = [
                model(ids[:, a:b], cache=cache, use_cache=True).logits
                for a, b in ((0, 7), (7, 8), (8, 9), (9, 12))
            ]
            found.append(torch.cat(parts, 1))
        torch.testing.assert_close(found[0], model(ids).logits, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], found[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("cache", [None, "static"])
@torch.no_grad()
def test_places_hold_when_padding_has_left_the_window(cache: str | None) -> None:
    model = with_table(gated("mistral_window", importance="random"))  # decides by place alone
    ids, mask, _ = padded(3, 20, "left")
    options: Any = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    if cache is not None:
        options["cache_implementation"] = cache
    with gateskip.budget(model, keep=0.6):
        found = model.generate(ids, attention_mask=mask, **options)
        for row in range(3):
            own, real = ids[row : row + 1, 2 * row :], mask[row : row + 1, 2 * row :]
            alone = model.generate(own, attention_mask=real, **options)
            assert torch.equal(alone[0, own.shape[1] :], found[row, 20:]), row


@torch.no_grad()
def test_static_cache_with_padding() -> None:
    model = gated(compensation="low_rank")
    ids, mask, positions = padded(3, 12, "left")
    with override(state_of(model), thresholds=medians(model)):
        whole = model(ids, attention_mask=mask, position_ids=positions).logits
        cache = StaticCache(config=model.config, max_cache_len=32)
        parts = [
            model(
                ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b],
                cache=cache, use_cache=True,
            ).logits
            for a, b in ((0, 9), (9, 10), (10, 12))
        ]  # fmt: skip
    found = torch.cat(parts, 1)
    torch.testing.assert_close(found[mask.bool()], whole[mask.bool()], atol=2e-5, rtol=1e-4)


@sources
@torch.no_grad()
def test_a_prompts_cache_is_continued_twice(kv: str) -> None:
    model, ids = built(kv=kv), random_ids(1, 20)
    prompt = model(ids[:, :12], use_cache=True).cache
    for tail in (ids[:, 12:], random_ids(1, 8, seed=9)):
        continued = model(tail, cache=copy.deepcopy(prompt), use_cache=True).logits
        whole = model(torch.cat((ids[:, :12], tail), 1)).logits[:, 12:]
        torch.testing.assert_close(continued, whole, atol=2e-5, rtol=1e-4)


@sources
@torch.no_grad()
def test_a_cropped_cache_is_as_if_never_longer(kv: str) -> None:
    model, ids = built(kv=kv), random_ids(2, 20)
    cache = model(ids, use_cache=True).cache
    cache.crop(-6)
    other = random_ids(2, 5, seed=4)
    continued = model(other, cache=cache, use_cache=True).logits
    whole = model(torch.cat((ids[:, :14], other), 1)).logits[:, 14:]
    torch.testing.assert_close(continued, whole, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_chat_goes_on_turn_by_turn() -> None:
    model = built()
    turns = [random_ids(1, 9, seed=i) for i in range(3)]
    cache = DynamicCache(config=model.config)
    text = turns[0][:, :0]
    for turn in turns:
        text = torch.cat((text, turn), 1)
        out = generated(model, text, cache=cache)
        assert torch.equal(out, generated(model, text)), "the cache remembers something else"
        text = out


@torch.no_grad()
def test_assistants_and_prompt_lookup_lose_nothing() -> None:
    model = built()
    ids = random_ids(1, 6).repeat(1, 4)  # something to look up
    options: dict[str, Any] = {"repetition_penalty": 1.0, "max_new_tokens": 12}
    plain = generated(model, ids, **options)
    assert torch.equal(generated(model, ids, prompt_lookup_num_tokens=3, **options), plain)
    helped = generated(model, ids, assistant_model=tiny("qwen3"), **options)
    assert torch.equal(helped, plain)


@torch.no_grad()
def test_a_gated_assistant_drafts() -> None:
    target, draft = tiny("qwen3"), built()
    target.generation_config.eos_token_id = None
    ids = random_ids(1, 12)
    options: dict[str, Any] = {"repetition_penalty": 1.0}
    plain = generated(target, ids, **options)
    assert torch.equal(generated(target, ids, assistant_model=draft, **options), plain)


@families
@torch.no_grad()
def test_hidden_states_of_all_layers(family: str) -> None:
    model, ids = gated(family), random_ids(2, 10)
    with override(state_of(model), thresholds=medians(model)):
        fast = model(ids, output_hidden_states=True).hidden_states
        with gateskip.execution(model, "masked"):
            slow = model(ids, output_hidden_states=True).hidden_states
    assert len(fast) == 5
    for ours, reference in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("batch", "length"), [(64, 3), (17, 1), (1, 1), (1, 256), (2, 255)])
@torch.no_grad()
def test_sizes(batch: int, length: int) -> None:
    model, ids = gated(compensation="low_rank"), random_ids(batch, length)
    with override(state_of(model), thresholds=medians(model)):
        fast = model(ids).logits
        with gateskip.execution(model, "masked"):
            slow = model(ids).logits
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "mistral_window", "gemma2"])
@torch.no_grad()
def test_generating_with_a_static_cache_and_padding(family: str) -> None:
    model = built(family)
    ids, mask, _ = padded(3, 14, "left")
    plain = generated(model, ids, attention_mask=mask)
    static = generated(model, ids, attention_mask=mask, cache_implementation="static")
    assert torch.equal(static, plain)
    for row in range(3):
        real = ids[row][mask[row].bool()][None]
        assert torch.equal(generated(model, real)[0, -NEW:], static[row, -NEW:])


def test_a_four_dimensional_mask_of_ones_own_is_refused() -> None:
    model, ids = built(), random_ids(1, 4)
    own = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    with pytest.raises(gateskip.UnsupportedError, match="2-D mask"):
        model(ids, attention_mask=own)
