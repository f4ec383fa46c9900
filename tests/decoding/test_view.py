"""A model as its own assistant, and the search for the fastest draft."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gateskip
from gateskip.decoding import ExitLayer, draft_view
from gateskip.errors import BudgetError, ConfigError, DataError
from models import gated, random_ids, with_table


@pytest.fixture(scope="module")
def model() -> Any:
    built = with_table(gated("llama", compensation="low_rank"))
    built.generation_config.eos_token_id = None
    return built


@pytest.mark.parametrize("draft", [0.5, ExitLayer(2), "dense"])
def test_assisted_generation_is_plain_decoding(model: Any, draft: Any) -> None:
    ids = random_ids(1, 9)
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False,
    }  # fmt: skip
    view = draft_view(model, draft)
    with gateskip.budget(model, keep=0.75):
        wanted = model.generate(ids, **options)
        with gateskip.trace(model) as trace:
            found = model.generate(ids, assistant_model=view, **options)
    assert torch.equal(found, wanted)
    assert len(trace.calls) > 20, "the view's calls are in the model's trace"


def test_a_view_shares_everything_but_its_policy(model: Any) -> None:
    ids = random_ids(1, 9)
    view = draft_view(model, 0.5)
    assert type(view) is type(model)
    assert all(a is b for a, b in zip(view.parameters(), model.parameters(), strict=True))
    with gateskip.budget(model, keep=0.5), torch.no_grad():
        wanted = model(ids).logits
    with torch.no_grad():
        assert torch.equal(view(ids).logits, wanted)
        assert not torch.equal(model(ids).logits, wanted)
    view.generation_config.max_length = 77
    assert model.generation_config.max_length != 77


def test_view_needs_a_policy_of_the_model(model: Any) -> None:
    with pytest.raises(BudgetError, match="floor"):
        draft_view(model, 0.01)


def test_tuning_says_what_was_tried(model: Any) -> None:
    prompts = [random_ids(1, 9, seed=n) for n in range(2)]
    found = gateskip.tune_draft(
        model, prompts, draft_keep=[0.5], draft_tokens=[2, "auto"], new_tokens=8, repeats=2
    )
    assert [t.settings for t in found.tried] == [
        {},
        {"draft_keep": 0.5, "draft_tokens": 2},
        {"draft_keep": 0.5, "draft_tokens": "auto"},
        {"draft_policy": "lookup", "draft_tokens": 2},
        {"draft_policy": "lookup", "draft_tokens": "auto"},
    ]
    assert found.tried[0].speedup == 1.0
    assert all(t.same == 1.0 for t in found.tried)
    assert found.tried[1].macs > 1.0, "a draft costs more MACs than it saves"
    assert found.best is None or found.best.speedup > 1.0
    assert set(found.to_json()) == {"best", "tried"}


def test_tuning_needs_something_to_try(model: Any) -> None:
    with pytest.raises(ConfigError, match="nothing to try"):
        gateskip.tune_draft(model, [random_ids(1, 9)], draft_keep=[], draft_policies=())
    with pytest.raises(DataError):
        gateskip.tune_draft(model, [])


def test_the_prompts_pass_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from gateskip.decoding import DecodingStats, tuning

    model, now = with_table(gated("llama")), [0.0]
    model.generation_config.eos_token_id = None
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: now[0])

    def wait(_: Any, __: Any, given: Any) -> None:
        now[0] += 100.0 if given["input_ids"].shape[1] > 4 else 1.0

    model.register_forward_pre_hook(wait, with_kwargs=True)
    for settings in ({}, {"draft_policy": lambda ids, count: [], "draft_tokens": 1}):
        out, spent = tuning._decoded(model, random_ids(1, 9), settings, 5, DecodingStats())
        assert (out.shape[1], spent) == (5, 4.0)
