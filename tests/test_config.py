"""Options are checked when built, and survive JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from gateskip.config import Budget, GateConfig, RowBudgets, one_of
from gateskip.errors import BudgetError, ConfigError, GateSkipError


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kind": "vector", "branches": ("mlp",), "importance": "mean_gate"},
        {"kv_source": "previous", "compensation": "none", "init_std": 0.0, "seed": 7},
    ],
)
def test_gate_config_round_trip(options: dict[str, Any]) -> None:
    config = GateConfig(**options)
    assert GateConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"importance": "mean_logits"}, ("mean_logits", "Did you mean 'mean_logit'")),
        ({"kv_source": "projekt"}, ("projekt", "'project'")),
        ({"compensation": "lowrank"}, ("lowrank", "Did you mean 'low_rank'")),
        ({"branches": ("attn",)}, ("attn", "attention")),
        ({"branches": ()}, ("branches",)),
        ({"rank": 0}, ("rank=0",)),
        ({"rank": 2.5}, ("rank=2.5",)),
        ({"rank": True}, ("rank=True",)),
        ({"compensation_rank": -1}, ("compensation_rank=-1",)),
        ({"init_std": -0.1}, ("init_std",)),
        ({"init_std": float("nan")}, ("init_std",)),
        ({"init_bias": float("inf")}, ("init_bias",)),
    ],
)
def test_bad_options(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        GateConfig(**options)
    assert all(word in str(caught.value) for word in words)
    assert isinstance(caught.value, GateSkipError)
    assert isinstance(caught.value, ValueError)


def test_branches_are_in_execution_order() -> None:
    assert GateConfig(branches=("mlp", "attention")).branches == ("attention", "mlp")


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GateConfig().rank = 3  # type: ignore[misc]


def test_from_json_names_an_unknown_key() -> None:
    with pytest.raises(ConfigError, match="init_sdt"):
        GateConfig.from_json({"init_sdt": 0.1})


@pytest.mark.parametrize(
    "options",
    [
        {}, {"keep": 0.5, "compute": 0.5}, {"keep": 0}, {"keep": -0.5}, {"keep": 1.01},
        {"keep": float("nan")}, {"keep": "0.5"}, {"keep": True}, {"compute": 0.0},
        {"compute": float("inf")},
    ],
)  # fmt: skip
def test_bad_budgets(options: dict[str, Any]) -> None:
    with pytest.raises(BudgetError):
        Budget(**options)


def test_budgets() -> None:
    assert Budget(keep=1).full
    assert Budget(compute=1.0).full
    assert not Budget(keep=0.99).full
    assert isinstance(Budget(keep=1).keep, float)
    assert str(Budget(keep=0.75)) == "keep=0.75"
    assert str(Budget(compute=0.5)) == "compute=0.5"
    assert Budget(keep=0.5) == Budget.of({"keep": 0.5})
    assert hash(Budget(keep=0.5)) == hash(Budget(keep=0.5))


@pytest.mark.parametrize("budget", [Budget(keep=0.5), Budget(compute=0.25), Budget(keep=1.0)])
def test_budget_round_trip(budget: Budget) -> None:
    assert Budget.of(json.loads(json.dumps(budget.to_json()))) == budget
    assert Budget.of(budget) is budget


def test_budget_of_other_things() -> None:
    assert Budget.of(None) is None
    for bad in (0.5, "keep", {"kept": 0.5}, ["keep"], {}):
        with pytest.raises(BudgetError):
            Budget.of(bad)  # type: ignore[arg-type]


def test_one_of() -> None:
    one_of("colour", "red", ("red", "green"))
    with pytest.raises(ConfigError, match=r"colour='rad'.*Did you mean 'red'"):
        one_of("colour", "rad", ("red", "green"))


@pytest.mark.parametrize("number", [torch.tensor(0.5), torch.tensor(0.5).numpy(), [0.5]])
def test_budgets_of_other_types(number: Any) -> None:
    half = Budget(keep=0.5)
    expected = RowBudgets((half,)) if isinstance(number, list) else half
    assert Budget.of({"keep": number}) == expected
