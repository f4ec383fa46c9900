"""Long use, threads and interruptions of one model; random architectures and step patterns."""

from __future__ import annotations

import gc
import random
import resource
import threading
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

import gateskip
from gateskip.skipping.state import current, override, state_of
from models import VOCAB, gated, medians, random_ids, with_table


def built(family: str = "qwen3") -> Any:
    model = with_table(gated(family, compensation="low_rank"))
    model.generation_config.eos_token_id = None
    return model


def generated(model: Any, ids: Tensor, **options: Any) -> Tensor:
    given_options: dict[str, Any] = {
        "max_new_tokens": 6, "do_sample": False, "repetition_penalty": 2.0,
        "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    found: Tensor = model.generate(ids, **(given_options | options))
    return found


def test_a_stream_in_a_thread_takes_the_budget_it_was_given() -> None:
    model, ids = built(), random_ids(1, 9)
    wanted = generated(model, ids, gateskip_budget={"keep": 0.4})

    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            pass

    streamer = Streamer()
    thread = threading.Thread(
        target=generated,
        args=(model, ids),
        kwargs={"gateskip_budget": {"keep": 0.4}, "streamer": streamer},
    )
    with gateskip.budget(model, keep=1.0):  # this thread's, not the other's
        thread.start()
        thread.join(60)
    assert streamer.tokens == wanted[0].tolist()


def test_an_exception_in_the_middle_leaves_the_model_as_it_was() -> None:
    model, ids = built(), random_ids(2, 9)
    gateskip.set_budget(model, keep=0.6)
    before = generated(model, ids)
    steps: list[int] = []

    def interrupt(_: Tensor, scores: Tensor) -> Tensor:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return scores

    for mode in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        steps.clear()
        with pytest.raises(KeyboardInterrupt):
            generated(model, ids, logits_processor=[interrupt], **mode)
        assert current(state_of(model)).budget is None
        assert not current(state_of(model)).generating
        assert torch.equal(generated(model, ids), before)


@pytest.mark.slow
def test_memory_stays_flat() -> None:
    """2,000 generations of random shape with one model."""
    model, choose = built("llama"), random.Random(0)

    def some(count: int) -> None:
        for _ in range(count):
            ids = random_ids(choose.randint(1, 4), choose.randint(1, 40), choose.randint(0, 99))
            budget = {"keep": choose.choice([0.3, 0.5, 0.8, 1.0])}
            generated(model, ids, max_new_tokens=choose.randint(1, 8), gateskip_budget=budget)

    some(300)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    some(1700)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 40 * 1024, f"grew by {(after - before) / 1024:.0f} MiB"


def near(found: Tensor, expected: Tensor) -> None:
    """Float32 roundings, which grow with what is added up."""
    assert float((found - expected).abs().max()) <= 5e-5 * max(float(expected.abs().max()), 1.0)


ARCHITECTURES = ("llama", "qwen2", "qwen3", "olmo2", "gpt_neox", "granite")


@st.composite
def situations(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    return {
        "family": draw(
            st.sampled_from(["llama", "qwen2", "qwen3", "olmo2", "gpt_neox", "granite"])
        ),
        "layers": draw(st.integers(1, 3)),
        "heads": kv_heads * draw(st.sampled_from([1, 2, 3])),
        "kv_heads": kv_heads,
        "head_dim": draw(st.sampled_from([8, 16])),
        "inner": draw(st.sampled_from([24, 50])),
        "batch": draw(st.integers(1, 4)),
        "length": draw(st.integers(1, 20)),
        "cuts": draw(st.lists(st.integers(1, 5), max_size=6)),
        "quantile": draw(st.floats(0.0, 0.95)),
        "kv": draw(st.sampled_from(["project", "previous", "none"])),
        "static": draw(st.booleans()),
        "left": draw(st.lists(st.integers(0, 3), min_size=4, max_size=4)),
        "seed": draw(st.integers(0, 1000)),
    }


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(situations())
@torch.no_grad()
def test_any_architecture_padding_cache_and_pattern_of_steps(case: dict[str, Any]) -> None:
    """I2 (compacted is masked) and I3 (cached is uncached) wherever they can be asked."""
    options: dict[str, Any] = {
        "hidden_size": case["heads"] * case["head_dim"], "intermediate_size": case["inner"],
        "num_hidden_layers": case["layers"], "num_attention_heads": case["heads"],
        "num_key_value_heads": case["kv_heads"], "head_dim": case["head_dim"], "vocab_size": VOCAB,
        "max_position_embeddings": 64, "initializer_range": 0.12, "pad_token_id": 0,
    }  # fmt: skip
    if case["family"] == "gpt_neox":
        options = {k: v for k, v in options.items() if k not in ("num_key_value_heads", "head_dim")}
    torch.manual_seed(case["seed"])
    config = AutoConfig.for_model(case["family"], **options)
    model = AutoModelForCausalLM.from_config(config).eval()
    gate = gateskip.GateConfig(
        kind="scalar", init_std=0.3, init_bias=1.0, kv_source=case["kv"], compensation="none"
    )
    gateskip.attach(model, gate)
    state = state_of(model)
    thresholds = medians(model, case["quantile"])
    batch, length = case["batch"], case["length"]
    ids, mask = random_ids(batch, length, case["seed"]), torch.ones(batch, length, dtype=torch.long)
    for row, lacking in enumerate(case["left"][:batch]):
        mask[row, : min(lacking, length - 1)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    valid = mask.bool()
    with override(state, thresholds=thresholds):
        whole = model(ids, attention_mask=mask, position_ids=positions).logits
        with gateskip.execution(model, "masked"):
            reference = model(ids, attention_mask=mask, position_ids=positions).logits
        near(whole[valid], reference[valid])
        cache: Any = (
            StaticCache(config=config, max_cache_len=length + 3)
            if case["static"]
            else DynamicCache(config=config)
        )
        parts, begin = [], 0
        for step in [*case["cuts"], length]:
            end = min(begin + step, length)
            if end > begin:
                parts.append(
                    model(
                        ids[:, begin:end], attention_mask=mask[:, :end],
                        position_ids=positions[:, begin:end], cache=cache, use_cache=True,
                    ).logits
                )  # fmt: skip
            begin = end
    found = torch.cat(parts, 1)
    near(found[valid], whole[valid])
