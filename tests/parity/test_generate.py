"""``generate`` of a gated model: strategies, budgets per call, padding, threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import gateskip
from gateskip.skipping.policy import ThresholdTable
from gateskip.skipping.state import state_of
from models import LAYERS, VOCAB, gated, medians, random_ids

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False, "repetition_penalty": 1.3},
    "sampling": {"do_sample": True, "temperature": 1.2, "top_k": 40},
    "beams": {"num_beams": 3, "do_sample": False, "repetition_penalty": 1.3},
}


def with_policy(model: Any) -> Any:
    """Thresholds at quantiles of the scores; the first ``previous`` attention has no scores."""
    state = state_of(model)
    rows = [medians(model, quantile) for quantile in (0.0, 0.25, 0.5, 0.75)]
    state.policy = ThresholdTable(
        allocation="uniform",
        weigh_cost=False,
        keep=(1.0, 0.75, 0.5, 0.25),
        compute=(1.02, 0.8, 0.55, 0.3),
        tokens=1000,
        mean_keys=16.0,
        thresholds=tuple(tuple(row.get(b, -1e9) for b in state.branches) for row in rows),
    )
    return model


@pytest.fixture(scope="module", params=["project", "previous", "none"])
def model(request: pytest.FixtureRequest) -> Any:
    built = with_policy(gated("qwen2", kv_source=request.param, compensation="low_rank"))
    built.generation_config.eos_token_id = None  # tiny models would end at random
    return built


def continued(model: Any, ids: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """New tokens only, 10 of them."""
    torch.manual_seed(3)
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(ids, attention_mask=mask, max_new_tokens=10, **kwargs)
    return out[:, ids.shape[1] :]


GREEDY = STRATEGIES["greedy"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_compacted_is_masked(model: Any, strategy: str, batch: int) -> None:
    ids, options = random_ids(batch, 9), STRATEGIES[strategy]
    with gateskip.budget(model, keep=0.5):
        with gateskip.trace(model) as fast_trace:
            fast = continued(model, ids, **options)
        with gateskip.trace(model) as slow_trace, gateskip.execution(model, "masked"):
            slow = continued(model, ids, **options)
    assert fast.shape == (batch, 10)
    assert torch.equal(fast, slow)
    assert 0.2 < fast_trace.ledger.skip_rate < 0.8
    assert fast_trace.ledger.pairs_kept == slow_trace.ledger.pairs_kept
    assert fast_trace.ledger.macs_spent < slow_trace.ledger.macs_spent


def test_generating_is_feeding_the_same_tokens(model: Any) -> None:
    ids = random_ids(1, 9)
    with gateskip.budget(model, keep=0.5), torch.no_grad():
        new = continued(model, ids, **GREEDY)
        plain = torch.cat([ids, new], 1)
        logits = model(plain).logits[0]
        for step in range(new.shape[1]):
            seen = plain[0, : 9 + step]
            row = logits[8 + step].clone()
            scored = row[seen]
            row[seen] = torch.where(scored > 0, scored / 1.3, scored * 1.3)
            assert int(row.argmax()) == int(new[0, step])


def test_budget_of_a_call(model: Any) -> None:
    ids = random_ids(1, 12)
    rates = []
    for budget in (None, {"keep": 0.75}, gateskip.Budget(keep=0.3), {"compute": 0.5}):
        with gateskip.trace(model) as trace:
            continued(model, ids, gateskip_budget=budget, **GREEDY)
        rates.append(trace.ledger.skip_rate)
    assert rates[0] == 0.0
    assert 0.05 < rates[1] < rates[2]
    assert rates[3] > rates[1]
    with gateskip.trace(model) as trace:
        model(ids)
    assert trace.ledger.skip_rate == 0.0, "the budget of a call ends with it"


def test_budget_of_a_call_goes_before_the_context_and_the_default(model: Any) -> None:
    ids = random_ids(1, 12)

    def rate(budget: Any = None) -> float:
        with gateskip.trace(model) as trace:
            continued(model, ids, gateskip_budget=budget, **GREEDY)
        return trace.ledger.skip_rate

    half, most = rate({"keep": 0.5}), rate({"keep": 0.9})
    assert half != most
    with gateskip.budget(model, keep=0.9):
        assert rate() == most
        assert rate({"keep": 0.5}) == half
        assert rate({"keep": 1.0}) == 0.0
    gateskip.set_budget(model, keep=0.5)
    try:
        assert rate() == half
        with gateskip.budget(model, keep=0.9):
            assert rate() == most
    finally:
        gateskip.set_budget(model, keep=1.0)
    assert rate() == 0.0


@pytest.mark.parametrize("execution", ["compacted", "masked"])
def test_left_padded_batch_is_its_rows(model: Any, execution: str) -> None:
    ids, mask = random_ids(3, 11), torch.ones(3, 11, dtype=torch.long)
    for row, lacking in enumerate((0, 3, 6)):
        ids[row, :lacking] = 0
        mask[row, :lacking] = 0
    with gateskip.budget(model, keep=0.5), gateskip.execution(model, execution):
        together = continued(model, ids, mask, **GREEDY)
        for row in range(3):
            alone = continued(model, ids[row][mask[row].bool()][None], **GREEDY)
            assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize(
    "budget",
    [{"keep": 0.0}, {"keep": 1.5}, {"keep": "half"}, {"keep": 0.1}, {"compute": 0.01}, {"kept": 1},
     {}, {"keep": 0.5, "compute": 0.5}, 0.5, True],
)  # fmt: skip
def test_bad_budgets_fail_before_any_forward(model: Any, budget: Any) -> None:
    calls: list[int] = []
    handle = model.model.embed_tokens.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(gateskip.BudgetError):
            model.generate(random_ids(1, 4), max_new_tokens=2, gateskip_budget=budget)
    finally:
        handle.remove()
    assert not calls


def test_budget_without_calibration() -> None:
    plain = gated()
    with pytest.raises(gateskip.BudgetError, match="calibrate"):
        plain.generate(random_ids(1, 4), max_new_tokens=2, gateskip_budget={"keep": 0.5})
    with pytest.raises(gateskip.BudgetError, match="calibrate"):
        gateskip.set_budget(plain, keep=0.5)


def test_budgets_do_not_leak_into_other_threads(model: Any) -> None:
    ids, budgets = random_ids(1, 12), {"large": 0.9, "small": 0.35, "none": None}

    def work(budget: float | None, gate: threading.Barrier | None) -> tuple[Tensor, float]:
        def body() -> tuple[Tensor, float]:
            with gateskip.trace(model) as trace:
                if gate is not None:
                    gate.wait(60)
                new = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, **GREEDY
                )
            return new, trace.ledger.skip_rate

        if budget is None:
            return body()
        with gateskip.budget(model, keep=budget):
            return body()

    expected = {name: work(budget, None) for name, budget in budgets.items()}
    assert len({rate for _, rate in expected.values()}) == 3
    found: dict[str, tuple[Tensor, float]] = {}
    barrier = threading.Barrier(len(budgets))

    def run(name: str) -> None:
        found[name] = work(budgets[name], barrier)

    # The main thread holds a budget of its own, which the others must not see.
    with gateskip.budget(model, keep=0.5):
        threads = [threading.Thread(target=run, args=(name,)) for name in budgets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert found.keys() == expected.keys()
    for name, (tokens, rate) in expected.items():
        assert torch.equal(found[name][0], tokens), name
        assert found[name][1] == rate, name


def test_a_passed_cache_is_continued(model: Any) -> None:
    ids = random_ids(1, 9)
    with gateskip.budget(model, keep=0.5), torch.no_grad():
        whole = continued(model, ids, **GREEDY)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=10,
            return_dict_in_generate=True, **GREEDY,
        )  # fmt: skip
    assert torch.equal(out.sequences[:, 9:], whole)
    cache = getattr(out, "cache", None)
    if cache is None:
        cache = out.past_key_values
    assert {cache.get_seq_length(layer) for layer in range(LAYERS)} == {18}
    assert int(whole.max()) < VOCAB


def test_continuous_batching_is_refused_before_work() -> None:
    model = gated()
    with pytest.raises(gateskip.errors.UnsupportedError, match="padded batches"):
        model.generate_batch([[1, 2, 3], [4, 5]])
    gateskip.detach(model)
    assert "init_continuous_batching" not in vars(model)
