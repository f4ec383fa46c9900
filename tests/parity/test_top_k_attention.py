"""Top-k attention: exact from n keys on, bounded below, the same compacted and masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gateskip
from gateskip.errors import ConfigError, UnsupportedError
from gateskip.execution.top_k_attention import set_top_k_attention, top_k_attention
from gateskip.skipping.state import override, state_of
from models import fed, gated, medians, padded, random_ids, tiny


def inputs(keys: int = 24, queries: int = 24) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, queries, 16, generator=generator) * 2
    key, value = (torch.randn(2, 2, keys, 16, generator=generator) for _ in range(2))
    return query, key, value


def full(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    offset = key.shape[2] - query.shape[2]
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(offset)
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.25, enable_gqa=True
    )


@pytest.mark.parametrize("queries", [24, 5, 1])
def test_exact_from_all_keys_on(queries: int) -> None:
    query, key, value = inputs(queries=queries)
    for k in (24, 100):
        out, mass = top_k_attention(query, key, value, k, scaling=0.25)
        torch.testing.assert_close(out, full(query, key, value), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mass, torch.ones_like(mass))


@pytest.mark.parametrize("k", [1, 2, 4, 8, 16])
def test_the_error_is_bounded_in_every_row(k: int) -> None:
    query, key, value = inputs()
    out, mass = top_k_attention(query, key, value, k, scaling=0.25)
    error = (out - full(query, key, value)).norm(dim=-1)
    longest = value.norm(dim=-1).amax(-1).repeat_interleave(2, 1)[..., None]
    assert bool((error <= 2 * (1 - mass) * longest + 1e-5).all())
    assert bool((mass[:, :, k:] < 1).all())
    assert bool((error[:, :, k:] > 1e-4).any()), "something was left out"


def test_exactly_k_keys_though_scores_tie() -> None:
    query, key = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 6, 8)
    value = torch.eye(6, 8)[None, None]
    out, _ = top_k_attention(query, key, value, 2, scaling=1.0)
    assert sorted(out.flatten().tolist())[-3:] == pytest.approx([0.0, 0.5, 0.5])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mistral_window"])
@torch.no_grad()
def test_a_model_whose_k_is_large_is_as_before(family: str) -> None:
    model = tiny(family, "eager")
    ids, mask, places = padded(2, 20, "left")
    wanted = model(ids, attention_mask=mask, position_ids=places).logits[mask.bool()]
    set_top_k_attention(model, 64)
    found = model(ids, attention_mask=mask, position_ids=places).logits[mask.bool()]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    set_top_k_attention(model, 2)
    few = model(ids, attention_mask=mask, position_ids=places).logits[mask.bool()]
    assert not torch.allclose(few, wanted, atol=1e-2)
    set_top_k_attention(model, None)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(
        model(ids, attention_mask=mask, position_ids=places).logits[mask.bool()], wanted
    )


@pytest.mark.parametrize("side", ["none", "left"])
@torch.no_grad()
def test_beside_gates(side: str) -> None:
    model: Any = gated("llama", compensation="low_rank")
    set_top_k_attention(model, 4)
    ids, mask, places = padded(2, 20, side)
    given = {"attention_mask": mask, "position_ids": places}
    with override(state_of(model), thresholds=medians(model)):
        with gateskip.trace(model) as trace:
            fast = model(ids, **given).logits[mask.bool()]
        with gateskip.execution(model, "masked"):
            slow = model(ids, **given).logits[mask.bool()]
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)
        row = random_ids(1, 20)
        whole = model(row).logits
        torch.testing.assert_close(fed(model, row, None or _cache(model)), whole, atol=1e-4,
                                   rtol=1e-4)  # fmt: skip
    with_all = set_top_k_attention(model, 64)
    with override(state_of(model), thresholds=medians(model)), gateskip.trace(model) as more:
        with_all(ids, **given)
    assert trace.ledger.macs_dense == more.ledger.macs_dense
    assert trace.ledger.macs_spent < more.ledger.macs_spent


def _cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


@torch.no_grad()
def test_saved_with_the_gates(tmp_path: Any) -> None:
    model = set_top_k_attention(gated("llama"), 3)
    ids = random_ids(1, 20)
    wanted = model(ids).logits
    gateskip.save(model, tmp_path / "gates")
    again = gateskip.load(tmp_path / "gates", base=tiny("llama"))
    torch.testing.assert_close(again(ids).logits, wanted)


def test_bad_arguments() -> None:
    for k in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="k="):
            set_top_k_attention(tiny("llama"), k)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="sinks"):
        set_top_k_attention(tiny("gpt_oss"), 4)
    model = tiny("llama")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedError, match="flex_attention"):
        set_top_k_attention(model, 4)
