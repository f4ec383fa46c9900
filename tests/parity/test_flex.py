"""Flex attention: the same as sdpa, padded or not, whole, in chunks and token by token."""

from __future__ import annotations

import pytest
import torch

import gateskip
from gateskip.skipping.state import override, state_of
from models import gated, medians, padded, through_cache

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gpt_neox"])
@pytest.mark.parametrize("source", ["project", "previous"])
@pytest.mark.usefixtures("uncompiled")
@torch.no_grad()
def test_flex_is_sdpa(family: str, source: str) -> None:
    models = [
        gated(family, attention, kv_source=source, compensation="low_rank")
        for attention in ("sdpa", "flex_attention")
    ]
    thresholds = medians(models[0])
    for side in ("none", "left", "right"):
        ids, mask, positions = padded(2, 12, side)
        found, kept = [], []
        for model in models:
            with override(state_of(model), thresholds=thresholds), gateskip.trace(model) as trace:
                runs = [model(ids, attention_mask=mask, position_ids=positions).logits]
                if side != "right":
                    runs += [through_cache(model, ids, mask, positions, n) for n in (1, 3)]
            found.append([run[mask.bool()] for run in runs])
            kept.append({key: torch.cat(masks, 1) for key, masks in trace.keep.items()})
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(other, one, atol=2e-5, rtol=1e-4)
        assert all(torch.equal(kept[1][key], keep) for key, keep in kept[0].items())
