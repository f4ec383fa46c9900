"""Attention with its backward by blocks, against PyTorch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gateskip import kernels
from gateskip.execution import grid, trained_attention
from gateskip.execution.mask_rows import MaskRows
from gateskip.execution.trained_attention import attend_causally, takes_blocks
from gateskip.skipping.state import override, state_of
from models import gated, medians, padded, random_ids

pytestmark = pytest.mark.skipif(not kernels.available(), reason="numba is not installed")


def heads(length: int, count: int, seed: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(2, length, count, 16).to(dtype).transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("length", [1, 70, 300])  # less than a block, several, a ragged last one
def test_gradients(length: int, kv_heads: int, dtype: torch.dtype) -> None:
    keys = 310
    q = heads(length, 4, 0, dtype)
    k, v = heads(keys, kv_heads, 1, dtype), heads(keys, kv_heads, 2, dtype)
    last = torch.stack([torch.randperm(keys)[:length].sort().values for _ in range(2)])
    mask = (torch.arange(keys) <= last[..., None])[:, None]

    def run() -> Tensor:
        return scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)

    slope = heads(length, 4, 3, torch.float32).detach().to(dtype)
    expected = torch.autograd.grad(run(), (q, k, v), slope)
    out = attend_causally(q, k, v, last, 0.3, run)
    assert torch.equal(out, run())
    for found, wanted in zip(torch.autograd.grad(out, (q, k, v), slope), expected, strict=True):
        assert found.dtype == dtype
        error = (found.float() - wanted.float()).norm() / wanted.float().norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.015)


def test_a_nan_stays_one() -> None:
    q, k, v = (heads(5, 2, i, torch.bfloat16) for i in range(3))
    with torch.no_grad():
        k[0, 0, 3, 1] = float("nan")
    last = torch.arange(5).expand(2, -1)
    out = attend_causally(
        q, k, v, last, None, lambda: scaled_dot_product_attention(q, k, v, is_causal=True)
    )
    (dq,) = torch.autograd.grad(out.float().sum(), (q,))
    assert dq[0, 0, 4].isnan().any()
    assert not dq[1].isnan().any()


def test_only_for_graphs_in_bfloat16() -> None:
    q = torch.randn(1, 2, 3, 4).bfloat16().requires_grad_()
    assert takes_blocks(q, 0.0)
    assert not takes_blocks(q, 0.1)
    assert not takes_blocks(q.detach(), 0.0)
    assert not takes_blocks(q.float(), 0.0)
    with kernels.using("torch"):
        assert not takes_blocks(q, 0.0)


def gradients(model: Any, ids: Tensor, mask: Tensor | None, thresholds: Any) -> list[Tensor]:
    model.zero_grad()
    with override(state_of(model), thresholds=thresholds):
        hidden = model.model(ids, attention_mask=mask).last_hidden_state
    real = hidden.float() if mask is None else hidden.float()[mask.bool()]
    real.square().sum().backward()
    return [p.grad.float() for n, p in model.named_parameters() if "_proj.weight" in n]


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral_window"])
def test_training_a_model(
    family: str, skips: bool, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gated(family).bfloat16().train().requires_grad_(True)
    if side == "none":
        ids, mask = random_ids(3, 40), None
    else:
        ids, mask, _ = padded(3, 40, side)
    thresholds = medians(model, 0.3) if skips else None
    calls: list[int] = []

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return attend_causally(*args)

    for module in (grid, trained_attention):
        monkeypatch.setattr(module, "attend_causally", counted)
    found = gradients(model, ids, mask, thresholds)
    # Padding on the left and a window hide keys from real tokens.
    assert bool(calls) == (side != "left" and family != "mistral_window")
    with kernels.using("torch"):
        calls.clear()
        expected = gradients(model, ids, mask, thresholds)
        assert not calls
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_masks_that_hide_something_are_not_causality() -> None:
    size = 6
    causal = torch.tril(torch.ones(size, size, dtype=torch.bool))
    options: Any = {
        "new": size, "past": 0, "length": size, "offset": 0, "dtype": torch.float32,
        "device": torch.device("cpu"),
    }  # fmt: skip
    valid = torch.arange(size)[None] < 4

    def plain(mask: Tensor, valid_BT: Tensor | None = None) -> bool:
        return MaskRows(mask[None, None], valid_BT=valid_BT, **options).plain

    assert plain(causal)
    assert plain(causal & valid, valid)
    assert not plain(causal & valid), "every row counts where none is said to be padding"
    packed = causal.clone()
    packed[3:, :3] = False
    assert not plain(packed)
    prefix = causal.clone()
    prefix[0, 1] = True
    assert not plain(prefix)
    assert not MaskRows(causal.float()[None, None], **options).plain, "additive: not looked into"
