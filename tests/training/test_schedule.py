"""The budget of every step."""

from __future__ import annotations

import pytest

from gateskip.errors import ConfigError
from gateskip.training.config import GateSkipTrainingConfig
from gateskip.training.schedule import budget_at


def test_linear_falls_and_stays() -> None:
    config = GateSkipTrainingConfig(budget_start=1.0, budget_end=0.6, budget_steps=0.5)
    values = [budget_at(config, step, 20, 0).compute for step in range(20)]
    assert values[0] == 1.0
    assert values[5] == pytest.approx(0.8)
    assert values[10:] == [pytest.approx(0.6)] * 10
    assert values == sorted(values, reverse=True)


def test_sampled_covers_the_range_and_depends_on_step_and_seed_alone() -> None:
    config = GateSkipTrainingConfig(schedule="sampled", budget_end=0.5, budget_steps=0.1)
    values = [budget_at(config, step, 1000, 3).compute for step in range(1000)]
    assert values == [budget_at(config, step, 1000, 3).compute for step in range(1000)]
    assert values != [budget_at(config, step, 1000, 4).compute for step in range(1000)]
    late = values[100:]
    assert min(late) < 0.52
    assert max(late) > 0.98
    assert sum(late) / len(late) == pytest.approx(0.75, abs=0.02)


def test_keep_budgets() -> None:
    config = GateSkipTrainingConfig(budget_unit="keep", budget_end=0.5)
    assert budget_at(config, 100, 100, 0).keep == 0.5


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"backbone": "lorra"}, "Did you mean 'lora'"),
        ({"budget_end": 0.0}, "budget_end"),
        ({"budget_start": 0.5, "budget_end": 0.8}, "above"),
        ({"distill": 1.5}, "distill"),
        ({"penalty": 0.1}, "train_gates"),
        ({"penalty": float("nan"), "train_gates": True}, "penalty"),
        ({"lora_rank": 0}, "lora_rank"),
        ({"backbone": "frozen", "train_compensation": False}, "nothing else to train"),
        ({"backbone": "frozen", "arm": "control"}, "nothing else to train"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
    ],
)
def test_bad_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        GateSkipTrainingConfig(**options)  # type: ignore[arg-type]


def test_json_round_trip() -> None:
    config = GateSkipTrainingConfig(distill=0.3, train_gates=True, penalty=0.1)
    assert GateSkipTrainingConfig.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match="distil'"):
        GateSkipTrainingConfig.from_json({"distil": 0.3})
