"""What every method must satisfy, and what each one promises by itself."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

import gateskip
from gateskip import methods
from gateskip.errors import BudgetError, ConfigError, DataError, UnsupportedError
from gateskip.execution.api import dense as without_gates
from gateskip.methods.gate_norm import coupling
from gateskip.retrofit.attach import gated_branches, layers_of
from gateskip.skipping.compensation import compensation_of
from gateskip.skipping.policy import OFF
from gateskip.skipping.rule import rule_of
from gateskip.skipping.state import override, state_of
from models import FAMILIES, fed, padded, random_ids, tiny

NAMES = methods.METHODS.names()
STATIC = ("every_second", "fixed_layers", "gate_norm", "layerskip", "llm_drop", "shortgpt")
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
every = pytest.mark.parametrize("name", NAMES)


def applied(name: str, family: str = "llama", model: Any = None, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        model = tiny(family) if model is None else model
        return methods.apply(name, model, list(random_ids(20, 64)), **options)


@functools.cache
def known(name: str) -> Any:
    """One model of each method, which tests leave as it is."""
    return applied(name)


def low(model: Any) -> float:
    """A budget that skips about a third."""
    table = state_of(model).policy
    assert table is not None
    return max(0.65, table.floor("compute"))


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


# -- random -------------------------------------------------------------------------------------


@torch.no_grad()
def test_random_seeds_differ_and_know_nothing_of_tokens() -> None:
    ids, masks = random_ids(2, 40), []
    for model in (known("random"), known("random"), applied("random", seed=1)):
        with gateskip.budget(model, keep=0.6), gateskip.trace(model) as trace:
            model(ids if masks else random_ids(2, 40, seed=7))
        masks.append(torch.cat([keep[0].flatten() for keep in trace.keep.values()]))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


# -- tables -------------------------------------------------------------------------------------


def scores(model: Any, ids: Tensor) -> dict[Any, Tensor]:
    class Seen(dict[Any, Tensor]):
        def add(self, key: Any, score_BT: Tensor, call: Any) -> None:
            self[key] = score_BT

    seen = Seen()
    keeps = dict.fromkeys(state_of(model).branches, float("-inf"))
    with torch.no_grad(), override(state_of(model), scores=seen, thresholds=keeps):
        model(ids)
    return seen


def test_token_identity_knows_the_token_alone() -> None:
    model, ids = known("token_identity"), random_ids(1, 30)
    ids[0, 20] = ids[0, 10]
    rule: Any = rule_of(state_of(model))
    for key, found in scores(model, ids).items():
        assert float((found[0, 10] - found[0, 20]).abs()) <= rule.step
        expected = rule.tables[key][ids[0]]
        torch.testing.assert_close(found[0], expected, atol=rule.step, rtol=0)
        assert expected.std() > 10 * rule.step
    with pytest.raises(UnsupportedError, match="needs input_ids"), gateskip.budget(model, keep=0.8):
        model(inputs_embeds=model.get_input_embeddings()(ids))


def test_position_knows_the_place_alone() -> None:
    model = known("position")
    a, b = (scores(model, random_ids(1, 30, seed=s)) for s in (1, 2))
    assert all(torch.equal(a[key], b[key]) for key in a)
    ids, mask, positions = padded(2, 20, "left")
    with gateskip.budget(model, keep=0.7), gateskip.trace(model) as trace, torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions)
    pads = int((mask[1] == 0).sum()) or int((mask[0] == 0).sum())
    assert pads
    for keep in trace.keep.values():
        rows = [row[real.bool()] for row, real in zip(keep[0], mask, strict=True)]
        least = min(map(len, rows))
        assert torch.equal(rows[0][:least], rows[1][:least])


def test_a_model_without_a_rule_says_so() -> None:
    model = gateskip.attach(tiny(), gateskip.GateConfig(importance="rule"))
    keeps = dict.fromkeys(state_of(model).branches, 0.0)
    with (
        override(state_of(model), thresholds=keeps),
        pytest.raises(UnsupportedError, match="the model has no rule"),
    ):
        model(random_ids(1, 8))


# -- static -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATIC)
def test_static_budgets_are_nested_and_never_exceeded(name: str) -> None:
    state = state_of(known(name))
    assert state.policy is not None
    last: set[Any] = set()
    for budget in (0.97, 0.9, 0.85, 0.8):
        thresholds = state.resolve(gateskip.Budget(compute=budget))
        assert thresholds is not None
        off = {key for key, value in thresholds.items() if value >= OFF}
        assert last <= off
        assert off
        assert all(value >= OFF or value == float("-inf") for value in thresholds.values())
        last = off
        with (
            torch.no_grad(),
            gateskip.budget(known(name), compute=budget),
            gateskip.trace(known(name)) as trace,
        ):
            known(name)(random_ids(4, 64))
        assert trace.ledger.compute <= budget + 1e-6
    with pytest.raises(BudgetError, match="below the floor"):
        state.resolve(gateskip.Budget(compute=0.05))


@pytest.mark.parametrize("name", STATIC)
@torch.no_grad()
def test_masked_is_physically_removed(name: str, tmp_path: Path) -> None:
    model, ids = known(name), random_ids(2, 20)
    budget = gateskip.Budget(compute=low(model))
    with gateskip.budget(model, compute=budget.value):
        expected = model(ids).logits
    report = gateskip.export_static(model, tmp_path / "plain", budget=budget)
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    torch.testing.assert_close(plain(ids).logits, expected, atol=1e-5, rtol=1e-4)
    if name in ("shortgpt", "every_second", "fixed_layers", "layerskip"):
        assert report.layers == len(layers_of(plain, state_of(model).family)) < 4
    out = plain.generate(ids, max_new_tokens=4, do_sample=False)
    with gateskip.budget(model, compute=budget.value):
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), out)


def silent(model: Any, layer: int, kinds: tuple[str, ...]) -> Any:
    """The model with branches that add nothing."""
    parts = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}
    for kind in kinds:
        nn.init.zeros_(model.model.layers[layer].get_submodule(parts[kind]).weight)
    return model


def first_off(model: Any) -> set[Any]:
    table = state_of(model).policy
    assert table is not None
    pairs = zip(state_of(model).branches, table.thresholds[1], strict=True)
    return {key for key, value in pairs if value >= OFF}


def test_what_adds_nothing_goes_first() -> None:
    both = ("attention", "mlp")
    layer = applied("shortgpt", model=silent(tiny(), 2, both))
    assert first_off(layer) == {(2, "attention"), (2, "mlp")}
    for kind in both:
        branch = applied("llm_drop", model=silent(tiny(), 1, (kind,)))
        assert first_off(branch) == {(1, kind)}
    only = applied("llm_drop", target="mlp", model=silent(tiny(), 1, ("attention",)))
    assert {kind for _, kind in first_off(only)} == {"mlp"}


@torch.no_grad()
def test_block_influence_is_one_minus_the_cosine() -> None:
    from gateskip.data import encode
    from gateskip.methods.influence import Influence

    for family in ("llama", "gpt_neox"):  # sequential and parallel
        model, ids = tiny(family), random_ids(3, 24)
        # The last of the hidden states has passed the final norm.
        hidden = model(ids, output_hidden_states=True).hidden_states[:-1]
        gateskip.attach(model)
        found = Influence.of(model, encode(list(ids), None, 64)).layers
        for index, (before, after) in enumerate(itertools.pairwise(hidden)):
            cosine = nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
            assert found[index] == pytest.approx(float(1 - cosine.mean()), rel=1e-4)


@torch.no_grad()
def test_gate_norm_is_the_norm_of_the_product_and_invariant_to_scale() -> None:
    q, k = torch.randn(4 * 8, 24), torch.randn(2 * 8, 24)
    heads = zip(q.view(4, 8, 24), k.view(2, 8, 24).repeat_interleave(2, 0), strict=True)
    expected = torch.stack([torch.linalg.matrix_norm(a.T @ b) for a, b in heads]).mean()
    assert coupling(q, k, 4, 2) == pytest.approx(float(expected), rel=1e-5)
    assert coupling(q * 3.0, k / 3.0, 4, 2) == pytest.approx(float(expected), rel=1e-5)
    uncoupled = tiny()
    nn.init.zeros_(uncoupled.model.layers[3].self_attn.q_proj.weight)
    assert first_off(applied("gate_norm", model=uncoupled)) == {(3, "attention")}
    with pytest.raises(UnsupportedError, match="q_proj and k_proj"):
        applied("gate_norm", model=(other := tiny("gpt2")))
    with pytest.raises(gateskip.AttachError, match="has no gates"):  # as it was given
        state_of(other)


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


# -- Mixture-of-Depths ----------------------------------------------------------------------------


def routed(**options: Any) -> Any:
    return applied("mixture_of_depths", every=1, **options)


@torch.no_grad()
def test_top_k_keeps_exactly_k_of_every_sequence() -> None:
    from gateskip.skipping.quantile import SequenceTopK

    model, (ids, mask, _) = routed(), padded(3, 20, "left")
    thresholds = dict.fromkeys(state_of(model).branches, SequenceTopK(0.3))
    with override(state_of(model), thresholds=thresholds), gateskip.trace(model) as trace:
        found = model(ids, attention_mask=mask).logits
        with gateskip.execution(model, "masked"):
            masked = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], masked[mask.bool()], atol=1e-4, rtol=1e-4)
    for keep in trace.keep.values():
        for row, real in zip(keep[0], mask.bool(), strict=True):
            assert int(row.sum()) == -(-int(real.sum()) * 3 // 10)
            assert not row[~real].any()
    lonely = torch.zeros_like(mask)  # the last row has its first token alone
    lonely[:2], lonely[2, -1] = 1, 1
    with override(state_of(model), thresholds=thresholds), gateskip.trace(model) as trace:
        model(ids, attention_mask=lonely)
    assert all(int(keep[0][2].sum()) == 1 for keep in trace.keep.values())
    # It is not causal: later tokens take places.
    other = ids.clone()
    other[:, 12:] = random_ids(3, 8, seed=5)
    with override(state_of(model), thresholds=thresholds):
        again = model(other, attention_mask=mask).logits
    assert not torch.allclose(again[:, :12], found[:, :12], atol=1e-3)


@torch.no_grad()
def test_a_layer_is_weighed_as_a_whole() -> None:
    model, dense, ids = routed(), tiny(), random_ids(2, 12)
    assert torch.equal(model(ids).logits, dense(ids).logits)
    for index, layer in enumerate(layers_of(model, state_of(model).family)):
        gate = layer.self_attn.skip_gate
        gate.slope.fill_(0.0)
        gate.offset.fill_(0.0 if index == 1 else 1.0)
    del dense.model.layers[1]
    for index, layer in enumerate(dense.model.layers):
        layer.self_attn.layer_idx = index
    dense.config.num_hidden_layers = 3
    expected = dense(ids, use_cache=False).logits
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected)


def test_routers_train_and_learn_to_predict(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    model = routed(auxiliary=0.5)
    options = methods.METHODS.get("mixture_of_depths")(every=1, auxiliary=0.5).training(model, 0.7)
    assert options.budget_end == pytest.approx(0.7, abs=0.05)
    rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in random_ids(64, 32)]
    trainer = gateskip.GateSkipTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=16, per_device_train_batch_size=4, use_cpu=True,
            report_to=[], learning_rate=3e-2, disable_tqdm=True, logging_steps=4,
        ),
        gateskip_args=dataclasses.replace(options, backbone="frozen"),
        train_dataset=rows,
    )  # fmt: skip
    trainer.train()
    logged = [log for log in trainer.state.log_history if "top_k_prediction" in log]
    assert logged[-1]["top_k_prediction"] < logged[0]["top_k_prediction"] - 0.02
    assert logged[-1]["skip_rate"] == pytest.approx(1 - options.budget_end, abs=0.03)
    for layer in layers_of(model, state_of(model).family):
        assert float(layer.self_attn.skip_gate.slope.detach()) != 0.0


def test_routers_cannot_save_more_than_their_layers() -> None:
    method = methods.METHODS.get("mixture_of_depths")(every=2)
    with pytest.raises(BudgetError, match=r"save \d+% at most; gate more"):
        method.training(applied("mixture_of_depths"), 0.4)
    with pytest.raises(ConfigError, match="form='retrofti'"):
        applied("mixture_of_depths", form="retrofti")
    with pytest.raises(ConfigError, match="placement='layer'"):
        gateskip.GateConfig(kind="router")
    with pytest.raises(ConfigError, match="'router', 'bottleneck'"):
        gateskip.GateConfig(kind="scalar", placement="layer", decision="layer", compensation="none")
    with pytest.raises(ConfigError, match="kind='router' has nothing to fit"):
        gateskip.fit(applied("mixture_of_depths"), list(random_ids(20, 64)))
    scratch = applied("mixture_of_depths", form="scratch")
    assert not any("slope" in name for name, _ in scratch.named_parameters())


# -- exits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["softmax", "state", "probe"])
@torch.no_grad()
def test_exits_from_none_to_all(measure: str) -> None:
    model, ids = applied("calm", measure=measure, decay=0.0), random_ids(2, 16)
    state, dense = state_of(model), tiny()
    keys = state.branches

    def at(confidence: float) -> tuple[Tensor, Any]:
        with (
            override(state, thresholds=dict.fromkeys(keys, -confidence / 0.9)),
            gateskip.trace(model) as trace,
        ):
            return model(ids).logits, trace

    found, trace = at(1.001)  # nobody is that sure
    torch.testing.assert_close(found, dense(ids).logits, atol=1e-5, rtol=1e-5)
    assert trace.ledger.skip_rate == 0.0
    assert trace.ledger.compute > 1.0  # who was asked costs
    found, trace = at(-1.1)  # everybody leaves after the first layer, the first token apart
    short = tiny()
    del short.model.layers[1:]
    expected = short(ids, use_cache=False).logits
    torch.testing.assert_close(found[:, 1:], expected[:, 1:], atol=1e-4, rtol=1e-4)
    assert trace.ledger.skip_rate == pytest.approx(15 / 16 * 3 / 4)


@torch.no_grad()
def test_thresholds_of_exits_fall_with_the_place() -> None:
    ids, (decay, horizon) = random_ids(1, 64), (8.0, 16)
    model = applied("calm", decay=decay, horizon=horizon)
    state, dense = state_of(model), tiny()
    h = dense(ids, output_hidden_states=True).hidden_states[1]
    top = dense.lm_head(dense.model.norm(h)).softmax(-1)[0].topk(2).values
    sure = top[:, 0] - top[:, 1]
    level = float(sure.median())
    place = torch.arange(1, 65)

    def leaves(fall: float) -> Tensor:
        found = sure >= 0.9 * level + 0.1 * (-fall * place / horizon).exp()
        found[0] = False  # the first token is protected
        return found

    with (
        override(state, thresholds=dict.fromkeys(state.branches, -level)),
        gateskip.trace(model) as trace,
    ):
        model(ids)
    assert torch.equal(~trace.keep[1, "attention"][0][0], leaves(decay))
    assert not torch.equal(leaves(decay), leaves(0.0))
    assert not torch.equal(leaves(decay), leaves(-decay))


def test_exits_under_a_bound_on_the_loss() -> None:
    model = applied("calm")
    texts = [random_ids(1, 20, seed=500 + n) for n in range(120)]
    report = gateskip.control_risk(model, texts, max_loss_increase=0.5, confidence=0.9)
    assert report.met
    assert report.budget.value < 1.0
    assert state_of(model).default_budget == report.budget
    strict = gateskip.control_risk(model, texts, min_agreement=0.95, confidence=0.9)
    assert not strict.met


def asked(model: Any, ids: Tensor) -> tuple[int, Any]:
    """(rows that reached the LM head of an exit rule, the trace) of a call at a budget."""
    rows, rule = [0], cast(Any, rule_of(state_of(model)))
    handle = rule.head.register_forward_pre_hook(
        lambda _, args: rows.__setitem__(0, rows[0] + args[0].shape[0])
    )
    with gateskip.budget(model, compute=0.8), gateskip.trace(model) as trace:
        model(ids)
    handle.remove()
    return rows[0], trace


@torch.no_grad()
def test_calls_of_the_head_are_counted() -> None:
    rows, trace = asked(applied("calm"), random_ids(2, 16))
    record = trace.calls[0]
    assert rows == sum(int(tokens.sum()) for tokens, _ in record.asked.values())
    # Asked is who was there before.
    for layer in range(1, 4):
        there = trace.keep[layer - 1, "attention"][0] if layer > 1 else torch.ones(2, 16).bool()
        assert torch.equal(record.asked[layer, "attention"][0], there.sum(1))
    # Who has left does not come back.
    for layer in range(1, 4):
        before, now = (trace.keep[i, "attention"][0] for i in (layer - 1, layer))
        assert not (now & ~before).any()


@torch.no_grad()
def test_free_leaves_after_the_shallow_model_or_not_at_all() -> None:
    model, ids = applied("free", layers=2), random_ids(2, 16)
    state = state_of(model)
    rows, trace = asked(model, ids)
    assert rows == 32  # everybody is asked once
    masks = [trace.keep[layer, "attention"][0] for layer in range(4)]
    assert all(mask.all() for mask in masks[:2])
    assert torch.equal(masks[2], masks[3])
    assert 0 < int(masks[2].sum()) < 32
    # At a threshold that everybody passes it is the shallow model, the first token apart.
    with override(state, thresholds=dict.fromkeys(state.branches, 1.1)):
        found = model(ids).logits
    short = tiny()
    del short.model.layers[2:]
    expected = short(ids, use_cache=False).logits
    torch.testing.assert_close(found[:, 1:], expected[:, 1:], atol=1e-4, rtol=1e-4)
    for layers in (0, 4):
        with pytest.raises(ConfigError, match=f"layers={layers}"):
            applied("free", layers=layers)


def test_free_draws_shallow_states_to_deep_ones(tmp_path: Path) -> None:
    from gateskip.training.exit_loss import exit_weights, layer_distance

    assert exit_weights("shallow", 4, 7, 2) == pytest.approx([0, 2 / 6, 0, 4 / 6])
    states = [torch.full((3, 5), float(value), requires_grad=True) for value in (1, 2, 4, 8)]
    distance = layer_distance(states, 2)  # layers 0 and 1 to 1 and 3
    assert float(distance.detach()) == pytest.approx(((1 - 2) ** 2 + (2 - 8) ** 2) / 2)
    distance.backward()
    assert states[3].grad is None
    assert states[1].grad is not None
    model = applied("free", layers=2)
    options = methods.METHODS.get("free")(layers=2, distill=5.0).training(model, 0.75)
    options = dataclasses.replace(options, backbone="full")
    model, logged = trained(model, options, tmp_path, steps=16, rate=5e-3)
    distances = [log["exit_distillation"] for log in logged if "exit_distillation" in log]
    assert distances[-1] < 0.9 * distances[0]


# -- routers --------------------------------------------------------------------------------------


def trained(
    model: Any, options: Any, folder: Path, steps: int, rate: float, rows: Any = None, **given: Any
) -> tuple[Any, Any]:
    """(model after some steps, what was logged at each)."""
    from transformers import TrainingArguments

    if rows is None:
        rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in random_ids(64, 32)]
    trainer = gateskip.GateSkipTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, use_cpu=True,
            report_to=[], learning_rate=rate, disable_tqdm=True, logging_steps=1, **given,
        ),
        gateskip_args=options,
        train_dataset=rows,
    )  # fmt: skip
    trainer.train()
    return trainer.finish(), trainer.state.log_history


@pytest.mark.parametrize("name", ["router_tuning", "skipgpt"])
def test_routers_come_down_to_their_target(name: str, tmp_path: Path) -> None:
    # Noise lets a token go at any score.
    drawn = {"start": 2.0, "noise": 1.0, "temperature_start": 5.0} if name == "skipgpt" else {}
    model = applied(name, **drawn)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    compute = 0.9 if name == "router_tuning" else 0.7
    method = methods.METHODS.get(name)(cost=20.0, **drawn)
    options = method.stages(model, compute)[0][1]
    found, logged = trained(model, options, tmp_path, steps=30, rate=2e-2)
    # The share of what routers may save that a budget is: all branches are of one size here.
    target = options.cost_target
    costs = [log["expected_cost"] for log in logged if "expected_cost" in log]
    assert costs[0] > target
    if name == "skipgpt":
        assert costs[-1] == pytest.approx(target, abs=0.08)
    else:  # nothing draws it back from below
        assert 0.2 < costs[-1] < target + 0.05
    assert logged[-2]["skip_rate"] > 0.05
    changed = {k for k, p in found.named_parameters() if not torch.equal(p, before[k])}
    assert changed
    assert all("score_" in key for key in changed)  # the model is frozen
    with pytest.raises(BudgetError, match="below what routers"):
        methods.METHODS.get(name)().training(applied(name), 0.05)


@torch.no_grad()
def test_flexidepth_skips_into_an_adapter() -> None:
    model, ids = applied("flexidepth"), random_ids(2, 16)
    layer = layers_of(model, state_of(model).family)[1]
    layer.self_attn.skip_gate.bias.fill_(-0.7)  # G is about a third, and differs by token
    layer.self_attn.skip_gate.up.mul_(30.0)
    with (
        override(state_of(model), thresholds=dict.fromkeys(state_of(model).branches, -0.7)),
        gateskip.trace(model) as trace,
    ):
        hidden = model(ids, output_hidden_states=True).hidden_states
    kept = trace.keep[1, "attention"][0]
    assert torch.equal(kept, trace.keep[1, "mlp"][0])
    assert 0 < int((~kept).sum()) < kept.numel() - 2
    h = hidden[1]
    u = layer.input_layernorm(h)
    g = layer.self_attn.skip_gate(u)
    assert float(g.std()) > 0.01
    inner = h + compensation_of(layer.self_attn)(u)
    out = inner + compensation_of(layer.mlp)(layer.post_attention_layernorm(inner))
    expected = h + (1 - g) * (out - h)
    torch.testing.assert_close(hidden[2][~kept], expected[~kept], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(hidden[2][kept], expected[kept], atol=1e-2)


def test_flexidepth_draws_routers_down(tmp_path: Path) -> None:
    model = applied("flexidepth")
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    options = methods.METHODS.get("flexidepth")(penalty=5.0).training(model, 0.75)
    found, logged = trained(model, options, tmp_path, steps=40, rate=5e-2)
    rates = [log["skip_rate"] for log in logged if "skip_rate" in log]
    assert rates[0] == 0.0
    assert rates[-1] > 0.2
    changed = {k for k, p in found.named_parameters() if not torch.equal(p, before[k])}
    assert any("skip_gate" in key for key in changed)
    assert any("skip_compensation" in key for key in changed)
    assert all("skip_" in key for key in changed)  # the model is frozen
    with pytest.raises(ConfigError, match="kind='bottleneck' has nothing to fit"):
        gateskip.fit(found, list(random_ids(20, 64)))


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


def test_exits_that_were_saved_before_they_could_end() -> None:
    from gateskip.methods.exits import ExitRule

    tensors = dict(ExitRule("state", decay=1.0, horizon=9, first=2, last=3).tensors())
    again = ExitRule.of_tensors(tensors)
    assert (again.measure, again.horizon, again.first, again.last) == ("state", 9, 2, 3)
    tensors["settings"] = tensors["settings"][:4]
    assert ExitRule.of_tensors(tensors).last is None


def test_rows_without_labels_have_no_distance(tmp_path: Path) -> None:
    model = applied("free", layers=2)
    options = methods.METHODS.get("free")(layers=2).training(model, 0.75)
    rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in random_ids(8, 32)]
    for row in rows[:4]:
        row["labels"] = [-100] * 32
    _, logged = trained(
        model, options, tmp_path, steps=1, rate=0.0, rows=rows, gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    whole = applied("free", layers=2)
    _, expected = trained(
        whole, options, tmp_path / "whole", steps=1, rate=0.0, rows=rows[4:],
        train_sampling_strategy="sequential",
    )  # fmt: skip
    for name in ("exit_distillation", "exit_loss"):
        assert logged[0][name] == pytest.approx(expected[0][name], rel=1e-4), name


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


def test_deeper_layers_are_dropped_more_often() -> None:
    from gateskip.skipping.quantile import RowDropout
    from gateskip.training.thresholds import OwnThresholds

    model = applied("layerskip")
    options = methods.METHODS.get("layerskip")(layer_dropout=0.4).training(model, 0.75)
    found = OwnThresholds(model, options).now({})["thresholds"]
    rates = [found[layer, "attention"].rate for layer in range(4)]
    assert rates == pytest.approx([0.4 * (2 ** (layer / 3) - 1) for layer in range(4)])
    assert all(found[layer, "mlp"].rate == rate for layer, rate in enumerate(rates))
    assert OwnThresholds(model, options).now(None) == {}, "not while evaluating"
    torch.manual_seed(0)
    free = torch.ones(20_000, 1, dtype=torch.bool)
    gone = RowDropout(0.3).threshold(torch.zeros(20_000, 1), free, free) >= OFF
    assert float(gone.float().mean()) == pytest.approx(0.3, abs=0.01)


def test_trained_at_random_is_stochastic_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gateskip.training.objective import SkipMeter

    kept: list[Tensor] = []
    plain = SkipMeter.record
    monkeypatch.setattr(
        SkipMeter, "record",
        lambda self, call: (kept.append(call.keep[2, "mlp"]), plain(self, call))[1],
    )  # fmt: skip
    model = applied("random")
    state = state_of(model)
    rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in random_ids(4, 32)]
    options = gateskip.GateSkipTrainingConfig(
        backbone="full", budget_start=0.7, budget_end=0.7, schedule="constant",
        train_compensation=False,
    )  # fmt: skip
    found, _ = trained(model, options, tmp_path, steps=3, rate=1e-4, rows=rows)
    assert len(kept) == 3
    for one, other in itertools.combinations(kept, 2):
        assert not torch.equal(one, other), "every step draws anew"
    assert all(torch.equal(each[0], each[1]) for each in kept), "by place alone"
    ids = random_ids(2, 32)
    with torch.no_grad(), gateskip.budget(found, compute=0.7):
        with gateskip.trace(found) as first:
            found(ids)
        with gateskip.trace(found) as again:
            found(ids)
    assert torch.equal(first.keep[2, "mlp"][0], again.keep[2, "mlp"][0])
    assert state.config.seed == 0


def test_skipgpt_adapts_the_model_afterwards() -> None:
    model = applied("skipgpt")
    method = methods.METHODS.get("skipgpt")(noise=1.0, temperature_start=5.0)
    (first, routers), (second, adapts) = method.stages(model, 0.7)
    assert (first + second, routers.backbone, adapts.backbone) == (1.0, "frozen", "lora")
    assert not adapts.train_gates
    assert adapts.budget_end == 0.7
    assert (routers.decision_noise, adapts.decision_noise) == (1.0, 0.0)
    assert (routers.decision_gradient_start, routers.decision_gradient) == (5.0, 1.0)


def test_losses_of_all_layers(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    from gateskip.training.exit_loss import exit_weights

    assert exit_weights("weighed", 3, 0) == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert exit_weights("rotating", 4, 5) == pytest.approx([0.0, 0.2 / 3.8, 0.0, 3.6 / 3.8])
    turns = [exit_weights("rotating", 9, step) for step in range(4)]
    assert all(sum(turn) == pytest.approx(1.0) and turn[-1] > 0.0 for turn in turns)
    assert {i for turn in turns for i, weight in enumerate(turn) if weight} == set(range(1, 9))
    rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in random_ids(8, 32)]
    ids = torch.tensor([row["input_ids"] for row in rows])
    for name, kind in (("calm", "weighed"), ("layerskip", "rotating")):
        model = applied(name)
        options = methods.METHODS.get(name)().training(model, 0.75)
        assert options.exit_loss == kind

        def trainer(steps: int, dropout: float, model: Any = model, options: Any = options) -> Any:
            return gateskip.GateSkipTrainer(
                model=model,
                args=TrainingArguments(
                    output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=8,
                    use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1,
                ),
                gateskip_args=dataclasses.replace(
                    options, backbone="full", layer_dropout=dropout
                ),
                train_dataset=rows,
            )  # fmt: skip

        made = trainer(1, 0.0)
        model.train()
        found = made.compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
        model.eval()
        with torch.no_grad(), without_gates(model):
            hidden = list(model(ids, output_hidden_states=True).hidden_states[1:])
            hidden[:-1] = [model.model.norm(h) for h in hidden[:-1]]
            losses = [
                nn.functional.cross_entropy(
                    model.lm_head(h)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
                )
                for h in hidden
            ]
        weights = exit_weights(kind, 4, 0)
        expected = sum(w * float(loss) for w, loss in zip(weights, losses, strict=True))
        assert float(found.detach()) == pytest.approx(expected, rel=1e-4), name
        found.backward()
        assert model.model.layers[1].mlp.down_proj.weight.grad is not None
        if name == "layerskip":
            dropped = trainer(8, 0.5)
            dropped.train()
            skipped = [log["skip_rate"] for log in dropped.state.log_history if "skip_rate" in log]
            assert max(skipped) > 0.0


@torch.no_grad()
def test_exits_have_one_threshold() -> None:
    model = applied("calm")
    with pytest.raises(ConfigError, match="exits have one threshold"):
        gateskip.calibrate(model, list(random_ids(20, 64)), allocation="uniform")
    # What is promised between grid points holds on the text itself.
    texts, table = list(random_ids(20, 64)), state_of(model).policy
    assert table is not None
    for keep in (0.93, 0.87, 0.8, 0.73):
        if keep < table.floor("keep"):
            continue
        with gateskip.budget(model, keep=keep), gateskip.trace(model) as trace:
            model(torch.stack(texts))
        assert 1.0 - trace.ledger.skip_rate == pytest.approx(keep, abs=0.02)


def test_layerskip_keeps_the_first_layers() -> None:
    assert first_off(applied("layerskip")) == {(3, "attention"), (3, "mlp")}
    with pytest.raises(ConfigError, match="layer_dropout"):
        gateskip.GateSkipTrainingConfig(layer_dropout=0.1, budget_end=0.8)
    with pytest.raises(ConfigError, match="measure='sofmax'"):
        applied("calm", measure="sofmax")


@pytest.mark.parametrize("name", ["shortgpt", "llm_drop", "gate_norm"])
@torch.no_grad()
def test_linear_maps_bring_back_some_of_what_is_removed(name: str) -> None:
    ids, budget = random_ids(8, 64, seed=9), 0.9 if name == "gate_norm" else 0.85
    model, expected = applied(f"{name}_linear", rank=16, compute=budget), tiny()(ids).logits

    def error() -> float:
        with gateskip.budget(model, compute=budget), gateskip.trace(model) as trace:
            found = float((model(ids).logits - expected).square().mean())
        assert trace.ledger.compute <= budget + 1e-6  # the maps included
        return found

    with_maps = error()
    for module in gated_branches(model, state_of(model).family).values():
        for parameter in compensation_of(module).parameters():
            parameter.zero_()
    assert with_maps < 0.9 * error()


def test_half_of_the_layers_is_half_of_the_macs_whatever_rounding_says() -> None:
    table = state_of(known("shortgpt")).policy
    assert table is not None
    assert table.compute == pytest.approx((1.0, 0.75, 0.5, 0.25))
    for error in (-1e-12, 0.0, 1e-12):
        rounded = dataclasses.replace(table, compute=tuple(c + error for c in table.compute))
        assert rounded.resolve(gateskip.Budget(compute=0.5)) == table.thresholds[2]
