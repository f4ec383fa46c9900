"""Surgery on a model: what attaching changes, what it leaves alone, and how it fails."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

import gateskip
from gateskip.config import BRANCH_KINDS
from gateskip.gates import GATES
from gateskip.gates.low_rank import LowRankGate
from gateskip.retrofit.attach import find_family, gated_branches, layers_of
from gateskip.skipping.state import override, replay, state_of
from models import FAMILIES, LAYERS, gated, medians, needed_by, random_ids, tiny, with_table


def snapshot(model: Any) -> dict[str, Any]:
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "modules": {name: (id(m), type(m)) for name, m in model.named_modules()},
        "attributes": {name: set(vars(m)) for name, m in model.named_modules()},
        "hooks": {name: len(m._forward_pre_hooks) for name, m in model.named_modules()},
    }


def assert_as_before(model: Any, before: dict[str, Any]) -> None:
    after = snapshot(model)
    state, expected = after.pop("state"), dict(before)
    old = expected.pop("state")
    assert after == expected
    assert list(state) == list(old)
    assert all(torch.equal(state[name], value) for name, value in old.items())


def test_attach_twice_and_detach_twice() -> None:
    model = gateskip.attach(tiny())
    with pytest.raises(gateskip.AttachError, match="detach"):
        gateskip.attach(model)
    assert len(gated_branches(model, state_of(model).family)) == 2 * LAYERS, "still attached"
    gateskip.detach(model)
    with pytest.raises(gateskip.AttachError, match="attach"):
        gateskip.detach(model)
    assert gateskip.attach(model) is model


def test_unsupported_architecture_lists_the_supported() -> None:
    config = OPTConfig(
        hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=1, num_attention_heads=2,
        ffn_dim=32, vocab_size=64, max_position_embeddings=32,
    )  # fmt: skip
    with pytest.raises(gateskip.UnsupportedError) as caught:
        gateskip.attach(OPTForCausalLM(config))
    for name in ("opt", "llama", "mistral", "qwen2", "qwen3"):
        assert name in str(caught.value)


def test_layers_that_would_run_dense_are_refused() -> None:
    model = tiny()
    layer = model.model.layers[2]
    layer.forward = layer.forward
    with pytest.raises(gateskip.UnsupportedError, match="layer 2"):
        gateskip.attach(model)
    with pytest.raises(gateskip.UnsupportedError, match="meta"):
        gateskip.attach(tiny().to("meta"))
    model = cpu_offload(tiny(), execution_device=torch.device("cpu"))
    layer = model.model.layers[1]
    vars(layer)["_old_forward"] = lambda *args, **kwargs: None  # patched before it was offloaded
    vars(layer)["_hf_hook"] = vars(model.model.norm)["_hf_hook"]
    with pytest.raises(gateskip.UnsupportedError, match="layer 1"):
        gateskip.attach(model)
    assert not [n for n, _ in model.named_modules() if "skip_gate" in n]


def dispatched(family: str, how: str, folder: Path) -> Any:
    """A tiny model whose weights are elsewhere until they are wanted."""
    model = tiny(family)
    if how == "cpu":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    spec = find_family(model.config)
    layers = f"{spec.decoder}.{spec.layers}"
    names = [f"{layers}.{i}" for i in range(LAYERS)]
    places: dict[str, Any] = {name: "disk" if i % 2 else "cpu" for i, name in enumerate(names)}
    rest = [n for n, _ in model.named_children()] + [
        f"{spec.decoder}.{n}" for n, _ in model.get_submodule(spec.decoder).named_children()
    ]  # fmt: skip
    places |= {n: "cpu" for n in rest if n not in (spec.decoder, layers)}
    return dispatch_model(
        model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt2", "olmo2"])
@pytest.mark.parametrize("how", ["cpu", "disk"])
@torch.no_grad()
def test_offloaded_weights(family: str, how: str, tmp_path: Path) -> None:
    plain, model = tiny(family), dispatched(family, how, tmp_path)
    if how == "cpu":
        assert all(p.is_meta for p in layers_of(model, find_family(model.config))[0].parameters())
    ids = random_ids(2, 30)
    dense = model(ids).logits
    texts = [random_ids(1, 60, seed=s)[0] for s in range(40)]
    for one in (plain, model):
        gateskip.attach(one, gateskip.GateConfig(compensation="low_rank", compensation_rank=4))
        gateskip.fit(one, texts)
        gateskip.calibrate(one, texts, grid=(0.8, 0.5))
    with gateskip.budget(model, keep=0.6), gateskip.trace(model) as trace:
        own = model(ids).logits
        model.generation_config.eos_token_id = None
        assert model.generate(ids[:1], max_new_tokens=6).shape == (1, 36)
    assert 0.2 < trace.ledger.skip_rate < 0.6
    # Costs, hence decisions, may differ: a fused projection cannot be sliced while it is away.
    for key, module in gated_branches(plain, state_of(plain).family).items():
        twin = gated_branches(model, state_of(model).family)[key]
        for name in ("skip_gate", "skip_compensation"):
            getattr(module, name).load_state_dict(getattr(twin, name).state_dict())
    with replay(state_of(plain), [trace.calls[0].keep]):
        torch.testing.assert_close(plain(ids).logits, own, atol=1e-4, rtol=1e-4)
    gateskip.detach(model)
    assert torch.equal(model(ids).logits, dense)


def test_not_a_causal_model() -> None:
    with pytest.raises(gateskip.UnsupportedError, match="causal"):
        gateskip.attach(tiny().model)


@pytest.mark.parametrize("at", [1, 5, 8])
def test_rolled_back_when_a_layer_fails(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    model = tiny()
    before, ids = snapshot(model), random_ids(1, 6)
    with torch.no_grad():
        dense = model(ids).logits
    build, calls = LowRankGate.build.__func__, []

    def failing(cls: type, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise MemoryError("no room")
        return build(cls, *args)

    with monkeypatch.context() as patch:
        patch.setattr(LowRankGate, "build", classmethod(failing))
        with pytest.raises(MemoryError):
            gateskip.attach(model)
    assert len(calls) == at
    assert_as_before(model, before)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense)
    gateskip.attach(model)
    gateskip.detach(model)
    assert_as_before(model, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_classes_stay(family: str) -> None:
    model = tiny(family)
    before = {name: id(p) for name, p in model.named_parameters()}
    layer = layers_of(model, find_family(model.config))[0]
    cls, layer_class = type(model), type(layer)
    gateskip.attach(model)
    after = {name: id(p) for name, p in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert all(".skip_gate." in name for name in after.keys() - before.keys())
    assert type(model) is cls
    assert type(layer).__name__ == layer_class.__name__
    assert type(layer) is not layer_class
    assert isinstance(layer, layer_class)


@pytest.mark.parametrize("branches", [("attention",), ("mlp",)])
def test_one_branch_kind_only(branches: tuple[str, ...]) -> None:
    model = gateskip.attach(tiny(), gateskip.GateConfig(branches=branches, init_std=0.3))
    assert {kind for _, kind in gated_branches(model, state_of(model).family)} == set(branches)
    ids = random_ids(2, 12)
    thresholds = medians(model)
    with torch.no_grad(), override(state_of(model), thresholds=thresholds):
        with gateskip.trace(model) as trace:
            fast = model(ids).logits
        with gateskip.execution(model, "masked"):
            slow = model(ids).logits
    assert {key[1] for key in trace.keep} == set(branches)
    assert set(branches) <= set(BRANCH_KINDS)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)


def test_deepcopy_is_independent() -> None:
    model = with_table(gated(compensation="low_rank"))
    ids = random_ids(1, 12)
    twin = copy.deepcopy(model)
    assert state_of(twin) is not state_of(model)
    assert twin.generate.__self__ is twin
    assert twin.model.layers[0].self_attn.skip_gate is not model.model.layers[0].self_attn.skip_gate
    with torch.no_grad():
        with gateskip.budget(model, keep=0.5):
            of_model, full_twin = model(ids).logits, twin(ids).logits
        with gateskip.budget(twin, keep=0.5):
            of_twin, full_model = twin(ids).logits, model(ids).logits
        assert torch.equal(of_model, of_twin)
        assert torch.equal(full_model, full_twin)
        assert not torch.equal(of_model, full_model)
        gateskip.set_budget(twin, keep=0.5)
        assert torch.equal(twin(ids).logits, of_model)
        assert torch.equal(model(ids).logits, full_model)
        twin.model.layers[0].mlp.skip_gate.bias.add_(1.0)
        assert not torch.equal(twin(ids).logits, of_model)
        assert torch.equal(model(ids).logits, full_model)
    gateskip.detach(twin)
    with torch.no_grad(), gateskip.trace(model) as trace:
        model(ids)
    assert trace.calls, "the original is still gated"


def test_save_pretrained_gives_the_base_weights(tmp_path: Path) -> None:
    """Gate keys are unexpected to the plain class: reported, ignored, and nothing is missing."""
    dense = tiny("qwen2")
    ids = random_ids(2, 10)
    with torch.no_grad():
        expected = dense(ids).logits
    weights = {name: value.clone() for name, value in dense.state_dict().items()}
    model = gateskip.attach(dense, gateskip.GateConfig(init_std=0.3, init_bias=1.0))
    model.save_pretrained(tmp_path)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert info["unexpected_keys"]
    assert all(".skip_gate." in name for name in info["unexpected_keys"])
    assert type(plain) is type(model)
    loaded = plain.state_dict()
    assert list(loaded) == list(weights)
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    with torch.no_grad():
        assert torch.equal(plain.eval()(ids).logits, expected)


@pytest.mark.parametrize("kind", GATES.names())
@pytest.mark.parametrize(
    "how", ["to_bfloat16", "to_keyword", "half", "bfloat16", "attach_bfloat16"]
)
def test_gates_stay_float32(kind: str, how: str) -> None:
    config = gateskip.GateConfig(kind=kind, init_std=0.3, init_bias=1.0, **needed_by(kind))
    expected = gateskip.attach(tiny(), config).state_dict()
    if how == "attach_bfloat16":
        model = gateskip.attach(tiny(dtype=torch.bfloat16), config)
    else:
        model = gateskip.attach(tiny(), config)
        {
            "to_bfloat16": lambda: model.to(torch.bfloat16),
            "to_keyword": lambda: model.to("cpu", dtype=torch.float16),
            "half": model.half,
            "bfloat16": model.bfloat16,
        }[how]()
    assert model.model.layers[0].mlp.up_proj.weight.dtype in (torch.bfloat16, torch.float16)
    for name, value in model.state_dict().items():
        if ".skip_gate." in name:
            assert value.dtype == torch.float32
            assert torch.equal(value, expected[name])
    with torch.no_grad():
        assert model(random_ids(1, 5)).logits.isfinite().all()


@pytest.mark.parametrize("kind", GATES.names())
def test_gates_ignore_autocast(kind: str) -> None:
    model = gated(**({"kind": kind} | needed_by(kind)))
    gate, u = model.model.layers[1].self_attn.skip_gate, torch.randn(3, 5, 64)
    plain = gate(u)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gate(u)
    assert inside.dtype == torch.float32
    assert torch.equal(plain, inside)


@torch.no_grad()
def test_autocast_decides_in_float32() -> None:
    """The first branch's residual does not depend on autocast, so its decisions must not either."""
    model = gated()
    ids, thresholds = random_ids(2, 24), medians(model)
    with override(state_of(model), thresholds=thresholds), gateskip.trace(model) as trace:
        model(ids)
        with torch.autocast("cpu", torch.bfloat16):
            model(ids)
    plain, cast = trace.keep[(0, "attention")]
    assert torch.equal(plain, cast)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("execution", ["masked", "compacted"])
