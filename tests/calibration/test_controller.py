"""The controller holds a budget under drift, and keeps decisions causal, alike and per row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gateskip
from gateskip import kernels
from gateskip.config import Budget
from gateskip.skipping.state import override, state_of
from models import gated, padded, random_ids, through_cache

TEXT = [random_ids(1, 60, seed=n) for n in range(120)]
GAIN = 0.1


@pytest.fixture(scope="module")
def model() -> Any:
    found = gated(compensation="low_rank", init_std=0.5)
    state_of(found).fitted = True
    gateskip.calibrate(found, TEXT, grid=(0.9, 0.75, 0.6, 0.45))
    gateskip.set_budget(found, keep=0.7)
    return found


def drifted(batch: int, length: int) -> torch.Tensor:
    """Text of another kind: only tokens that score high everywhere."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.tensor([77, 97, 100, 113, 117, 126])
    return tokens[torch.randint(len(tokens), (batch, length), generator=generator)]


def kept(model: Any, ids: torch.Tensor, hold: bool) -> float:
    with torch.no_grad(), gateskip.trace(model) as trace:
        if hold:
            with gateskip.hold_budget(model, gain=GAIN):
                model(ids)
        else:
            model(ids)
    return 1.0 - trace.ledger.skip_rate


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_it_converges_where_the_thresholds_drift(model: Any, backend: str) -> None:
    if backend == "numba" and not kernels.available():
        pytest.skip("numba is not installed")
    ids = drifted(2, 250)
    with kernels.using(backend):
        loose, short, long = kept(model, ids, False), kept(model, ids[:, :60], True), None
        long = kept(model, ids, True)
    assert abs(loose - 0.7) > 0.05
    assert abs(long - 0.7) < 0.015
    assert abs(long - 0.7) < abs(short - 0.7) < abs(loose - 0.7)
    with torch.no_grad(), gateskip.trace(model) as trace, gateskip.hold_budget(model, gain=GAIN):
        model(ids)
    expected = state_of(model).expected(Budget(keep=0.7))
    for key, masks in trace.keep.items():
        assert float(masks[0].float().mean()) == pytest.approx(expected[key], abs=0.06)


@torch.no_grad()
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("mode", ["compacted", "masked"])
def test_cached_is_uncached(model: Any, side: str, mode: str) -> None:
    """I3: offsets follow the tokens, in whatever calls they come."""
    ids, mask, positions = padded(2, 40, side)
    runs = []
    for steps in (None, 1, 3):
        with (
            gateskip.hold_budget(model, gain=GAIN),
            gateskip.execution(model, mode),
            gateskip.trace(model) as trace,
        ):
            if steps is None:
                logits = model(ids, attention_mask=mask, position_ids=positions).logits
            else:
                logits = through_cache(model, ids, mask, positions, steps)
        keep = {key: torch.cat(parts, 1) for key, parts in trace.keep.items()}
        runs.append((logits, keep))
    for logits, keep in runs[1:]:
        real = mask.bool()
        torch.testing.assert_close(logits[real], runs[0][0][real], atol=1e-4, rtol=1e-4)
        for key, found in keep.items():
            assert torch.equal(found, runs[0][1][key]), key


@torch.no_grad()
def test_causal_and_independent_of_batch_mates(model: Any) -> None:
    """I4 and I5."""
    ids = drifted(3, 30)
    other = ids.clone()
    other[:, 20:] = random_ids(3, 10)
    with gateskip.hold_budget(model, gain=GAIN):
        whole, changed = model(ids).logits, model(other).logits
        alone = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(whole[:, :20], changed[:, :20], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(whole, alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_generate_and_a_cropped_cache(model: Any) -> None:
    ids = drifted(2, 12)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with gateskip.hold_budget(model, gain=GAIN):
        held = model.generate(ids, **options)
        again = model.generate(ids, **options)
        whole = model(held).logits
    assert torch.equal(held, again), "each request begins anew"
    assert torch.equal(whole[:, 11:-1].argmax(-1), held[:, 12:])
    with gateskip.hold_budget(model, gain=GAIN):
        cache = model(held[:, :20], use_cache=True).cache
        model(random_ids(2, 5), cache=cache, use_cache=True)
        cache.crop(-5)
        after = model(held[:, 20:24], cache=cache, use_cache=True).logits
    torch.testing.assert_close(after, whole[:, 20:24], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_budgets_by_row_are_held_apart(model: Any) -> None:
    ids = drifted(2, 240)
    with gateskip.hold_budget(model, gain=GAIN), gateskip.trace(model) as trace:
        with gateskip.budget(model, keep=[0.6, 0.85]):
            model(ids)
    masks = torch.stack([parts[0] for parts in trace.keep.values()]).float()
    for row, asked in enumerate((0.6, 0.85)):
        assert float(masks[:, row].mean()) == pytest.approx(asked, abs=0.03)


@torch.no_grad()
def test_what_it_cannot_hold_is_refused(model: Any) -> None:
    ids = random_ids(2, 10)
    for bad in (0.0, -1.0, 2.0, "much"):
        with pytest.raises(gateskip.ConfigError, match="gain"):
            with gateskip.hold_budget(model, gain=bad):
                pass
    outside = model(ids, use_cache=True).cache
    with gateskip.hold_budget(model):
        with pytest.raises(gateskip.UnsupportedError, match="begin the request"):
            model(ids[:, :1], cache=outside, use_cache=True)
        model(ids[:, :4], use_cache=True)  # another request, whose cache nobody took
        with pytest.raises(gateskip.UnsupportedError, match="begin the request"):
            model(ids[:, :1], cache=outside, use_cache=True)
        with pytest.raises(gateskip.UnsupportedError, match="num_beams=1"):
            model.generate(ids, num_beams=2, max_new_tokens=2)
        with pytest.raises(gateskip.UnsupportedError, match="held to a budget"):
            gateskip.compile_masked(model)(ids)
    with gateskip.hold_budget(model), override(state_of(model), budget=Budget(keep=1.0)):
        assert torch.isfinite(model(ids).logits).all()


@torch.no_grad()
def test_off_by_default_and_where_nothing_drifts_it_changes_little(model: Any) -> None:
    ids = torch.cat(TEXT[:8], 1)[:, :250]
    assert abs(kept(model, ids, True) - 0.7) < 0.02
    before = model(ids).logits
    with gateskip.hold_budget(model):
        model(ids)
    assert torch.equal(model(ids).logits, before)
