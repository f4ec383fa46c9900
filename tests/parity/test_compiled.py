"""The masked form as one graph: the same numbers, every budget, gradients."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import gateskip
from models import gated, padded, random_ids, with_table

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
@torch.no_grad()
def test_one_graph_is_the_reference(family: str) -> None:
    model = with_table(gated(family, compensation="low_rank"))
    forward = gateskip.compile_masked(model, backend="aot_eager")
    ids, mask, _ = padded(2, 16, "left")
    valid = mask.bool()
    before = None
    for keep in (0.3, 0.6, 1.0):
        with gateskip.budget(model, keep=keep), gateskip.execution(model, "masked"):
            reference = model(ids, attention_mask=mask).logits[valid]
            own = forward(ids, attention_mask=mask).logits[valid]
        torch.testing.assert_close(own, reference, atol=1e-5, rtol=1e-5)
        assert before is None or not torch.allclose(own, before, atol=1e-3)
        before = own
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_gradients() -> None:
    model = with_table(gated("llama", compensation="low_rank"))
    ids, grads = random_ids(2, 12), []
    forward = gateskip.compile_masked(model, backend="aot_eager")
    for run in (model, forward):
        model.zero_grad()
        with gateskip.budget(model, keep=0.6), gateskip.execution(model, "masked"):
            run(ids, labels=ids).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-4)


def test_refusals() -> None:
    model = with_table(gated("llama"))
    forward = gateskip.compile_masked(model, backend="aot_eager")
    ids = random_ids(2, 8)
    with gateskip.trace(model), pytest.raises(gateskip.UnsupportedError, match="traced"):
        forward(ids)
    with (
        gateskip.budget(model, keep=[0.5, 1.0]),
        pytest.raises(gateskip.UnsupportedError, match="by row"),
    ):
        forward(ids)


def test_previous_keys_are_refused() -> None:
    for source in ("previous", "none"):
        with pytest.raises(gateskip.UnsupportedError, match="kv_source='project'"):
            gateskip.compile_masked(with_table(gated("llama", kv_source=source)))


@torch.no_grad()
def test_embeddings_instead_of_ids() -> None:
    model, ids = with_table(gated("llama")), random_ids(2, 8)
    forward = gateskip.compile_masked(model, backend="aot_eager")
    embeds = model.get_input_embeddings()(ids)
    with gateskip.budget(model, keep=0.6):
        torch.testing.assert_close(
            forward(inputs_embeds=embeds).logits, forward(input_ids=ids).logits
        )


@torch.no_grad()
def test_a_plain_compile_skips_as_asked() -> None:
    """Outside of one graph the budget is looked up anew: graph breaks, never a stale budget."""
    model = with_table(gated("llama", compensation="low_rank"))
    ids = random_ids(2, 12)
    compiled = torch.compile(model, backend="eager")
    for keep in (0.3, 0.8):
        with gateskip.budget(model, keep=keep):
            torch.testing.assert_close(
                compiled(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5
            )
