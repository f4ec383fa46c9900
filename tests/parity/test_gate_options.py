"""Every way of gating a model, through the invariants that it must not break."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import gateskip
from gateskip.errors import ConfigError, UnsupportedError
from gateskip.retrofit.attach import decoder_of, gate_of, gated_branches, layers_of
from gateskip.skipping.state import override, replay, state_of
from gateskip.training.objective import GateObjective
from models import LAYERS, gated, medians, padded, random_ids, through_cache, tiny, with_table

OPTIONS: dict[str, dict[str, Any]] = {
    "grouped": {"kind": "grouped", "groups": 8},
    "mlp": {"kind": "mlp"},
    "shared": {"kind": "shared"},
    "raw": {"gate_input": "raw", "init_std": 0.1},
    "before": {"placement": "before"},
    "before raw vector": {
        "placement": "before", "gate_input": "raw", "kind": "vector", "init_std": 0.05,
    },
    "layer": {"decision": "layer"},
    "every second layer": {"layer_step": 2},
    "attention only": {"branches": ("attention",)},
    "mlp only": {"branches": ("mlp",)},
    "protected": {"protected_first": 3, "protected_ids": (7, 8, 9)},
}  # fmt: skip
options = pytest.mark.parametrize("name", OPTIONS)
families = pytest.mark.parametrize("family", ["llama", "olmo2", "cohere", "gpt2"])


def built(name: str, family: str = "llama", **more: Any) -> Any:
    return gated(family, **(OPTIONS[name] | more))


@options
@families
@torch.no_grad()
def test_masked_compacted_cached_and_padded_agree(name: str, family: str) -> None:
    model = built(name, family, compensation="low_rank")
    state = state_of(model)
    ids, mask, positions = padded(3, 14, "left")
    with override(state, thresholds=medians(model)), gateskip.trace(model) as own:
        fast = model(ids, attention_mask=mask, position_ids=positions).logits
        parts = through_cache(model, ids, mask, positions, 1)
        alone = [model(ids[row][mask[row].bool()][None]).logits[0] for row in range(3)]
    assert 0.1 < own.ledger.skip_rate < 0.7
    with replay(state, [{k: v[0] for k, v in own.keep.items()}]):
        with gateskip.execution(model, "masked"):
            slow = model(ids, attention_mask=mask, position_ids=positions).logits
    valid = mask.bool()
    torch.testing.assert_close(fast[valid], slow[valid], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts[valid], fast[valid], atol=2e-5, rtol=1e-4)
    for row in range(3):
        torch.testing.assert_close(fast[row][valid[row]], alone[row], atol=2e-5, rtol=1e-4)


@options
@pytest.mark.parametrize("kv", ["project", "previous", "none"])
def test_backward(name: str, kv: str) -> None:
    model = built(name, kv_source=kv, compensation="low_rank")
    ids, mask, _ = padded(3, 14, "right")
    grads: list[dict[str, torch.Tensor]] = []
    thresholds = medians(model)
    for mode in ("masked", "compacted"):
        model.zero_grad()
        with override(state_of(model), thresholds=thresholds), gateskip.execution(model, mode):
            logits = model(ids, attention_mask=mask, use_cache=False).logits
        logits[mask.bool()].square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert any("skip_gate" in key for key in grads[0])
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, atol=1e-5, rtol=1e-4)


@options
@torch.no_grad()
def test_unit_gates_are_the_dense_model(name: str) -> None:
    model, ids = tiny(), random_ids(2, 12)
    dense = model(ids).logits
    given = OPTIONS[name] | {"init_std": 0.0, "init_bias": 40.0}
    gateskip.attach(model, gateskip.GateConfig(**given))
    assert torch.equal(model(ids).logits, dense)
    gateskip.detach(model)
    assert torch.equal(model(ids).logits, dense)


@options
def test_fit_calibrate_save_load(name: str, tmp_path: Path) -> None:
    base, texts = tiny(), [random_ids(1, 60, seed=n) for n in range(30)]
    base.save_pretrained(tmp_path / "base")
    config = gateskip.GateConfig(**({"compensation_rank": 4} | OPTIONS[name]))
    model = gateskip.attach(base, config)
    gateskip.fit(model, texts)
    table = gateskip.calibrate(model, texts, grid=(0.9, 0.8, 0.7))
    assert min(abs(keep - 0.9) for keep in table.keep) < 0.02
    gateskip.set_budget(model, keep=0.8)
    ids = random_ids(2, 30, seed=99)
    with torch.no_grad(), gateskip.trace(model) as trace:
        wanted = model(ids).logits
    assert trace.ledger.skip_rate > 0.1
    gateskip.save(model, tmp_path / "gates")
    again = gateskip.load(tmp_path / "gates", base=tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, wanted)
    assert state_of(again).config == state_of(model).config


@options
@torch.no_grad()
def test_generate(name: str) -> None:
    model = with_table(built(name))
    prompt = random_ids(2, 9)
    call = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with gateskip.trace(model) as trace:
        out = model.generate(prompt, gateskip_budget={"keep": 0.6}, **call)
    assert out.shape == (2, 15)
    assert trace.ledger.skip_rate > 0.1


def test_shared_gates_are_one_module() -> None:
    model = built("shared")
    gates = [gate_of(m) for m in gated_branches(model, state_of(model).family).values()]
    assert len(gates) == 2 * LAYERS
    assert len({id(gate) for gate in gates}) == 2


def test_grouped_gates_have_a_value_for_every_head() -> None:
    model = gateskip.attach(tiny(), gateskip.GateConfig(kind="grouped"))
    assert state_of(model).config.groups == 4
    with pytest.raises(ConfigError, match="groups=5 does not divide"):
        gateskip.attach(tiny(), gateskip.GateConfig(kind="grouped", groups=5))


@torch.no_grad()
def test_a_grouped_gate_has_one_value_in_a_group() -> None:
    gate = gate_of(next(iter(gated_branches(m := built("grouped"), state_of(m).family).values())))
    g = gate(torch.randn(5, 64)).view(5, 8, 8)
    assert torch.equal(g, g[..., :1].expand_as(g))
    assert float(g[..., 0].std()) > 0


@torch.no_grad()
def test_a_two_layer_gate_bends_until_it_is_fitted() -> None:
    model = built("mlp")
    gate = gate_of(next(iter(gated_branches(model, state_of(model).family).values())))
    a, b = torch.randn(2, 64)
    middle = gate.logits((a + b) / 2)
    assert not torch.allclose(middle, (gate.logits(a) + gate.logits(b)) / 2, atol=1e-3)
    assert not gate.decides_linearly()
    gate.set_direction(torch.randn(64), 1.0)
    assert gate.decides_linearly()
    gate.up[:, 3] = 0.1
    assert not gate.decides_linearly()


@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("placement", ["after", "before"])
def test_detached_input(detached: bool, placement: str) -> None:
    """With the branch's output fixed, only the gate's input can carry a gradient to the norm."""
    model = gated(detach_input=detached, placement=placement)
    layer = layers_of(model, state_of(model).family)[0]
    objective = GateObjective()
    with override(state_of(model), objective=objective):
        model(random_ids(1, 8))
    objective.mean().backward()
    reached = layer.input_layernorm.weight.grad is not None
    assert reached == (not detached)


@pytest.mark.parametrize("placement", ["after", "before"])
def test_the_value_carries_a_gradient_to_its_input(placement: str) -> None:
    """The same values either way; the norm before a branch hears of the gate, or does not."""
    found = []
    for detached in (True, False):
        model = gated(detach_input=detached, placement=placement)
        logits = model(random_ids(1, 8)).logits
        logits.square().mean().backward()
        last = layers_of(model, state_of(model).family)[-1].post_attention_layernorm
        found.append((logits.detach(), last.weight.grad.clone()))
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.allclose(found[0][1], found[1][1], atol=1e-6)


@torch.no_grad()
def test_the_gate_scales_the_input_once() -> None:
    """Before the branch: h + f(g ⊙ u), and not g ⊙ f(g ⊙ u)."""
    model = gated(placement="before", branches=("mlp",))
    layer = layers_of(model, state_of(model).family)[0]
    h, seen = torch.randn(1, 5, 64), {}
    handles = [
        layer.mlp.register_forward_hook(lambda _m, a, out: seen.update(x=a[0], o=out)),
        layer.post_attention_layernorm.register_forward_hook(lambda _m, a, out: seen.update(u=out)),
        layer.register_forward_hook(lambda _m, a, out: seen.update(out=out)),
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _m, a: seen.update(h=a[0])),
    ]
    model(inputs_embeds=h)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(seen["x"], gate_of(layer.mlp)(seen["u"]) * seen["u"])
    torch.testing.assert_close(seen["out"], seen["h"] + seen["o"])


@torch.no_grad()
def test_the_raw_residual_is_the_gates_input() -> None:
    model = built("raw")
    state, ids = state_of(model), random_ids(2, 9)
    layer, seen = layers_of(model, state.family)[1], {}
    handle = layer.register_forward_pre_hook(lambda _m, a: seen.update(h=a[0]))
    taken: dict[Any, torch.Tensor] = {}

    class Scores:
        def add(self, key: Any, score_BT: torch.Tensor, call: Any) -> None:
            taken[key] = score_BT

    keep_all = dict.fromkeys(state.branches, -math.inf)
    with override(state, thresholds=keep_all, scores=Scores()):
        model(ids)
    handle.remove()
    expected = gate_of(layer.self_attn).logits(seen["h"]).mean(-1)
    torch.testing.assert_close(taken[1, "attention"], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_layer_is_skipped_as_one() -> None:
    model = built("layer")
    with override(state_of(model), thresholds=medians(model)), gateskip.trace(model) as trace:
        through_cache(model, *padded(2, 12, "left"), 1)
    for layer in range(LAYERS):
        for a, b in zip(trace.keep[layer, "attention"], trace.keep[layer, "mlp"], strict=True):
            assert torch.equal(a, b)
    with pytest.raises(ConfigError, match="decision='layer'"):
        gateskip.GateConfig(decision="layer", branches=("mlp",))


@torch.no_grad()
def test_gates_in_every_second_layer() -> None:
    model = built("every second layer")
    with override(state_of(model), thresholds=medians(model)), gateskip.trace(model) as trace:
        model(random_ids(2, 12))
    assert {key[0] for key in trace.keep} == {1, 3}
    with pytest.raises(ConfigError, match="layer_step=5"):
        gateskip.attach(tiny(), gateskip.GateConfig(layer_step=5))


@pytest.mark.parametrize("side", ["none", "left"])
@torch.no_grad()
def test_protected_tokens_are_never_skipped(side: str) -> None:
    model = built("protected")
    ids, mask, positions = padded(3, 16, side)
    everything = dict.fromkeys(state_of(model).branches, 1e9)  # skips whoever may be skipped
    wanted = (mask.cumsum(-1) <= 3) | torch.isin(ids, torch.tensor([7, 8, 9]))
    with override(state_of(model), thresholds=everything):
        with gateskip.trace(model) as trace:
            model(ids, attention_mask=mask)
        with gateskip.trace(model) as stepwise:
            through_cache(model, ids, mask, positions, 1)
        if side == "none":
            with gateskip.trace(model) as bare:
                model(ids)
            assert torch.equal(bare.keep[0, "mlp"][0], wanted)
    for key, masks in trace.keep.items():
        assert torch.equal(masks[0], wanted & mask.bool())
        assert torch.equal(torch.cat(stepwise.keep[key], 1), wanted & mask.bool())


@torch.no_grad()
def test_protected_tokens_of_packed_sequences() -> None:
    model = gated(protected_first=2)
    everything = dict.fromkeys(state_of(model).branches, 1e9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]])
    with override(state_of(model), thresholds=everything), gateskip.trace(model) as trace:
        model(random_ids(1, 10), position_ids=positions)
    assert torch.equal(trace.keep[0, "mlp"][0], positions < 2)


def test_protected_ids_need_ids() -> None:
    model = built("protected")
    with pytest.raises(UnsupportedError, match="protected_ids="):
        model(inputs_embeds=torch.randn(1, 5, 64))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"gate_input": "row"}, "Did you mean 'raw'"),
        ({"placement": "in"}, "placement='in'"),
        ({"decision": "token"}, "decision='token'"),
        ({"layer_step": 0}, "layer_step=0"),
        ({"groups": -1}, "groups=-1"),
        ({"protected_first": 0}, "protected_first=0"),
        ({"protected_ids": (-3,)}, "protected_ids"),
    ],
)
def test_bad_options(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        gateskip.GateConfig(**given)


@torch.no_grad()
def test_what_the_kernels_cannot_stand_in_for(stacked: list[bool]) -> None:
    """Options that change a branch's formula never take the kernels of a token."""
    for name in OPTIONS:
        stacked.clear()
        model = built(name)
        ids = random_ids(1, 6)
        with override(state_of(model), thresholds=medians(model)):
            through_cache(model, ids, torch.ones_like(ids), torch.arange(6)[None], 1)
        fits = state_of(model).config.fusible and name != "mlp"
        assert any(stacked) == fits, name


@options
@torch.no_grad()
def test_the_ledger_is_what_the_flop_counter_sees(name: str) -> None:
    """Gates, decisions and compensation of every kind are counted, at their real price."""
    model = built(name, compensation="low_rank")
    state = state_of(model)
    with override(state, thresholds=medians(model)):
        with FlopCounterMode(display=False) as counter, gateskip.trace(model) as trace:
            decoder_of(model, state.family)(random_ids(1, 24), use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    linear = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm")) / 2
    call = trace.calls[0]
    keep = [call.keep.get((i, "attention"), call.valid_BT) for i in range(LAYERS)]
    attended = sum(float((call.keys_BT * mask).sum()) for mask in keep)
    expected = trace.ledger.macs_spent - state.shape.macs_per_key * attended
    assert abs(linear - expected) <= 0.03 * expected
