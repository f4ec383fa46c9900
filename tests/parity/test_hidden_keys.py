"""``kv_source="none"``: what a token skips, no later token sees there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import gateskip
from gateskip import kernels
from gateskip.skipping.state import override, replay, state_of
from models import gated, medians, padded, random_ids, tiny, with_table

GONE = [3, 4, 9]


def unit(family: str, attention: str = "sdpa") -> Any:
    config = gateskip.GateConfig(kind="unit", compensation="none", kv_source="none",
                                 importance="random")  # fmt: skip
    return gateskip.attach(tiny(family, attention), config)


def without(ids: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """(ids, their positions, where they were) of a sequence without some tokens."""
    left = [i for i in range(ids.shape[1]) if i not in GONE]
    return ids[:, left], torch.tensor(left)[None].expand(ids.shape[0], -1), left


@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "sdpa"), ("llama", "eager"), ("qwen3", "sdpa"), ("gpt2", "eager"), ("phi3", "sdpa")],
)
@pytest.mark.parametrize("execution", ["compacted", "masked"])
@pytest.mark.parametrize("stepwise", [False, True])
@torch.no_grad()
def test_who_skips_every_layer_was_never_there(
    family: str, attention: str, execution: str, stepwise: bool
) -> None:
    dense, model = tiny(family, attention), unit(family, attention)
    ids = random_ids(2, 14)
    short, positions, left = without(ids)
    # With a mask, lest positions with gaps be taken for packed sequences.
    expected = dense(short, position_ids=positions, attention_mask=torch.ones_like(short)).logits
    keep = torch.ones(2, 14, dtype=torch.bool)
    keep[:, GONE] = False
    cuts = [slice(0, 6), *(slice(i, i + 1) for i in range(6, 14))] if stepwise else [slice(0, 14)]
    decisions = [dict.fromkeys(state_of(model).branches, keep[:, cut]) for cut in cuts]
    cache, parts = DynamicCache(config=model.config), []
    with replay(state_of(model), decisions), gateskip.execution(model, execution):
        for cut in cuts:
            parts.append(model(ids[:, cut], cache=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1)[:, left], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_cache_remembers_at_full_budget() -> None:
    model, ids = unit("llama"), random_ids(1, 14)
    short, positions, _ = without(ids)
    keep = torch.ones(1, 13, dtype=torch.bool)
    keep[:, GONE] = False
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, 20)):
        with replay(state_of(model), [dict.fromkeys(state_of(model).branches, keep)]):
            model(ids[:, :13], cache=cache, use_cache=True)
        found = model(ids[:, 13:], cache=cache, use_cache=True).logits
        whole = tiny()(short, position_ids=positions, attention_mask=torch.ones_like(short))
        expected = whole.logits[:, -1:]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_keeping_everything_is_bit_for_bit_dense() -> None:
    model, dense, ids = unit("llama"), tiny(), random_ids(2, 14)
    keeps = dict.fromkeys(state_of(model).branches, float("-inf"))
    with override(state_of(model), thresholds=keeps), kernels.using("torch"):
        assert torch.equal(model(ids).logits, dense(ids).logits)
        caches = [DynamicCache(config=dense.config) for _ in range(2)]
        for part in (ids[:, :9], ids[:, 9:10], ids[:, 10:]):
            found = model(part, cache=caches[0]).logits
            assert torch.equal(found, dense(part, cache=caches[1]).logits)


def test_gradients_are_those_of_masked() -> None:
    model = gated("llama", kv_source="none")
    ids, mask, _ = padded(3, 14, "right")
    found = []
    for execution in ("compacted", "masked"):
        model.zero_grad()
        with (
            override(state_of(model), thresholds=medians(model)),
            gateskip.execution(model, execution),
        ):
            out = model(ids, attention_mask=mask).logits[mask.bool()]
            out.square().mean().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert set(found[0]) == set(found[1])
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")  # flex attention's own
@torch.no_grad()
def test_what_cannot_hide_is_refused() -> None:
    model = with_table(gated("llama", "flex_attention", kv_source="none"))
    with (
        gateskip.budget(model, keep=0.6),
        pytest.raises(gateskip.UnsupportedError, match="set_attn_implementation"),
    ):
        model(random_ids(2, 14))
