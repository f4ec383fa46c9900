"""Speculative decoding gives plain decoding's tokens, whatever the draft."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    StaticCache,
)
from transformers.generation.streamers import BaseStreamer

import gateskip
from gateskip.decoding import AtBudget, DecodingStats, Dense, ExitLayer, StaticMask
from gateskip.decoding.drafts import LookupDraft, _RowIndex
from gateskip.decoding.length import Fitting
from gateskip.errors import BudgetError, ConfigError, UnsupportedError
from gateskip.execution.api import dense
from models import LAYERS, VOCAB, gated, padded, random_ids, with_table

NEW = 24


def nonsense(ids: Tensor, count: int) -> list[int]:
    """A draft that is nearly always wrong."""
    return [(int(ids[-1]) * 7 + 3 * n) % VOCAB for n in range(count)]


DRAFTS: dict[str, Any] = {
    "budget": None,
    "compute": {"compute": 0.5},
    "lookup": "lookup",
    "exit": ExitLayer(2),
    "mask": StaticMask([(1, "mlp"), (2, "attention")]),
    "dense": "dense",
    "nonsense": nonsense,
}


@pytest.fixture(scope="module")
def model() -> Any:
    built = with_table(gated("llama", compensation="low_rank"))
    built.generation_config.eos_token_id = None  # tiny models would end at random
    return built


def plain(model: Any, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(
        ids, attention_mask=mask, **({"max_new_tokens": NEW, "do_sample": False} | more)
    )


def drafted(model: Any, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    return gateskip.generate_speculative(
        model, ids, attention_mask=mask, **({"max_new_tokens": NEW, "do_sample": False} | more)
    )


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("tokens", [1, 3, 8, "auto"])
@pytest.mark.parametrize("keep", [1.0, 0.6])
def test_tokens_are_those_of_plain_decoding(
    model: Any, draft: str, tokens: int | str, keep: float
) -> None:
    ids, stats = random_ids(1, 9), DecodingStats()
    with gateskip.budget(model, keep=keep):
        wanted = plain(model, ids)
        found = drafted(model, ids, draft_policy=DRAFTS[draft], draft_tokens=tokens, stats=stats)
    assert torch.equal(found, wanted)
    assert stats.new_tokens == NEW - 1, "the prompt's pass gives the first"
    assert stats.accepted <= stats.drafted
    if draft not in ("lookup", "nonsense") and tokens != "auto":
        assert stats.drafted > 0


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3_text", "mistral_window", "gpt2",
                                    "gpt_neox", "olmo2", "qwen3_moe"])  # fmt: skip
@pytest.mark.parametrize("batch", [1, 3])
def test_families_windows_and_padding(family: str, batch: int) -> None:
    model = with_table(gated(family))
    model.generation_config.eos_token_id = None
    ids, mask, _ = padded(batch, 9, "left")
    stats = DecodingStats()
    with gateskip.budget(model, keep=0.7):
        wanted = plain(model, ids, mask)
        found = drafted(model, ids, mask, draft_keep=0.3, draft_tokens=3, stats=stats)
    assert torch.equal(found, wanted)
    assert stats.drafted > 0


@pytest.mark.parametrize("draft", ["budget", "lookup", "nonsense", "exit"])
@pytest.mark.parametrize("side", ["none", "left"])
def test_rows_take_their_own_number_of_tokens(model: Any, draft: str, side: str) -> None:
    ids, mask, _ = padded(4, 11, side)
    stats = DecodingStats()
    with gateskip.budget(model, keep=0.8):
        wanted = plain(model, ids, mask)
        found = drafted(model, ids, mask, draft_policy=DRAFTS[draft], draft_tokens=3, stats=stats)
    assert torch.equal(found, wanted)
    if draft in ("budget", "exit"):
        assert 0 < stats.accepted < stats.drafted, "rows differ"


@pytest.mark.parametrize("batch", [1, 2])
def test_a_cache_of_fixed_size(model: Any, batch: int) -> None:
    ids, mask, _ = padded(batch, 9, "left")
    wanted = plain(model, ids, mask)
    found = drafted(model, ids, mask, cache_implementation="static", draft_tokens=5)
    assert torch.equal(found, wanted)


def test_fixed_windows_that_are_full_refuse() -> None:
    model = with_table(gated("mistral_window"))
    ids = random_ids(1, 9)
    with pytest.raises(UnsupportedError, match="DynamicCache"):
        drafted(model, ids, cache_implementation="static")


def test_end_of_text_within_a_draft(model: Any) -> None:
    ids = random_ids(3, 9)
    longest = plain(model, ids)
    ended = set()
    for token in longest[:, 9:].unique().tolist():
        wanted = plain(model, ids, eos_token_id=token, pad_token_id=0)
        for draft in ("dense", "budget"):
            found = drafted(model, ids, eos_token_id=token, pad_token_id=0, draft_tokens=7,
                            draft_policy=DRAFTS[draft])  # fmt: skip
            assert torch.equal(found, wanted), (token, draft)
        ended.add(wanted.shape[1])
    assert len(ended) > 2


@pytest.mark.parametrize("new", [1, 2, 3, 5])
def test_longest_length_within_a_draft(model: Any, new: int) -> None:
    ids = random_ids(2, 9)
    wanted = plain(model, ids, max_new_tokens=new)
    found = drafted(model, ids, max_new_tokens=new, draft_tokens=8, draft_policy="dense")
    assert torch.equal(found, wanted)


def test_all_is_accepted_of_a_draft_that_is_the_target(model: Any) -> None:
    for target in (None, 0.6, "dense"):
        stats = DecodingStats()
        draft = 1.0 if target is None else target
        drafted(model, random_ids(2, 9), draft_policy=draft if draft != 1.0 else {"keep": 1.0},
                target=target, draft_tokens=4, stats=stats)  # fmt: skip
        assert stats.acceptance == 1.0
        assert stats.passes == 5  # 23 tokens of two rows, five at a time
        assert stats.tokens_per_pass == 2 * 23 / 5


def test_target_dense_is_the_model_without_gates(model: Any) -> None:
    ids = random_ids(1, 9)
    with dense(model):
        wanted = plain(model, ids)
    with gateskip.budget(model, keep=0.5), gateskip.trace(model) as trace:
        found = drafted(model, ids, target="dense", draft_keep=0.5)
    assert torch.equal(found, wanted)
    assert not torch.equal(plain(model, ids), wanted), "gates matter in this model"
    checked = [call for call in trace.calls if not call.decided]
    assert checked
    assert all(cost.kept_gate == 0 for call in checked for cost in call.costs.values())


def test_processors_see_drafted_tokens(model: Any) -> None:
    ids = random_ids(2, 9)
    options: dict[str, Any] = {
        "repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 5,
        "eos_token_id": 7, "pad_token_id": 0,
    }  # fmt: skip
    wanted = plain(model, ids, **options)
    for draft in ("budget", "dense", "nonsense"):
        found = drafted(model, ids, draft_policy=DRAFTS[draft], draft_tokens=4, **options)
        assert torch.equal(found, wanted)


def test_scores_and_output_object(model: Any) -> None:
    ids = random_ids(2, 9)
    options: dict[str, Any] = {
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True,
        "repetition_penalty": 1.2,
    }  # fmt: skip
    wanted, found = plain(model, ids, **options), drafted(model, ids, draft_tokens=3, **options)
    assert torch.equal(found.sequences, wanted.sequences)
    for name in ("scores", "logits"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert len(ours) == len(theirs) == NEW
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_cache_afterwards_goes_on_as_plain_decodings(model: Any) -> None:
    """Turn by turn, with a cache of the caller's; EOS ends turns within drafts."""
    ids = random_ids(1, 9)
    eos = int(plain(model, ids)[0, 9 + 5])

    def turns(generate: Any, **more: Any) -> Tensor:
        cache, text = DynamicCache(config=model.config), ids
        for turn in range(3):
            text = generate(model, text, cache=cache, eos_token_id=eos, max_new_tokens=10, **more)
            assert cache.get_seq_length() == text.shape[1] - 1
            text = torch.cat([text, random_ids(1, 4, seed=turn)], 1)
        return text

    with gateskip.budget(model, keep=0.7):
        wanted = turns(plain)
        for draft in ("dense", "budget", "nonsense"):
            assert torch.equal(turns(drafted, draft_policy=DRAFTS[draft], draft_tokens=6), wanted)


