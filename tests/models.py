"""Tiny random models and gates for the tests."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import gateskip
from gateskip.config import BranchKey
from gateskip.data import Batch
from gateskip.fitting.closed_loop import keep_all, measure
from gateskip.retrofit.attach import gate_of, gated_branches
from gateskip.skipping.compensation import Compensation, set_compensation
from gateskip.skipping.policy import ThresholdTable
from gateskip.skipping.state import state_of

VOCAB, LAYERS = 128, 4
WINDOW = 6
#: What a family's tiny config says beside the common sizes.
FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mistral_window": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": {},
    "cohere": {"use_qk_norm": True, "logit_scale": 0.5},
    "gemma2": {
        "query_pre_attn_scalar": 16, "sliding_window": WINDOW, "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
    },
    "gemma3_text": {
        "query_pre_attn_scalar": 16, "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt2": {
        "head_dim": None, "num_key_value_heads": None, "intermediate_size": None,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "gpt_neox": {"head_dim": None, "num_key_value_heads": None},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    "granite": {"residual_multiplier": 0.7, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {},
    "phi3": {},
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "decoder_sparse_step": 2,
    },
    "smollm3": {"no_rope_layers": [1, 1, 0, 0]},
}  # fmt: skip
FAMILIES = tuple(FAMILY_OPTIONS)
EAGER_ONLY = ("gemma2", "gpt_oss")  # soft caps and sinks


def needed_by(kind: str) -> dict[str, Any]:
    """What the config of a gate kind has to say beside it."""
    whole = {"placement": "layer", "decision": "layer", "compensation": "none"}
    return whole if kind in ("router", "bottleneck") else {}


def tiny(family: str = "llama", attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """A random model whose branches matter: weights are larger than at a usual initialisation."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "vocab_size": VOCAB, "max_position_embeddings": 256, "initializer_range": 0.12,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    options |= FAMILY_OPTIONS[family]
    # None where a family has no such size; a window may be None.
    given = {k: v for k, v in options.items() if v is not None or k == "sliding_window"}
    config = AutoConfig.for_model(family.removesuffix("_window"), **given)
    attention = "eager" if family in EAGER_ONLY else attention
    if "num_experts_per_tok" in given:
        config._experts_implementation = "eager"  # its products are counted
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.to(dtype).eval()


def gated(
    family: str = "llama",
    attention: str = "sdpa",
    *,
    compensation: str = "none",
    kv_source: str = "project",
    kind: str = "low_rank",
    importance: str = "mean_logit",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    """A tiny model with random gates that disagree about tokens, and random compensation."""
    given: dict[str, Any] = {
        "kind": kind, "init_std": 0.3, "init_bias": 1.0, "rank": 4, "compensation": compensation,
        "kv_source": kv_source, "compensation_rank": 4, "importance": importance,
    }  # fmt: skip
    config = gateskip.GateConfig(**(given | options))
    model = gateskip.attach(tiny(family, attention, dtype), config)
    state = state_of(model)
    generator = torch.Generator().manual_seed(1)
    if importance == "head":
        for module in gated_branches(model, state.family).values():
            gate_of(module).set_head(torch.randn(64, generator=generator) * 0.3, 0.2)
    if compensation != "none":
        for module in gated_branches(model, state.family).values():
            random = [torch.randn(s, generator=generator) * 0.3 for s in ((64,), (4, 64), (64, 4))]
            thin = random[1:] if compensation == "low_rank" else []
            set_compensation(module, Compensation(random[0], *thin))
        state.compensated = True
    return model


def medians(model: nn.Module, quantile: float = 0.5) -> dict[BranchKey, float]:
    """Thresholds at a quantile of each branch's scores on random ids."""
    ids = random_ids(4, 32, seed=5)
    ones = torch.ones_like(ids)
    seen = measure(model, [Batch(ids, ones, ones.bool())], keep_all(state_of(model)))
    return {
        k: float(torch.tensor(s.weighted().values).quantile(quantile))
        for k, s in seen.scores.items()
    }


def with_table(model: nn.Module) -> nn.Module:
    """Give the model a policy with four grid points."""
    state = state_of(model)
    rows = [medians(model, q) for q in (0.0, 0.25, 0.5, 0.75)]
    state.policy = ThresholdTable(
        allocation="uniform", weigh_cost=False, keep=(1.0, 0.75, 0.5, 0.25),
        compute=(1.02, 0.8, 0.55, 0.3), tokens=1000, mean_keys=16.0,
        thresholds=tuple(
            tuple(row.get(b, -math.inf) for b in state.branches) for row in rows
        ),
    )  # fmt: skip
    return model


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Fixed random token ids, none of them special."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(batch: int, length: int, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, mask, position_ids); row r lacks 2·r tokens on ``side`` ("none": no padding)."""
    ids, mask = random_ids(batch, length), torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        if side == "left":
            mask[row, : 2 * row] = 0
        elif side == "right" and row:
            mask[row, -2 * row :] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def through_cache(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, steps: int) -> Tensor:
    """Logits of fixed ids fed through a cache: one half at once, then ``steps`` at a time."""
    start = ids.shape[1] // 2
    cuts = [0, *range(start, ids.shape[1], steps), ids.shape[1]]
    cache, logits = None, []
    for a, b in itertools.pairwise(cuts):
        out = model(
            ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b],
            use_cache=True, **({} if cache is None else {"cache": cache}),
        )  # fmt: skip
        cache = out.cache
        logits.append(out.logits)
        lengths = {cache.get_seq_length(layer) for layer in range(LAYERS)}
        assert lengths == {b}, "I8: every layer's cache is equally long after every step"
    return torch.cat(logits, 1)


@torch.no_grad()
def fed(model: Any, ids: Tensor, cache: Any, start: int = 6) -> Tensor:
    """Logits of ids through a cache: ``start`` at once, then one by one."""
    parts = [model(ids[:, :start], cache=cache, use_cache=True).logits] if start else []
    parts += [
        model(ids[:, i : i + 1], cache=cache, use_cache=True).logits
        for i in range(start, ids.shape[1])
    ]
    return torch.cat(parts, 1)