def test_gradient_checkpointing(reentrant: bool, execution: str) -> None:
    model = gated(compensation="low_rank").train()
    ids, thresholds = random_ids(2, 12), medians(model)
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        with (
            override(state_of(model), thresholds=thresholds),
            gateskip.execution(model, execution),
            gateskip.trace(model) as trace,
        ):
            loss = model(ids, labels=ids, use_cache=False).loss
        # Outside of the block: recomputation must replay the recorded decisions.
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        assert len(trace.calls) == 1, "recomputation is not recorded"
        results.append((loss.detach(), grads))
    (loss, grads), (other_loss, other) = results
    torch.testing.assert_close(loss, other_loss)
    assert grads.keys() == other.keys()
    assert sum("skip_gate" in name for name in grads) == 3 * 2 * LAYERS
    for name, grad in grads.items():
        torch.testing.assert_close(other[name], grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("backend", ["flash_attention_2", "paged|sdpa"])
def test_other_attention_backends_raise(backend: str) -> None:
    model = tiny()
    before = snapshot(model)
    model.config._attn_implementation = backend
    with pytest.raises(gateskip.UnsupportedError, match="sdpa"):
        gateskip.attach(model)
    assert_as_before(model, before)
    model.config._attn_implementation = "sdpa"
    gateskip.attach(model)
    model.config._attn_implementation = backend
    with pytest.raises(gateskip.UnsupportedError, match="sdpa"):
        model(random_ids(1, 4))


def test_a_layer_outside_of_its_decoder_raises() -> None:
    model = gateskip.attach(tiny())
    with pytest.raises(gateskip.UnsupportedError, match="decoder"):
        model.model.layers[0](torch.zeros(1, 3, 64))


def test_four_dimensional_masks_and_attention_weights_raise() -> None:
    model, ids = gateskip.attach(tiny()), random_ids(1, 4)
    with pytest.raises(gateskip.UnsupportedError, match="2-D"):
        model(ids, attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))
    with pytest.raises(gateskip.UnsupportedError, match="output_attentions"):
        model(ids, output_attentions=True)


def test_dense_block_is_the_dense_model() -> None:
    from gateskip.execution.api import dense

    model, ids = tiny(), random_ids(2, 9)
    with torch.no_grad():
        expected = model(ids).logits
        model = gateskip.attach(model, gateskip.GateConfig(init_std=0.3, init_bias=1.0))
        own = model(ids).logits
        assert not torch.equal(own, expected)
        with dense(model):
            assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids).logits, own)
    gateskip.detach(model)
    assert not model.model._forward_pre_hooks
