"""Closed-form gates and compensation, and calibration, on tiny models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gateskip
from gateskip import kernels
from gateskip.data import Batch
from gateskip.fitting import regression
from gateskip.fitting.closed_loop import keep_all, measure
from gateskip.fitting.observers import CompensationMoments, DenseOutputs, ScoreMoments
from gateskip.fitting.passes import run_pass
from gateskip.fitting.regression import Moments
from gateskip.gates import GATES
from gateskip.retrofit.attach import gated_branches
from gateskip.skipping.state import state_of
from models import gated, medians, random_ids, tiny

TEXT = [random_ids(1, 40, seed=s) for s in range(60)]


def test_ridge_is_least_squares() -> None:
    torch.manual_seed(0)
    x, noise = torch.randn(500, 6), torch.randn(500, 3)
    y = x @ torch.randn(6, 3) + 2.0 + 0.1 * noise
    moments = Moments(6, 3)
    for part in range(0, 500, 100):
        moments.add(x[part : part + 100], y[part : part + 100])
    weights, intercept = moments.solve(1e-12)
    ones = torch.cat([x, torch.ones(500, 1)], 1).double()
    exact = torch.linalg.lstsq(ones, y.double()).solution
    torch.testing.assert_close(torch.cat([weights, intercept[None]]), exact, atol=1e-4, rtol=1e-4)
    predicted = ones @ torch.cat([weights, intercept[None]])
    centred = y.double() - y.double().mean(0)
    r2 = 1 - ((y - predicted) ** 2).sum() / centred.square().sum()
    assert moments.r2(weights, intercept) == pytest.approx(float(r2), abs=1e-5)


def test_low_rank_is_the_best_of_its_rank() -> None:
    torch.manual_seed(0)
    x = torch.randn(800, 8) @ torch.randn(8, 8)
    y = x @ torch.randn(8, 5) + torch.randn(800, 5)
    moments = Moments(8, 5)
    moments.add(x, y)
    down, up, bias = moments.solve_low_rank(1e-12, 2)
    error = (y - (x.double() @ down.T @ up.T + bias)).square().sum()
    xc, yc = (x - x.mean(0)).double(), (y - y.mean(0)).double()
    fitted = xc @ torch.linalg.lstsq(xc, yc).solution
    s = torch.linalg.svd(fitted).S
    best = (yc - fitted).square().sum() + s[2:].square().sum()
    assert float(error) == pytest.approx(float(best), rel=1e-4)
    full = moments.solve_low_rank(1e-12, 5)
    weights, _ = moments.solve(1e-12)
    torch.testing.assert_close(full[0].T @ full[1].T, weights, atol=1e-6, rtol=1e-4)


def test_leading_triples_of_a_large_matrix() -> None:
    torch.manual_seed(0)
    decay = torch.diag(0.9 ** torch.arange(150).double())
    a = torch.randn(200, 150, dtype=torch.float64) @ decay
    u, s, v = torch.linalg.svd(a, full_matrices=False)
    left, singular, right = regression._leading(a, 5)
    assert 4 * (2 * 5 + 16) <= 150, "large enough for the iteration"
    torch.testing.assert_close(singular, s[:5])
    torch.testing.assert_close(left * singular @ right, u[:, :5] * s[:5] @ v[:5])


def test_whitening_without_enough_tokens() -> None:
    gram = torch.diag(torch.tensor([1.0, 0.5, -1e-3])).double()  # rounding left the last below 0
    white = regression._whitening(gram, torch.tensor(1e-6).double())
    assert bool(white.isfinite().all())


@pytest.mark.parametrize("kind", ["low_rank", "scalar", "vector"])
def test_fitted_scores_predict_the_contribution(kind: str) -> None:
    assert kind in GATES.names()
    model = gateskip.attach(tiny(), gateskip.GateConfig(kind=kind, rank=4, compensation="none"))
    with pytest.warns(UserWarning, match="fit"):
        gateskip.calibrate(model, TEXT, grid=(0.8,))
    report = gateskip.fit(model, TEXT)
    assert report.tokens == 2400
    assert len(report.r2) == 8
    assert min(report.r2.values()) > 0.05

    seen: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}

    class Check(ScoreMoments):
        def branch(self, key, h, u, o, keep, call):  # type: ignore[no-untyped-def]
            ratio = (o.norm(dim=-1) / h.norm(dim=-1)).log()
            seen[key] = (ratio[:, 1:].flatten(), u[:, 1:].flatten(0, 1))

    ids = torch.cat(TEXT)
    batch = Batch(ids, torch.ones_like(ids), torch.ones_like(ids).bool())
    run_pass(model, [batch], observer=Check({}, ungated=True))
    for key, module in gated_branches(model, state_of(model).family).items():
        ratio, u = seen[key]
        gate = module.skip_gate
        z = gate.logits(u).mean(-1).detach()
        score = (z - gate.score_shift) / gate.score_scale
        correlation = np.corrcoef(ratio.numpy(), score.detach().numpy())[0, 1]
        assert correlation**2 == pytest.approx(report.r2[key], abs=1e-3)
        values = gate(u).detach()
        assert float((values - 0.9933).abs().max()) < 0.01


@pytest.mark.parametrize("kind", ["mean", "low_rank"])
def test_compensation_lowers_the_error_of_skipping(kind: str) -> None:
    ids = torch.cat(TEXT[:12])
    errors = {}
    for compensation in ("none", kind):
        model = tiny("qwen2")
        for layer in model.model.layers:  # outputs with a mean, which a constant can stand for
            torch.nn.init.constant_(layer.self_attn.v_proj.bias, 1.0)
        gateskip.attach(
            model,
            gateskip.GateConfig(
                compensation=compensation,  # type: ignore[arg-type]
                rank=4,
                compensation_rank=16,
                branches=("attention",),
            ),
        )
        gateskip.fit(model, TEXT)
        gateskip.calibrate(model, TEXT, weigh_cost=False)
        with torch.no_grad():
            full = model(ids).logits
            with gateskip.budget(model, keep=0.7):
                errors[compensation] = float((model(ids).logits - full).square().mean())
    assert errors[kind] < 0.8 * errors["none"]


@torch.no_grad()
def test_compensation_is_fitted_to_dense_outputs_on_skipped_tokens() -> None:
    model = gated(compensation="none")
    ids = torch.cat(TEXT[:3])
    batch = Batch(ids, torch.ones_like(ids), torch.ones_like(ids).bool())
    dense, moments = DenseOutputs(), CompensationMoments()
    run_pass(model, [batch], observer=dense)
    hidden = tiny().model(ids).last_hidden_state
    last = model.model.norm(sum(dense.outputs.values()) + model.model.embed_tokens(ids))
    torch.testing.assert_close(last, hidden, atol=1e-4, rtol=1e-4)  # gates left out
    moments.dense = dense.outputs
    thresholds = medians(model)
    with gateskip.trace(model) as trace:
        run_pass(model, [batch], thresholds=thresholds, observer=moments)
    for key, masks in trace.keep.items():
        skipped = ~masks[0]
        skipped[:, 0] = False
        found = moments.moments[key]
        assert found.count == int(skipped.sum())
        expected = dense.outputs[key][skipped].mean(0)
        torch.testing.assert_close(found.mean_target().float(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_calibration_realises_what_it_says(allocation: str) -> None:
    model = gateskip.attach(tiny(), gateskip.GateConfig(rank=4, compensation_rank=8))
    gateskip.fit(model, TEXT[:40])
    table = gateskip.calibrate(model, TEXT, allocation=allocation)
    assert table.tokens == 2400
    rows = list(zip(*table.thresholds, strict=True))
    assert all(list(column) == sorted(column) for column in rows), "I7"
    fresh = torch.cat([random_ids(1, 40, seed=900 + s) for s in range(40)])
    for name, asked in (("keep", 0.9), ("keep", 0.7), ("compute", 0.8)):
        with torch.no_grad(), gateskip.budget(model, **{name: asked}), gateskip.trace(model) as t:
            for row in fresh:  # one by one: ragged rows of a batch are a cost of the batch
                model(row[None])
        found = 1 - t.ledger.skip_rate if name == "keep" else t.ledger.compute
        assert found == pytest.approx(asked, abs=0.03)
    if allocation == "uniform":
        with torch.no_grad(), gateskip.budget(model, keep=0.7), gateskip.trace(model) as trace:
            model(torch.cat(TEXT))
        for masks in trace.keep.values():
            assert masks[0].float().mean() == pytest.approx(0.7, abs=0.05)


@torch.no_grad()
def test_a_fitted_model_decodes_on_the_kernels() -> None:
    if not kernels.available():
        pytest.skip("numba is not installed")
    model = gateskip.attach(tiny(), gateskip.GateConfig(rank=4, compensation_rank=8))
    gateskip.fit(model, TEXT[:40])
    gateskip.calibrate(model, TEXT, grid=(0.8, 0.6))
    with gateskip.budget(model, keep=0.7):
        cache = model(TEXT[0][:, :8], use_cache=True).cache
        model(TEXT[0][:, 8:9], cache=cache, use_cache=True)
    assert all("_gateskip_plans" in vars(layer) for layer in model.model.layers)


def test_too_little_text_says_how_much_is_needed() -> None:
    model = gated()
    for function in (gateskip.fit, gateskip.calibrate):
        with pytest.raises(gateskip.DataError, match="1000"):
            function(model, TEXT[:3])
        with pytest.raises(gateskip.DataError):
            function(model, [])
        with pytest.raises(gateskip.DataError, match="tokenizer"):
            function(model, ["some text"])


@torch.no_grad()
def test_fitting_costs_at_most_one_percent_of_loss() -> None:
    model, ids = tiny(), torch.cat(TEXT)
    dense = model(ids, labels=ids).loss
    gateskip.fit(gateskip.attach(model, gateskip.GateConfig(rank=4)), TEXT)
    assert model(ids, labels=ids).loss == pytest.approx(float(dense), rel=0.01)


def test_measure_counts_no_padding() -> None:
    model = gated()
    ids, mask = random_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, 12:] = 0
    seen = measure(model, [Batch(ids, mask, mask.bool())], keep_all(state_of(model)))
    assert seen.pairs == 32 * 8
    assert all(scores.count == 30 for scores in seen.scores.values())  # first tokens left out