def test_return_sequences_and_row_budgets(model: Any) -> None:
    ids = random_ids(2, 9)
    options = {"gateskip_budget": {"keep": [1.0, 0.5]}}
    assert torch.equal(drafted(model, ids, **options), plain(model, ids, **options))
    torch.manual_seed(0)
    found = drafted(model, ids, do_sample=True, num_return_sequences=3)
    assert found.shape == (6, 9 + NEW)
    assert torch.equal(found[:, :9], ids.repeat_interleave(3, 0))


class Words(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


def test_streaming(model: Any) -> None:
    ids, words = random_ids(1, 9), Words()
    found = drafted(model, ids, streamer=words)
    assert words.tokens == found[0].tolist()
    assert words.ended == 1


def test_no_memory_of_drafts_in_the_models_thresholds(model: Any) -> None:
    ids = random_ids(1, 9)
    with gateskip.budget(model, keep=0.8):
        before = plain(model, ids)
        drafted(model, ids, draft_policy=ExitLayer(1))
        assert torch.equal(plain(model, ids), before)


def test_a_draft_that_fails_leaves_the_model_usable(model: Any) -> None:
    ids = random_ids(1, 9)
    wanted = plain(model, ids)

    def broken(row: Tensor, count: int) -> list[int]:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        drafted(model, ids, draft_policy=broken)
    with pytest.raises(ConfigError, match="vocabulary has 128"):
        drafted(model, ids, draft_policy=lambda row, count: [VOCAB])
    assert torch.equal(plain(model, ids), wanted)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"draft_tokens": 0}, ConfigError, "draft_tokens=0"),
        ({"draft_tokens": "many"}, ConfigError, "draft_tokens='many'"),
        ({"draft_keep": 0.0}, BudgetError, "keep=0.0"),
        ({"draft_keep": 0.01}, BudgetError, "draft_keep: .*floor"),
        ({"draft_policy": "fast"}, ConfigError, "draft_policy='fast'"),
        ({"draft_policy": ExitLayer(LAYERS)}, ConfigError, "below the model's 4"),
        ({"draft_policy": StaticMask([(9, "mlp")])}, ConfigError, "not a gated branch"),
        ({"target": 2.0}, BudgetError, "keep=2.0"),
        ({"num_beams": 2}, UnsupportedError, "num_beams=2"),
        ({"use_cache": False}, UnsupportedError, "use_cache=False"),
        ({"output_hidden_states": True}, UnsupportedError, "output_hidden_states"),
        ({"prompt_lookup_num_tokens": 3}, UnsupportedError, "prompt_lookup"),
    ],
)
def test_bad_arguments(model: Any, options: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        drafted(model, random_ids(1, 9), **options)


def test_no_embeddings_and_no_held_budget(model: Any) -> None:
    with pytest.raises(ConfigError, match="input_ids"):
        gateskip.generate_speculative(model, torch.zeros(1, 3, 64))
    with (
        gateskip.budget(model, keep=0.7),
        gateskip.hold_budget(model),
        pytest.raises(UnsupportedError, match="hold_budget"),
    ):
        drafted(model, random_ids(1, 9))


def looked_up(draft: LookupDraft, ids: list[int], count: int) -> list[int]:
    index = _RowIndex(draft.longest, draft.shortest)
    index.extend(ids)
    return [token for token, _ in draft.follow(index, count)]


def test_lookup_finds_the_longest_and_last_place() -> None:
    draft = LookupDraft(longest=2)
    assert looked_up(draft, [5, 6, 7, 5, 6, 8, 9, 5, 6], 3) == [8, 9, 5]
    assert looked_up(draft, [1, 2, 3], 3) == []
    assert looked_up(draft, [4, 4], 2) == [4, 4]
    assert looked_up(draft, [1, 6, 8, 2, 6, 9, 1, 6], 1) == [8], "two tokens before one"


def test_a_store_of_other_texts() -> None:
    texts = [torch.tensor([3, 4, 5, 6]), torch.tensor([9, 4, 5, 7]), torch.tensor([9, 4, 5, 7])]
    draft = LookupDraft.of(texts, longest=3)
    assert looked_up(draft, [3, 4, 5], 1) == [6], "the longest match"
    assert looked_up(draft, [1, 4, 5], 1) == [7], "the most frequent"
    assert looked_up(draft, [1, 1, 4], 2) == [], "one token is too little"
    assert looked_up(draft, [4, 5, 8, 4, 5], 1) == [8], "the row's own text first"


def test_a_store_accepts_what_the_model_said_before(model: Any) -> None:
    ids, stats = random_ids(3, 9), DecodingStats()
    wanted = plain(model, ids)
    draft = LookupDraft.of(list(wanted), longest=4)
    found = drafted(model, ids, draft_policy=draft, draft_tokens=6, stats=stats)
    assert torch.equal(found, wanted)
    assert stats.acceptance > 0.9
    assert torch.equal(drafted(model, ids[1:], draft_policy=draft), wanted[1:]), "used again"


def test_a_lookup_learns_how_far_to_trust_its_matches() -> None:
    draft, index = LookupDraft(longest=3), _RowIndex(3, 1)
    index.extend([5, 6, 7, 8, 9, 5, 6, 7])
    assert len(draft.follow(index, 8, 0.2)) > 1
    for _ in range(40):
        draft.count([3, 3], 0)
    assert draft.follow(index, 8, 0.2) == []
    for _ in range(200):
        draft.count([3, 3], 2)
    assert len(draft.follow(index, 8, 0.2)) == 8


def test_length_follows_acceptance() -> None:
    good, bad = Fitting(), Fitting()
    for _ in range(20):
        good.seen(4, 4)
        bad.seen(0, 4)
    assert good.wanted(0.05) > 4
    assert bad.wanted(0.5) == 0
    assert 1 in [bad.wanted(0.5) for _ in range(20)], "tries again from time to time"
    assert good.wanted(0.9) <= good.wanted(0.1)


def test_moes_and_layers_of_other_kinds_run_dense_per_call() -> None:
    model = with_table(gated("qwen3_moe"))
    ids = random_ids(1, 9)
    with dense(model):
        wanted = plain(model, ids)
    assert torch.equal(drafted(model, ids, target=Dense(), draft_policy=AtBudget(
        gateskip.Budget(keep=0.5))), wanted)  # fmt: skip


# ---------------------------------------------------------------- sampling

TOY_VOCAB, SAMPLES = 16, 20_000


@pytest.fixture(scope="module")
def toy() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, vocab_size=TOY_VOCAB, max_position_embeddings=64,
        initializer_range=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    return gateskip.attach(
        base, gateskip.GateConfig(kind="scalar", init_std=0.3, compensation="none")
    )


WARPERS: dict[str, Any] = {
    "plain": {"top_k": 0},
    "warped": {"temperature": 1.3, "top_k": 10, "top_p": 0.9, "min_p": 0.02},
    "penalty": {"repetition_penalty": 1.5, "top_k": 0},
}


@pytest.mark.parametrize("warpers", WARPERS)
@pytest.mark.parametrize("draft", ["exit", "chosen"])
@torch.no_grad()
def test_samples_have_the_targets_distribution(toy: Any, draft: str, warpers: str) -> None:
    """Chi-square of pairs of tokens, and of each, against exact probabilities."""
    ids, options = torch.tensor([[3, 5, 3]]), WARPERS[warpers]
    likely = int(following(toy, ids, options).argmax())
    policy = ExitLayer(1) if draft == "exit" else lambda row, count: [likely] * count
    stats = DecodingStats()
    torch.manual_seed(1)
    counts = torch.zeros(TOY_VOCAB, TOY_VOCAB)
    rows = 500
    for _ in range(SAMPLES // rows):
        found = gateskip.generate_speculative(
            toy, ids.expand(rows, -1), attention_mask=torch.ones(rows, 3, dtype=torch.long),
            do_sample=True, max_new_tokens=3, draft_policy=policy, draft_tokens=2, stats=stats,
            **options,
        )[:, 4:]  # fmt: skip
        for a, b in found.tolist():
            counts[a, b] += 1
    assert 0.05 < stats.acceptance < 0.95
    exact = exact_pairs(toy, ids, options)
    for seen, wanted in ((counts.flatten(), exact.flatten()), (counts.sum(1), exact.sum(1))):
        assert chi_square_p(seen, wanted) > 1e-3


def exact_pairs(model: Any, ids: Tensor, options: dict[str, Any]) -> Tensor:
    """Probabilities of the second and third new token, by enumeration, ``[V, V]``."""
    p_first = following(model, ids, options)
    pairs = torch.zeros(TOY_VOCAB, TOY_VOCAB)
    for first, second in itertools.product(range(TOY_VOCAB), range(TOY_VOCAB)):
        if p_first[first] == 0:
            continue
        seen = torch.cat([ids, torch.tensor([[first]])], 1)
        p_second = following(model, seen, options)
        if p_second[second] == 0:
            continue
        seen = torch.cat([seen, torch.tensor([[second]])], 1)
        pairs[second] += p_first[first] * p_second[second] * following(model, seen, options)
    return pairs


_KNOWN: dict[Any, Tensor] = {}


def following(model: Any, ids: Tensor, options: dict[str, Any]) -> Tensor:
    """The next token's distribution as plain sampling has it, ``[V]``."""
    key = (tuple(ids[0].tolist()), tuple(sorted(options.items())))
    if key not in _KNOWN:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=1,
            return_dict_in_generate=True, output_scores=True, **options,
        )  # fmt: skip
        _KNOWN[key] = out.scores[0][0].softmax(-1)
    return _KNOWN[key]


def chi_square_p(seen: Tensor, wanted: Tensor) -> float:
    """Chance of counts at least as far off, cells that expect under 5 pooled."""
    from scipy.stats import chi2

    expected = wanted.double() * seen.sum()
    rare = expected < 5
    a = torch.cat([seen[~rare].double(), seen[rare].sum().double()[None]])
    b = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = b > 0
    assert float(a[~keep].sum()) == 0, "a token came that has no probability"
    a, b = a[keep], b[keep]
    return float(chi2.sf(float(((a - b) ** 2 / b).sum()), a.shape[0] - 1))


def test_static_cache_of_the_callers(model: Any) -> None:
    ids = random_ids(1, 9)
    cache = StaticCache(config=model.config, max_cache_len=64)
    assert torch.equal(drafted(model, ids, cache=cache), plain(model, ids))


def test_a_fork_of_the_prompts_cache_is_left_alone(model: Any) -> None:
    """``copy.copy`` shares tensors: drafts may not reach them."""
    ids = random_ids(1, 9)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :8], cache=cache, use_cache=True)
        model(ids[:, 8:], cache=cache, use_cache=True)
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    before = [layer.keys.clone() for layer in fork.layers]
    text = torch.cat([ids, random_ids(1, 2, seed=4)], 1)
    for draft in ("budget", "exit"):
        used = copy.copy(fork)
        used.layers = [copy.copy(layer) for layer in fork.layers]
        wanted = plain(model, text)
        assert torch.equal(drafted(model, text, cache=used, draft_policy=DRAFTS[draft]), wanted)
        assert all(torch.equal(a.keys, b) for a, b in zip(fork.layers, before, strict=True))


