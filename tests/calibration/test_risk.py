"""Risk control keeps its guarantee, has power, and says what it needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import gateskip
from gateskip.calibration.answers import LAST_NUMBER, last_match, questions
from gateskip.calibration.p_values import STAKES, betting_p_value, smallest_sample
from gateskip.calibration.per_text import per_text
from gateskip.calibration.risk import fixed_sequence
from gateskip.config import Budget
from gateskip.data import encode
from gateskip.skipping.state import state_of
from models import gated, random_ids

DRAWS = 1_000


def beyond(share: float) -> float:
    """``share`` and three standard errors of 1,000 draws."""
    return share + 3.0 * (share * (1.0 - share) / DRAWS) ** 0.5


def test_exact_value_of_one_draw() -> None:
    wealth = np.mean(1.0 + STAKES * 0.5 / 2.0)
    assert betting_p_value([-0.5], upper=2.0) == pytest.approx(1.0 / wealth)
    assert betting_p_value([0.5], upper=2.0) == 1.0
    assert betting_p_value([], upper=1.0) == 1.0
    for bad in ([3.0], [float("nan")]):
        with pytest.raises(gateskip.ConfigError):
            betting_p_value(bad, upper=2.0)


@pytest.mark.parametrize("kind", ["binary", "skewed", "uniform", "rare"])
def test_p_values_are_valid_where_the_risk_is_at_its_limit(kind: str) -> None:
    random = np.random.default_rng(0)
    limit, n = 0.1, 200
    draws = {
        "binary": lambda: random.binomial(1, limit, n).astype(float),
        "skewed": lambda: np.minimum(random.exponential(1.0, n), 8.0) * limit / (1 - np.exp(-8.0)),
        "uniform": lambda: random.uniform(0, 2 * limit, n),
        "rare": lambda: 1.0 * (random.uniform(size=n) < limit / 1.0),
    }[kind]
    p = np.array([betting_p_value(draws() - limit, upper=1.0) for _ in range(DRAWS)])
    for alpha in (0.05, 0.2):
        assert (p <= alpha).mean() <= beyond(alpha)


def test_a_safe_risk_is_accepted() -> None:
    random = np.random.default_rng(1)
    p = [betting_p_value(random.binomial(1, 0.02, 200) - 0.1, upper=0.9) for _ in range(200)]
    assert np.mean(np.array(p) <= 0.05) > 0.9


@pytest.mark.parametrize("monotone", [True, False])
def test_the_family_of_budgets_keeps_the_guarantee(monotone: bool) -> None:
    """1,000 calibration sets: how often is a budget above the limit chosen?"""
    random = np.random.default_rng(2)
    limit, alpha, n = 0.1, 0.1, 150
    risks = [0.01, 0.03, 0.06, 0.1 + 1e-9, 0.13, 0.2]
    if not monotone:
        risks = [0.02, 0.1 + 1e-9, 0.05, 0.15, 0.01]
    budgets = [Budget(compute=0.9 - 0.1 * i) for i in range(len(risks))]
    wrong = chosen_any = 0
    for _ in range(DRAWS):

        def draws(budget: Budget) -> tuple[Any, float]:
            risk = risks[budgets.index(budget)]
            x = random.binomial(1, risk, n) - limit
            return x, float(x.mean() + limit)

        _, chosen = fixed_sequence(budgets, draws, 1.0 - limit, alpha)
        if not chosen.full:
            chosen_any += 1
            wrong += risks[budgets.index(chosen)] > limit
    assert wrong / DRAWS <= beyond(alpha)
    assert chosen_any / DRAWS > 0.8


def test_it_stops_at_the_first_budget_that_fails() -> None:
    tried = []

    def draws(budget: Budget) -> tuple[Any, float]:
        tried.append(budget.value)
        return np.full(100, -0.5 if budget.value > 0.7 else 0.5), 0.0

    rows, chosen = fixed_sequence(
        [Budget(compute=c) for c in (0.9, 0.8, 0.6, 0.5)], draws, 1.0, 0.05
    )
    assert tried == [0.9, 0.8, 0.6]
    assert chosen == Budget(compute=0.8)
    assert [row.accepted for row in rows] == [True, True, False]


def test_the_least_number_of_texts() -> None:
    for limit, upper, alpha in ((0.02, 0.5, 0.05), (0.1, 0.9, 0.01), (0.5, 0.5, 0.05)):
        n = smallest_sample(limit, upper, alpha)
        assert betting_p_value([-limit] * n, upper) <= alpha < 1.0
        if n > 1:
            assert betting_p_value([-limit] * (n - 1), upper) > alpha


@pytest.fixture(scope="module")
def calibrated() -> Any:
    model = gated(init_std=0.5)
    state_of(model).fitted = True
    gateskip.calibrate(model, [random_ids(1, 60, seed=n) for n in range(60)], grid=(0.9, 0.7, 0.5))
    return model


def test_per_text_is_the_loss_of_each_text(calibrated: Any) -> None:
    texts = [random_ids(1, 10 + 7 * n, seed=n) for n in (3, 0, 2, 1)]
    budget = Budget(compute=0.8)
    found = per_text(calibrated, encode(texts), budget)
    dense = per_text(calibrated, encode(texts), None)
    for n, ids in enumerate(texts):
        with torch.no_grad(), gateskip.budget(calibrated, compute=0.8):
            out = calibrated(ids, labels=ids)
        assert found.loss[n] == pytest.approx(float(out.loss), abs=1e-4)
        assert torch.equal(found.top[n].long(), out.logits[0, :-1].argmax(-1))
        assert found.tokens[n] == ids.shape[1] - 1
    assert found.agreement(found) == pytest.approx([1.0] * 4)
    assert dense.compute == 1.0
    assert found.compute == pytest.approx(0.8, abs=0.05)
    assert (found.agreement(dense) < 1.0).any()


def test_bounds_on_a_model(calibrated: Any) -> None:
    texts = [random_ids(1, 20, seed=500 + n) for n in range(150)]
    loose = gateskip.control_risk(calibrated, texts, max_loss_increase=0.3, confidence=0.9)
    assert loose.met
    assert state_of(calibrated).default_budget == loose.budget
    accepted = [row for row in loose.rows if row.accepted]
    assert str(loose.budget) == accepted[-1].budget
    assert all(row.p_value <= 0.1 + 1e-9 for row in accepted)
    strict = gateskip.control_risk(calibrated, texts, min_agreement=0.97, confidence=0.9)
    assert not strict.met
    assert strict.budget == Budget(compute=1.0)
    assert len(strict.rows) == 1
    own = gateskip.control_risk(
        calibrated, texts, max_loss_increase=0.3, budgets=[Budget(keep=0.95)], confidence=0.9
    )
    assert own.rows[0].budget == "keep=0.95"
    assert 0.9 < own.rows[0].compute < 1.05
    gateskip.set_budget(calibrated, keep=1.0)


def test_bad_input(calibrated: Any) -> None:
    texts = [random_ids(1, 20, seed=n) for n in range(20)]
    for bad in (
        {}, {"max_loss_increase": 0.02, "min_agreement": 0.9}, {"max_loss_increase": 2},
        {"min_agreement": 0.0}, {"max_loss_increase": 0.1, "confidence": 1.0},
    ):  # fmt: skip
        with pytest.raises(gateskip.ConfigError):
            gateskip.control_risk(calibrated, texts, **bad)
    with pytest.raises(gateskip.DataError, match=r"20 texts.*fewer than \d+"):
        gateskip.control_risk(calibrated, texts, min_agreement=0.95)
    with pytest.raises(gateskip.BudgetError, match="calibrate"):
        gateskip.control_risk(gated(), texts, min_agreement=0.5)
    with pytest.raises(gateskip.BudgetError, match="floor"):
        gateskip.control_risk(calibrated, texts, min_agreement=0.5, budgets=[Budget(keep=0.1)])
    with pytest.raises(gateskip.DataError, match="completion"):
        questions([{"text": "a"}], object(), LAST_NUMBER)
    with pytest.raises(gateskip.DataError, match="matches"):
        questions([{"prompt": "a", "completion": "none"}], object(), LAST_NUMBER)
    with pytest.raises(gateskip.ConfigError, match="regular expression"):
        questions([], object(), "(")


def test_answers_are_the_last_numbers() -> None:
    import re

    expression = re.compile(LAST_NUMBER)
    for text, answer in (
        ("3 + 4 = 7.", "7"), ("1,234 apples", "1234"), ("it is -2.50", "-2.50"), ("no", None),
    ):  # fmt: skip
        assert last_match(expression, text) == answer
