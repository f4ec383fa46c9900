"""What every method must satisfy."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import gateskip
from gateskip import methods
from gateskip.errors import BudgetError, ConfigError, DataError, UnsupportedError
from gateskip.retrofit.attach import layers_of
from gateskip.skipping.state import override, state_of
from method_models import NAMES, STATIC, applied, every, known, low, trained
from models import FAMILIES, fed, padded, random_ids, tiny

PLAIN = (
    *STATIC,
    *(n for n in NAMES if n.endswith("_linear")),
    "random",
    "calm",
    "free",
    "mixture_of_depths",
    "router_tuning",
    "skipgpt",
)


@every
@torch.no_grad()
def test_keeping_everything_is_the_dense_model(name: str) -> None:
    ids, dense = random_ids(2, 20), tiny()
    if name in PLAIN:
        assert torch.equal(known(name)(ids).logits, dense(ids).logits)
    else:  # gates are fitted, and within a percent of 1
        torch.testing.assert_close(known(name)(ids).logits, dense(ids).logits, atol=0.1, rtol=0.1)


@every
@pytest.mark.parametrize("side", ["none", "left"])
@torch.no_grad()
def test_compacted_is_masked(name: str, side: str) -> None:
    model = known(name)
    ids, mask, _ = padded(3, 20, side)
    with gateskip.budget(model, compute=low(model)):
        found = model(ids, attention_mask=mask).logits[mask.bool()]
        with gateskip.execution(model, "masked"):
            expected = model(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@every
@torch.no_grad()
def test_decoding_decides_as_prefill(name: str) -> None:
    model, ids = known(name), random_ids(2, 20)
    with gateskip.budget(model, compute=low(model)):
        with gateskip.trace(model) as once:
            whole = model(ids).logits
        with gateskip.trace(model) as stepwise:
            found = fed(model, ids, DynamicCache(config=model.config))
    assert once.ledger.skip_rate > 0.1
    for key, masks in stepwise.keep.items():
        assert torch.equal(torch.cat(masks, 1), once.keep[key][0]), key
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)


@every
@torch.no_grad()
def test_causal_and_alone(name: str) -> None:
    assert methods.METHODS.get(name).causal
    model, ids = known(name), random_ids(3, 20)
    other = ids.clone()
    other[:, 12:] = random_ids(3, 8, seed=5)
    with gateskip.budget(model, compute=low(model)):
        logits = model(ids).logits
        torch.testing.assert_close(model(other).logits[:, :12], logits[:, :12])
        for row in range(3):
            alone = model(ids[row : row + 1]).logits
            torch.testing.assert_close(alone, logits[row : row + 1], atol=1e-4, rtol=1e-4)


@every
@torch.no_grad()
def test_the_ledger_is_what_hooks_count(name: str) -> None:
    model, ids = known(name), random_ids(3, 64)
    state = state_of(model)
    rows: dict[tuple[int, str], int] = {}
    handles = []
    for index, layer in enumerate(layers_of(model, state.family)):
        for kind, projection in (("attention", "self_attn.q_proj"), ("mlp", "mlp.down_proj")):

            def count(_: Any, inputs: Any, key: tuple[int, str] = (index, kind)) -> None:
                rows[key] = rows.get(key, 0) + inputs[0].shape[:-1].numel()

            handles.append(layer.get_submodule(projection).register_forward_pre_hook(count))
    with gateskip.budget(model, compute=low(model)), gateskip.trace(model) as trace:
        model(ids)
    for handle in handles:
        handle.remove()
    for key, keep in trace.keep.items():
        assert rows.get(key, 0) == int(keep[0].sum()), key
    assert trace.ledger.compute <= low(model) + 0.08


@every
@torch.no_grad()
def test_larger_budgets_keep_supersets(name: str) -> None:
    model, ids = known(name), random_ids(2, 20)
    state = state_of(model)
    assert state.policy is not None
    budgets = [b for b in (0.95, 0.9, 0.8, 0.7, 0.6, 0.5) if b >= state.policy.floor("compute")]
    resolved = [state.resolve(gateskip.Budget(compute=b)) for b in budgets]
    for larger, smaller in itertools.pairwise(resolved):
        assert larger is not None
        assert smaller is not None
        assert all(larger[key] <= smaller[key] for key in state.branches)
    with gateskip.budget(model, compute=budgets[-1]):
        assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 24)


def test_names_options_and_text_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"method='shortgtp'.*Did you mean 'shortgpt'"):
        applied("shortgtp")
    with pytest.raises(ConfigError, match="option of 'random'='sed'"):
        applied("random", sed=1)
    with pytest.raises(ConfigError, match="target='mpl'"):
        applied("llm_drop", target="mpl")
    with pytest.raises(DataError, match="at least 1000"):
        methods.apply("random", tiny(), [torch.arange(3, 40)])


@every
@torch.no_grad()
def test_results_name_the_method_and_it_is_saved(name: str, tmp_path: Path) -> None:
    from gateskip.evaluation.quality import evaluate

    model, ids = known(name), random_ids(2, 20)
    budget = gateskip.Budget(compute=low(model))
    tiny().save_pretrained(tmp_path / "base")
    gateskip.save(model, tmp_path / "saved")
    again = gateskip.load(tmp_path / "saved", tmp_path / "base")
    for found in (model, again):
        rows = evaluate(found, list(random_ids(4, 64)), budgets=[budget])
        assert [row.arm for row in rows] == ["dense", name]
        assert rows[1].macs_saved == pytest.approx(1.0 - low(model), abs=0.2)  # layers of 4
        with pytest.raises(ConfigError, match=f"skips by '{name}'"):
            evaluate(found, list(ids), arm="gateskip")
    with gateskip.budget(model, compute=budget.value):
        expected = model(ids).logits
    with gateskip.budget(again, compute=budget.value):
        assert torch.equal(again(ids).logits, expected)


@pytest.mark.parametrize("name", ["random", "llm_drop", "token_identity"])
def test_a_backbone_trains_with_a_method_in_place(name: str, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    model = applied(name)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in random_ids(8, 32)]
    trainer = gateskip.GateSkipTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True,
            report_to=[], learning_rate=1e-3, disable_tqdm=True, logging_steps=1,
        ),
        gateskip_args=gateskip.GateSkipTrainingConfig(
            backbone="full", budget_start=0.8, budget_end=0.8, schedule="constant"
        ),
        train_dataset=rows,
    )  # fmt: skip
    trainer.train()
    logged = [log for log in trainer.state.log_history if "skip_rate" in log]
    assert logged
    assert all(log["skip_rate"] > 0.05 for log in logged)
    changed = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert any("q_proj" in key for key in changed)


@torch.no_grad()
def test_a_rule_of_ones_own() -> None:
    from gateskip.skipping.rule import set_rule

    class Loud:
        name, causal = "loud", True

        def score(self, key: Any, h_BTH: Tensor, call: Any) -> Tensor:
            return h_BTH.float().norm(dim=-1)

        def tensors(self) -> dict[str, Tensor]:
            return {}

        @classmethod
        def of_tensors(cls, tensors: Any) -> Any:
            return cls()

    model, ids = tiny(), random_ids(2, 20)
    gateskip.attach(model, gateskip.GateConfig(kind="unit", compensation="none"))
    with pytest.raises(ConfigError, match="nothing to fit"):
        gateskip.fit(model, list(random_ids(20, 64)))
    set_rule(state_of(model), Loud())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # never fitted
        gateskip.calibrate(model, list(random_ids(20, 64)), allocation="uniform")
    with gateskip.budget(model, keep=0.6), gateskip.trace(model) as trace:
        found = model(ids, output_hidden_states=True)
    h = found.hidden_states[0].norm(dim=-1)[:, 1:]
    kept = trace.keep[0, "attention"][0][:, 1:]
    assert float(h[kept].min()) >= float(h[~kept].max())


def test_a_model_without_a_rule_says_so() -> None:
    model = gateskip.attach(tiny(), gateskip.GateConfig(importance="rule"))
    keeps = dict.fromkeys(state_of(model).branches, 0.0)
    with (
        override(state_of(model), thresholds=keeps),
        pytest.raises(UnsupportedError, match="the model has no rule"),
    ):
        model(random_ids(1, 8))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "llama"])
@pytest.mark.parametrize("name", ["random", "shortgpt"])
@torch.no_grad()
def test_families(name: str, family: str) -> None:
    ids, dense = random_ids(2, 20), tiny(family)
    expected = dense(ids).logits
    model = applied(name, model=dense)
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    with gateskip.budget(model, compute=low(model)):
        found = model(ids).logits
        with gateskip.execution(model, "masked"):
            torch.testing.assert_close(model(ids).logits, found, atol=1e-4, rtol=1e-4)
    gateskip.detach(model)
    assert torch.equal(model(ids).logits, expected)


def test_options_that_would_train_something_else_are_refused(tmp_path: Path) -> None:
    for name, options in (
        ("skipgpt", {"router_steps": 1.5}), ("skipgpt", {"start": -3.0}),
        ("skipgpt", {"temperature_start": 0.0}), ("skipgpt", {"noise": -1.0}),
        ("router_tuning", {"temperature": 0.0}), ("fixed_layers", {"layers": (1.5,)}),
        ("fixed_layers", {"layers": (True,)}), ("fixed_layers", {"layers": (1, 1)}),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(options))):
            applied(name, **options)
    with pytest.raises(ConfigError, match="needs exit_loss='shallow'"):
        gateskip.GateSkipTrainingConfig(exit_loss="weighed", exit_distill=1.0)
    free = gateskip.GateSkipTrainingConfig(exit_loss="shallow", exit_layers=4, budget_end=1.0)
    with pytest.raises(ConfigError, match="exit_layers=4 must be fewer"):
        trained(applied("free"), free, tmp_path, steps=1, rate=1e-3)
    model = applied("skipgpt")
    options = methods.METHODS.get("skipgpt")().training(model, 0.7)
    with pytest.raises(UnsupportedError, match=r"cost_weight=1\.0 gets no gradient"):
        trained(
            model, options, tmp_path, steps=1, rate=1e-3, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )  # fmt: skip
    state_of(model).policy = None
    with pytest.raises(ConfigError, match="thresholds='zero' weighs"):
        trained(model, options, tmp_path, steps=1, rate=1e-3)


def test_a_costs_target_is_what_the_budget_leaves() -> None:
    from gateskip.training.checks import cost_target_of

    model = applied("skipgpt")
    given: dict[str, Any] = {
        "train_gates": True, "decision_gradient": 1.0, "cost_weight": 1.0, "budget_end": 0.7,
    }  # fmt: skip
    absolute = gateskip.GateSkipTrainingConfig(**given, cost_kind="absolute")
    wanted = methods.METHODS.get("skipgpt")().share(model, 0.7)  # type: ignore[attr-defined]
    assert 0.1 < wanted < 0.7
    assert cost_target_of(absolute, state_of(model)) == wanted
    mine = dataclasses.replace(absolute, cost_target=0.4)
    assert cost_target_of(mine, state_of(model)) == 0.4
    keep = dataclasses.replace(absolute, budget_unit="keep")
    assert cost_target_of(keep, state_of(model)) == 0.7
    with pytest.raises(BudgetError, match="larger budget"):
        cost_target_of(dataclasses.replace(absolute, budget_end=0.01), state_of(model))
    bare = gateskip.attach(tiny(), gateskip.GateConfig())
    with pytest.raises(ConfigError, match="calibrate first"):
        cost_target_of(absolute, state_of(bare))