@pytest.mark.parametrize("new", [4, 20])
def test_a_window_that_the_cache_does_not_know(new: int) -> None:
    """A bare ``DynamicCache`` keeps all keys of layers that look through a window."""
    model = with_table(gated("mistral_window"))
    model.generation_config.eos_token_id = None
    ids = random_ids(1, 14)
    wanted = plain(model, ids, max_new_tokens=new)
    for generate in (plain, drafted):
        found = generate(model, ids, cache=DynamicCache(), max_new_tokens=new)
        assert torch.equal(found, wanted)


def test_windows_of_fixed_size_that_never_fill() -> None:
    model = with_table(gated("gemma3_text"))
    model.config.sliding_window = 64
    model.generation_config.eos_token_id = None
    ids, mask, _ = padded(3, 9, "left")
    wanted = plain(model, ids, mask)
    for draft in (None, nonsense, "lookup"):
        found = drafted(
            model, ids, mask, cache_implementation="static", draft_policy=draft, draft_tokens=3
        )
        assert torch.equal(found, wanted)


def test_positions_end_where_the_model_does() -> None:
    model = with_table(gated("gpt2"))
    model.generation_config.eos_token_id = None
    ids, mask, _ = padded(3, 240, "left")
    longest: dict[str, Any] = {"max_new_tokens": None, "max_length": 256}
    wanted = plain(model, ids, mask, **longest)
    assert wanted.shape[1] == 256
    assert torch.equal(drafted(model, ids, mask, draft_tokens=6, **longest), wanted)


