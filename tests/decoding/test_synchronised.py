"""Synchronised decoding: its two ends, exact deep keys and values, and rows that do not mix."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import gateskip
from gateskip.decoding import DecodingStats
from gateskip.errors import ConfigError, UnsupportedError
from gateskip.execution.api import dense
from gateskip.skipping.score import softmax_gap
from models import FAMILIES, gated, padded, random_ids, tiny, with_table

NEW = 20


@pytest.fixture(scope="module")
def model() -> Any:
    """Gates of value 1: without its deep layers it is a plain, shorter model."""
    built = gated("llama", init_std=0.0, init_bias=40.0)
    built.generation_config.eos_token_id = None
    return built


@pytest.fixture(scope="module")
def gates() -> Any:
    built = with_table(gated("llama", compensation="low_rank"))
    built.generation_config.eos_token_id = None
    return built


def decoded(model: Any, ids: Any, threshold: float, mask: Any = None, **more: Any) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    given = {"layers": 2, "max_new_tokens": NEW, "do_sample": False} | more
    return gateskip.generate_synchronised(
        model, ids, threshold=threshold, attention_mask=mask, **given
    )


@torch.no_grad()
def middle(model: Any, ids: Any) -> float:
    """A threshold that some tokens pass."""
    short = truncated(model, 2)
    return float(softmax_gap(short(ids).logits[0]).median())


def truncated(model: Any, layers: int) -> Any:
    found = gateskip.detach(copy.deepcopy(model))
    del found.model.layers[layers:]
    found.config.num_hidden_layers = layers
    return found


def test_the_gap_between_the_best_two() -> None:
    probabilities = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.8, 0.1]])
    assert softmax_gap(probabilities.log()).tolist() == pytest.approx([0.2, 0.7])


@pytest.mark.parametrize("batch", [1, 3])
def test_above_one_nobody_leaves(gates: Any, batch: int) -> None:
    ids, mask, _ = padded(batch, 9, "left")
    given = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    for full, keep in ((1.0, 1.0), (0.5, 0.5), ("dense", None)):
        stats = DecodingStats()
        if keep is None:
            with dense(gates):
                wanted = gates.generate(ids, **given)
        else:
            wanted = gates.generate(ids, **given, gateskip_budget={"keep": keep})
        assert torch.equal(decoded(gates, ids, 1.1, mask, full=full, stats=stats), wanted)
        assert (stats.exits, stats.refreshed, stats.draft_calls) == (0, 0, NEW - 1)


def test_from_zero_down_all_leave(model: Any) -> None:
    ids, stats = random_ids(1, 9), DecodingStats()
    found = decoded(model, ids, 0.0, stats=stats, most_waiting=NEW)
    with dense(model):
        first = model(ids).logits[:, -1].argmax(-1)
    assert found[0, 9] == first
    short = truncated(model, 2)
    wanted = short.generate(found[:, :10], max_new_tokens=NEW - 1, do_sample=False)
    assert torch.equal(found, wanted)
    assert (stats.exits, stats.refreshed) == (NEW - 1, 0)


@torch.no_grad()
def test_deep_layers_see_exact_keys_and_values(model: Any) -> None:
    ids, stats = random_ids(1, 9), DecodingStats()
    level = middle(model, ids)
    found = decoded(model, ids, level, stats=stats, return_dict_in_generate=True, most_waiting=3)
    assert 0 < stats.exits < NEW - 1
    assert 0 < stats.refreshed
    text = found.sequences
    with dense(model):
        whole = model(text, use_cache=True)
    short = truncated(model, 2)
    shallow = short(text).logits
    deep = shallow_right = 0
    for at in range(9, text.shape[1] - 1):  # what came after each new token, from the text alone
        certain = bool(softmax_gap(shallow[:, at]) >= level)
        chosen = (shallow if certain else whole.logits)[0, at].argmax()
        assert text[0, at + 1] == chosen, at
        shallow_right += certain
        deep += not certain
    assert stats.exits == shallow_right
    assert deep
    assert_exact(found, whole)


def assert_exact(found: Any, whole: Any) -> None:
    """A cache that is given back holds what all layers computed, of whoever waited, too."""
    cache, exact = (getattr(o, "cache", None) or o.past_key_values for o in (found, whole))
    columns = cache.get_seq_length()
    assert columns == found.sequences.shape[1] - 1
    for layer, other in zip(cache.layers, exact.layers, strict=True):
        for a, b in ((layer.keys, other.keys), (layer.values, other.values)):
            torch.testing.assert_close(a[:, :, :columns], b[:, :, :columns], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_so_many_may_wait(model: Any) -> None:
    ids, stats = random_ids(1, 9), DecodingStats()
    given = {"most_waiting": 3, "max_new_tokens": 12, "stats": stats}
    with gateskip.trace(model) as trace:
        free = decoded(model, ids, 0.0, **given)
    assert (stats.exits, stats.refreshed) == (11, 6)  # of 11 tokens the 4th and the 8th go deep
    assert len(trace.calls) == 1 + 11 + 2
    stats = DecodingStats()
    found = decoded(model, ids, 0.0, **(given | {"stats": stats}), return_dict_in_generate=True)
    assert stats.refreshed == 6 + 3
    assert torch.equal(found.sequences, free)
    assert_exact(found, model(free, use_cache=True))
    static = decoded(model, ids, 0.0, **given, cache_implementation="static")
    assert torch.equal(static, free)


def test_who_has_ended_holds_nobody_up(model: Any) -> None:
    ids, mask, _ = padded(2, 9, "left")
    long = decoded(model, ids, 1.1, mask)
    stop = int(long[0, 9])  # the first row ends at once
    assert stop not in long[1, 9:]
    level = middle(model, random_ids(1, 40))
    stats, alone = DecodingStats(), DecodingStats()
    given = {"eos_token_id": stop, "pad_token_id": 0}
    with gateskip.trace(model) as trace:
        together = decoded(model, ids, level, mask, stats=stats, **given)
    first = int(mask[1].argmax())
    with gateskip.trace(model) as single:
        wanted = decoded(model, ids[1:, first:], level, stats=alone, **given)
    assert torch.equal(together[1, first:], wanted[0])
    assert (stats.exits, len(trace.calls)) == (alone.exits, len(single.calls))


def test_sampling_draws_from_either(model: Any) -> None:
    ids = random_ids(1, 9)
    given = {"do_sample": True, "temperature": 0.7, "top_k": 5}
    torch.manual_seed(3)
    wanted = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, **given
    )  # fmt: skip
    torch.manual_seed(3)
    assert torch.equal(decoded(model, ids, 1.1, **given), wanted)


def test_free_asks_the_head_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from gateskip import methods
    from gateskip.methods.exits import ExitRule

    tuned = methods.apply("free", tiny(), list(random_ids(20, 64)), layers=2)
    tuned.generation_config.eos_token_id = None
    asked: list[int] = []
    plain = ExitRule.score
    monkeypatch.setattr(
        ExitRule,
        "score",
        lambda self, key, *more: (asked.append(key[0]), plain(self, key, *more))[1],
    )
    ids = random_ids(1, 9)
    found = decoded(tuned, ids, 0.0)
    assert not asked
    with gateskip.budget(tuned, compute=0.8):
        tuned.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
    assert asked, "a budget does ask it"
    short = truncated(tuned, 2)
    wanted = short.generate(found[:, :10], max_new_tokens=NEW - 1, do_sample=False)
    assert torch.equal(found, wanted)


def test_rows_do_not_depend_on_each_other(model: Any, gates: Any) -> None:
    ids, mask, _ = padded(3, 9, "left")
    level = middle(model, random_ids(1, 40))
    for each in (model, gates):
        stats = DecodingStats()
        together = decoded(each, ids, level, mask, stats=stats)
        assert 0 < stats.exits < 3 * (NEW - 1)
        for row in range(3):
            first = int(mask[row].argmax())
            alone = decoded(each, ids[row : row + 1, first:], level)
            assert torch.equal(together[row, first:], alone[0])


def test_the_ledger_counts_the_passes(model: Any) -> None:
    ids, stats = random_ids(1, 9), DecodingStats()
    with gateskip.trace(model) as trace:
        decoded(model, ids, middle(model, ids), stats=stats)
    deep = len(trace.calls) - 1 - stats.draft_calls
    assert 0 < deep < NEW
    tokens = sum(call.without_padding().keep[0, "attention"].numel() for call in trace.calls[1:])
    assert tokens == stats.draft_calls + deep + stats.refreshed


def test_families_and_ends(model: Any) -> None:
    for name in ("gpt2", "gpt_neox", "qwen3"):
        assert name in FAMILIES
        other = gated(name)
        ids, mask, _ = padded(2, 9, "left")
        wanted = other.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        assert torch.equal(decoded(other, ids, 1.1, mask, max_new_tokens=6), wanted)
    ids = random_ids(1, 9)
    whole = decoded(model, ids, 0.0)
    stop = int(whole[0, 14])
    cut = decoded(model, ids, 0.0, eos_token_id=stop, pad_token_id=0)
    first = whole[0, 9:].tolist().index(stop)
    assert torch.equal(cut[0], whole[0, : 10 + first])


def test_what_is_refused(model: Any) -> None:
    ids = random_ids(1, 9)
    for options, message in (
        ({"threshold": "sure"}, "threshold='sure'"),
        ({"layers": 0}, "layers=0"),
        ({"layers": 99}, "layers: layers=99"),
        ({"most_waiting": 0}, "most_waiting=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            decoded(model, ids, **({"threshold": 0.5} | options))
    with pytest.raises(UnsupportedError, match="num_beams=2"):
        decoded(model, ids, 0.5, num_beams=2)
    windows = gated("gemma3_text")
    with pytest.raises(UnsupportedError, match="ExitLayer"):
        decoded(windows, ids, 0.5, layers=1)
