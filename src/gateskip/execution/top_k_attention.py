"""Top-k attention (arXiv 2106.06899): every query keeps the k keys with the largest scores.

Training-free, beside any gates: a *key policy*. Scores are computed for all keys, in chunks of
queries; the softmax and the sum over values run over k of them. What is left out weighs 1 − m, m
the softmax mass of the k keys, so no output moves by more than 2 · (1 − m) · max‖v‖.

Shapes: B rows, A query heads, K key/value heads, G = A / K, L queries, S keys, D head width, k keys
kept.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from gateskip.errors import ConfigError, UnsupportedError
from gateskip.retrofit.attach import inner_model

__all__ = ["TOP_K_ATTENTION", "keys_kept", "set_top_k_attention", "top_k_attention"]

M = TypeVar("M", bound=nn.Module)
#: Name in transformers' registry.
TOP_K_ATTENTION = "gateskip_top_k"
K_NAME, BEFORE = "gateskip_top_k", "_gateskip_attention"
GATHERED = 1 << 24  # numbers of values that are gathered at once


def set_top_k_attention(model: M, k: int | None) -> M:
    """Let every attention of a model keep its k largest scores for each query, in place.

    Args:
        model: a Hugging Face causal LM with eager or sdpa attention, gated or not.
        k: keys kept; from the text's length on nothing changes. None: as it was before.

    Returns:
        The same object.

    Raises:
        ConfigError: k below 1. UnsupportedError: attention of another kind, or with sinks.
    """
    inner: Any = inner_model(model)
    config = inner.config
    if k is None:
        before = vars(config).pop(BEFORE, None)
        vars(config).pop(K_NAME, None)
        if before is not None:
            inner.set_attn_implementation(before)
        return model
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ConfigError(f"k={k!r} must be a whole number of at least 1, or None.")
    now = config._attn_implementation
    if now not in ("eager", "sdpa", TOP_K_ATTENTION):
        raise UnsupportedError(
            f"attn_implementation={now!r} does not show its scores; use 'sdpa' or 'eager' before."
        )
    if any(hasattr(module, "sinks") for module in inner.modules()):
        raise UnsupportedError(
            "this model's attention has sinks, which take part in the softmax without being keys; "
            "top-k attention is not defined for it."
        )
    if now != TOP_K_ATTENTION:
        vars(config)[BEFORE] = now
        inner.set_attn_implementation(TOP_K_ATTENTION)
    setattr(config, K_NAME, k)
    return model


def keys_kept(config: Any) -> int | None:
    """The k that a model's config says, or None."""
    if getattr(config, "_attn_implementation", None) != TOP_K_ATTENTION:
        return None
    found: int | None = getattr(config, K_NAME, None)
    return found


def top_k_attention(
    query_BALD: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    k: int,
    *,
    scaling: float,
    mask_B1LS: Tensor | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention over the k largest scores of every query.

    Args:
        mask_B1LS: True for keys that are seen, or addends; None: causal, queries last.

    Returns:
        (out ``[B, A, L, D]``, softmax mass of the kept keys ``[B, A, L]`` float32).
    """
    batch, heads, length, width = query_BALD.shape
    kv_heads, keys = key_BKSD.shape[1:3]
    group, kept = heads // kv_heads, min(k, keys)
    query = query_BALD.view(batch, kv_heads, group, length, width)
    out = torch.empty_like(query)
    mass = torch.empty(batch, kv_heads, group, length, device=query.device)
    step = max(1, GATHERED // (batch * heads * kept * width))
    rows_BK = torch.arange(batch * kv_heads, device=query.device)
    flat_value = value_BKSD.reshape(batch * kv_heads, keys, width)
    for at in range(0, length, step):
        part = slice(at, min(at + step, length))
        scores = query[:, :, :, part] @ key_BKSD[:, :, None].transpose(-1, -2) * scaling
        scores = scores.float()
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = _hidden(scores, mask_B1LS, part, length)
        top = scores.topk(kept, dim=-1)
        p = nn.functional.dropout(top.values.softmax(-1), dropout, dropout > 0.0)
        mass[:, :, :, part] = (top.values.logsumexp(-1) - scores.logsumexp(-1)).exp()
        places = top.indices.reshape(batch * kv_heads, -1)
        chosen = flat_value[rows_BK[:, None], places]
        chosen = chosen.view(batch * kv_heads, group, -1, kept, width)
        p = p.view(batch * kv_heads, group, -1, 1, kept).to(chosen.dtype)
        out[:, :, :, part] = (p @ chosen).view(batch, kv_heads, group, -1, width)
    return out.view(batch, heads, length, width), mass.view(batch, heads, length)


def _hidden(scores: Tensor, mask: Tensor | None, part: slice, length: int) -> Tensor:
    """Scores with unseen keys far below all others."""
    keys, least = scores.shape[-1], torch.finfo(torch.float32).min
    if mask is None:
        places = torch.arange(keys - length + part.start, keys - length + part.stop)
        seen = torch.arange(keys)[None] <= places[:, None]
        return scores.masked_fill(~seen.to(scores.device), least)
    rows = mask[:, :, None, part, :keys]
    if rows.dtype == torch.bool:
        return scores.masked_fill(~rows, least)
    return (scores + rows.float()).clamp(min=least)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The form that transformers' attention modules call."""
    k = getattr(module.config, K_NAME, None)
    if k is None:
        raise ConfigError(
            f"attn_implementation={TOP_K_ATTENTION!r} does not say how many keys; call "
            "gateskip.set_top_k_attention(model, k)."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, _ = top_k_attention(
        query,
        key,
        value,
        int(k),
        scaling=scale,
        mask_B1LS=attention_mask,
        softcap=softcap,
        dropout=dropout,
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(TOP_K_ATTENTION, _forward)
AttentionMaskInterface.register(TOP_K_ATTENTION, sdpa_mask)