def test_penalties_with_padding(model: Any) -> None:
    ids, mask, _ = padded(3, 9, "left")
    for options in ({"repetition_penalty": 1.4}, {"encoder_repetition_penalty": 1.3}):
        wanted = plain(model, ids, mask, **options)
        for draft in ("budget", "nonsense"):
            found = drafted(model, ids, mask, draft_policy=DRAFTS[draft], **options)
            assert torch.equal(found, wanted)


def test_a_shorter_limit_of_the_callers(model: Any) -> None:
    from transformers import MaxLengthCriteria

    ids = random_ids(1, 9)
    wanted = plain(model, ids, stopping_criteria=[MaxLengthCriteria(20)], max_new_tokens=NEW)
    found = drafted(model, ids, stopping_criteria=[MaxLengthCriteria(20)], max_new_tokens=NEW)
    assert torch.equal(found, wanted)


def test_what_is_refused(model: Any) -> None:
    ids = random_ids(2, 9)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, cache=cache, use_cache=True)
    longer = torch.cat([ids, random_ids(2, 3)], 1)
    with pytest.raises(UnsupportedError, match="cache= with 2 rows"):
        drafted(model, longer, cache=cache)
    cache.batch_select_indices(torch.tensor([0]))
    with pytest.raises(UnsupportedError, match="give all ids"):
        drafted(model, longer[:1, 9:], torch.ones(1, 12, dtype=torch.long), cache=cache)
    with pytest.raises(UnsupportedError, match="gateskip_budget"):
        drafted(model, ids, target="dense", gateskip_budget={"keep": 0.5})
    with pytest.raises(UnsupportedError, match="negative_prompt_ids"):
        drafted(model, ids, negative_prompt_ids=ids, guidance_scale=1.5)
    with pytest.raises(ConfigError, match="stop_strings"):
        drafted(model, ids, stop_strings="x")
    with pytest.raises(BudgetError, match="2 rows"):
        drafted(model, random_ids(4, 9), target={"keep": [0.5, 1.0]})
    model.generation_config.num_beams = 3
    try:
        with pytest.raises(UnsupportedError, match="num_beams=3"):
            drafted(model, ids, generation_config=GenerationConfig(max_new_tokens=4))
    finally:
        model.generation_config.num_beams = None


def test_moved_rows_give_no_cache_back(model: Any) -> None:
    for rows, given in ((1, True), (3, False)):
        out = drafted(model, random_ids(rows, 9), return_dict_in_generate=True, draft_tokens=3)
        assert (out.cache is not None) == given
        if given:
            assert out.cache.get_seq_length() == out.sequences.shape[1] - 1


def test_stop_strings(model: Any) -> None:
    letters = {chr(n): n for n in range(33, 127)}
    split = Tokenizer(BPE(letters, []))
    split.pre_tokenizer, split.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, pad_token="~")
    ids = random_ids(1, 9)
    stop = next(chr(t) for t in plain(model, ids)[0, 9 + 4 :].tolist() if t in letters.values())
    wanted = plain(model, ids, stop_strings=[stop], tokenizer=tokenizer)
    assert wanted.shape[1] < 9 + NEW
    for draft in ("dense", "budget"):
        found = drafted(model, ids, stop_strings=[stop], tokenizer=tokenizer, draft_tokens=5,
                        draft_policy=DRAFTS[draft])  # fmt: skip
        assert torch.equal(found, wanted)
