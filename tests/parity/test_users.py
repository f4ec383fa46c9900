"""What users do to a model around decoding: hooks, patches, forks of caches, other defaults."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import gateskip
from gateskip import kernels
from gateskip.skipping.state import override, state_of
from models import fed, gated, medians, random_ids, tiny, with_table

pytestmark = pytest.mark.skipif(not kernels.available(), reason="numba is not installed")


@pytest.fixture
def default_dtype() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_default_dtype(
    dtype: torch.dtype, default_dtype: None, stacked: list[bool]
) -> None:
    model, ids = gated(compensation="low_rank"), random_ids(1, 14)
    with override(state_of(model), thresholds=medians(model)):
        expected = fed(model, ids, DynamicCache(config=model.config))
        torch.set_default_dtype(dtype)
        found = fed(model, ids, DynamicCache(config=model.config))
    assert stacked
    assert all(stacked)
    assert torch.equal(found, expected)
    other = gateskip.attach(tiny(), gateskip.GateConfig(kind="low_rank"))
    gates = [p for n, p in other.named_parameters() if ".skip_gate." in n]
    assert gates
    assert {p.dtype for p in gates} == {torch.float32}


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_windows_in_some_layers_with_a_cache_that_keeps_all(family: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=128, initializer_range=0.12,
        use_sliding_window=True, sliding_window=5, max_window_layers=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = random_ids(1, 16)
    dense = fed(model, ids, DynamicCache())
    gateskip.attach(model, gateskip.GateConfig(init_bias=30.0, init_std=0.0, compensation="none"))
    torch.testing.assert_close(fed(model, ids, DynamicCache()), dense, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("where", ["layers.1", "layers.1.mlp", "layers.1.input_layernorm"])
def test_a_forward_patched_after_decoding_began_is_called(where: str) -> None:
    model, ids = gated(), random_ids(1, 14)
    module = model.model.get_submodule(where)
    with override(state_of(model), thresholds=medians(model)):
        fed(model, ids, DynamicCache(config=model.config))
        inner = module.forward
        module.forward = lambda *args, **kwargs: inner(*args, **kwargs) * 1.5
        found = fed(model, ids, DynamicCache(config=model.config))
        with torch.no_grad():
            torch.testing.assert_close(found, model(ids).logits, atol=2e-5, rtol=1e-4)
            with kernels.using("torch"), gateskip.execution(model, "masked"):
                torch.testing.assert_close(found, model(ids).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "where"), [("qwen3", "self_attn.q_norm"), ("llama", "mlp.act_fn")]
)
def test_hooks_inside_of_branches_are_heard(family: str, where: str) -> None:
    model, ids = gated(family), random_ids(1, 14)
    with override(state_of(model), thresholds=medians(model)):
        fed(model, ids, DynamicCache(config=model.config))
        module = model.model.layers[1].get_submodule(where)
        module.register_forward_hook(lambda _m, _args, out: out * 1.5)
        found = fed(model, ids, DynamicCache(config=model.config))
        with torch.no_grad(), gateskip.execution(model, "masked"):
            torch.testing.assert_close(found, model(ids).logits, atol=2e-5, rtol=1e-4)


def test_what_a_plan_read_is_read_again() -> None:
    model, ids = gated(), random_ids(1, 14)
    with override(state_of(model), thresholds=medians(model)):
        for change in ("act_fn", "scaling"):
            fed(model, ids, DynamicCache(config=model.config))
            for layer in model.model.layers:
                if change == "act_fn":
                    layer.mlp.act_fn = torch.nn.GELU()
                else:
                    layer.self_attn.scaling = layer.self_attn.scaling * 2.0
            found = fed(model, ids, DynamicCache(config=model.config))
            with torch.no_grad(), gateskip.execution(model, "masked"):
                torch.testing.assert_close(found, model(ids).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("how", ["fork", "crop"])
def test_tensors_of_a_cache_that_somebody_keeps_are_not_written_over(
    how: str, stacked: list[bool]
) -> None:
    model, ids, more = gated(), random_ids(1, 12), random_ids(2, 4, seed=7)
    with override(state_of(model), thresholds=medians(model)):
        cache = DynamicCache()
        fed(model, ids, cache)
        kept = [(part.keys, part.values) for part in cache.layers]
        before = [(k.clone(), v.clone()) for k, v in kept]
        other = copy.copy(cache)
        other.layers = [copy.copy(part) for part in cache.layers]
        if how == "crop":
            cache.crop(-3)
            fed(model, more[:1], cache, start=0)
        else:
            outs = [[], []]  # type: ignore[var-annotated]
            for i in range(4):  # in turns
                for out, row, held in zip(outs, more, (cache, other), strict=True):
                    out.append(fed(model, row[None, i : i + 1], held, start=0))
            for out, row in zip(outs, more, strict=True):
                fresh = DynamicCache()
                fed(model, ids, fresh)
                expected = fed(model, row[None], fresh, start=0)
                assert torch.equal(torch.cat(out, 1), expected)
    assert all(stacked)
    for (k, v), (k0, v0) in zip(kept, before, strict=True):
        assert torch.equal(k, k0)
        assert torch.equal(v, v0)


def test_hidden_states_asked_for_once_do_not_slow_what_follows(stacked: list[bool]) -> None:
    model = with_table(gated())
    ids, options = random_ids(1, 8), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    out = model.generate(
        ids, output_hidden_states=True, return_dict_in_generate=True, gateskip_budget={"keep": 0.5},
        **options,
    )  # fmt: skip
    assert len(out.hidden_states[1]) == 5
    assert not any(stacked)
    stacked.clear()
    again = model.generate(ids, gateskip_budget={"keep": 0.5}, **options)
    assert stacked
    assert all(stacked)
    assert torch.equal(again, out.sequences)


def test_a_model_made_in_inference_mode(stacked: list[bool]) -> None:
    ids = random_ids(1, 8)
    with torch.inference_mode():
        model = with_table(gated(compensation="low_rank"))
        out = model.generate(ids, max_new_tokens=4, min_new_tokens=4, gateskip_budget={"keep": 0.5})
    assert out.shape == (1, 12)
    assert stacked
    assert all(stacked)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("other", ["eager", "flex_attention"])
def test_another_attention_while_decoding(other: str) -> None:
    model, ids = gated(), random_ids(1, 14)
    with override(state_of(model), thresholds=medians(model)):
        expected = fed(model, ids, DynamicCache(config=model.config))
        model.set_attn_implementation(other)
        found = fed(model, ids, DynamicCache(config=model.config))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_router_logits_need_the_masked_form(family: str) -> None:
    model, ids = gated(family), random_ids(2, 8)
    with torch.no_grad(), override(state_of(model), thresholds=medians(model)):
        with pytest.raises(gateskip.errors.UnsupportedError, match="output_router_logits"):
            model(ids, labels=ids, output_router_logits=True)
        with gateskip.execution(model, "masked"):
            out = model(ids, labels=ids, output_router_logits=True)
    assert bool(torch.isfinite(out.aux_loss))


def test_an_activation_that_is_a_function() -> None:
    model, ids = gated(), random_ids(1, 12)
    for layer in model.model.layers:
        del layer.mlp.act_fn
        layer.mlp.act_fn = torch.nn.functional.gelu
    with override(state_of(model), thresholds=medians(model)):
        found = fed(model, ids, DynamicCache(config=model.config))
        with torch.no_grad(), gateskip.execution(model, "masked"):
            torch.testing.assert_close(found, model(ids).logits, atol=2e-5, rtol=1e-4)
