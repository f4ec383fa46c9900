"""Random skipping, the null that a policy has to beat."""

from __future__ import annotations

import pytest
import torch

import gateskip
from gateskip.execution.api import trace
from gateskip.skipping.score import random_score
from gateskip.skipping.state import override, state_of
from models import padded, through_cache, tiny


def test_scores_are_uniform_and_branches_disagree() -> None:
    place = torch.arange(1, 20_001)
    scores = [random_score(place, (layer, k), 0) for layer in (0, 1) for k in ("attention", "mlp")]
    scores.append(random_score(place, (0, "attention"), 1))
    for s in scores:
        assert 0 <= float(s.min())
        assert float(s.max()) < 1
        assert float(s.mean()) == pytest.approx(0.5, abs=0.01)
        for q in (0.1, 0.5, 0.9):
            assert float((s < q).float().mean()) == pytest.approx(q, abs=0.02)
    together = torch.corrcoef(torch.stack(scores)) - torch.eye(len(scores))
    assert float(together.abs().max()) < 0.05


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_the_same_decisions_in_prefill_and_decoding_and_under_padding(side: str) -> None:
    config = gateskip.GateConfig(importance="random", compensation="none")
    model = gateskip.attach(tiny(), config)
    ids, mask, positions = padded(3, 12, side)
    thresholds = dict.fromkeys(state_of(model).branches, 0.4)
    alone = {}
    with torch.no_grad(), override(state_of(model), thresholds=thresholds):
        with trace(model) as whole:
            model(ids, attention_mask=mask, position_ids=positions)
        if side != "right":
            with trace(model) as steps:
                through_cache(model, ids, mask, positions, 1)
            for key, parts in steps.keep.items():
                assert torch.equal(torch.cat(parts, 1), whole.keep[key][0]), key
        row = mask[2].bool()
        with trace(model) as single:
            model(ids[2:, row])
        alone = {k: p[0][0] for k, p in single.keep.items()}
    assert whole.ledger.skip_rate == pytest.approx(0.37, abs=0.12)
    for key, keep in alone.items():
        assert torch.equal(whole.keep[key][0][2, row], keep), key
