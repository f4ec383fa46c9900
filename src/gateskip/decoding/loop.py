"""The one loop of all decoders, run by Hugging Face's ``generate`` (``custom_generate=``).

``generate`` prepares everything as always: its config, cache, logits processors, stopping criteria,
expansion to return sequences. A decoder says what a step costs and which tokens come out of it; the
loop takes them one by one, as plain decoding would, until a row's criteria end it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import StoppingCriteriaList, StopStringCriteria
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from gateskip.decoding.policies import Policy
from gateskip.decoding.sequences import Sequences
from gateskip.decoding.stats import DecodingStats
from gateskip.errors import ConfigError, UnsupportedError
from gateskip.retrofit.attach import inner_model
from gateskip.skipping.state import current, state_of

__all__ = ["Decoder", "Step", "run"]

#: Processors with a state that follows plain decoding, token by token, or row by row.
ONE_BY_ONE = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)
ROW_BY_ROW = (PrefixConstrainedLogitsProcessor, EncoderNoRepeatNGramLogitsProcessor)


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """What came out of a step.

    Attributes:
        tokens: for each row one or more, in order; as many columns of the cache are its own.
        scores, logits: float32 ``[B, T, V]`` that the tokens were chosen by.
    """

    tokens: list[list[int]]
    scores: Tensor
    logits: Tensor


class Decoder(Protocol):
    """One way to decode; made anew for every generation.

    Attributes:
        prompt: policy that the prompt runs with.
    """

    prompt: Policy
    #: Whether rows take their own number of tokens from a step; whether the current budget counts.
    ragged: bool
    budgeted: bool

    def check(self, batch: int) -> None:
        """Raise UnsupportedError for so many rows, before any work."""

    def begin(self, rows: Sequences, logits_BV: Tensor) -> None:
        """Told of the logits after the prompt."""

    def step(self, rows: Sequences) -> Step:
        """Feed tokens, the rows' last ones first, and say what follows them."""

    def end(self, rows: Sequences) -> None:
        """Leave the cache as it is to be gone on with; called where somebody will have it."""


def run(
    model: nn.Module,
    decoder: Decoder,
    inputs: Any,
    stats: DecodingStats,
    name: str,
    given: dict[str, Any],
) -> Any:
    """Decode; returns what ``generate`` returns for the same arguments.

    Args:
        inputs: prompts ``[B, T]``, or what a tokenizer returns. name: the caller's, for errors.
        given: ``generate``'s other arguments.

    Raises:
        ConfigError, UnsupportedError: arguments that no decoder takes.
    """
    inner: Any = inner_model(model)
    if isinstance(inputs, dict) or hasattr(inputs, "keys"):
        given = {**inputs, **given}
        inputs = given.pop("input_ids", None)
    if not isinstance(inputs, Tensor) or inputs.dim() != 2 or inputs.is_floating_point():
        raise ConfigError(
            f"input_ids must be token ids of shape [B, T]; {name} takes no embeddings."
        )
    given = _with_stop_strings(given)
    _check(inner, name, given)
    batch = inputs.shape[0] * int(_setting(inner, given, "num_return_sequences", 1))
    decoder.check(batch)
    cached = any(given.get(key) is not None for key in ("cache", "past_key_values"))
    if decoder.ragged and batch > 1 and cached:
        raise UnsupportedError(
            f"cache= with {batch} rows: {name} moves each row by its own number of tokens, so the "
            "cache could not be gone on with; leave it out, or give one row."
        )
    if given.get("gateskip_budget") is not None and not decoder.budgeted:
        raise UnsupportedError(
            f"gateskip_budget does not go with {name} when it is told what to run with; leave one "
            "of them out."
        )
    streamer = given.get("streamer")
    kept = cached or bool(_setting(inner, given, "return_dict_in_generate", False))

    def loop(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **more: Any,
    ) -> Any:
        return _loop(model, input_ids, decoder, stats, streamer, logits_processor,
                     stopping_criteria, generation_config, more, kept)  # fmt: skip

    return inner.generate(inputs, custom_generate=loop, **given)


def _check(model: Any, name: str, given: dict[str, Any]) -> None:
    """Refuse what the loop would ignore."""
    state = state_of(model)
    if current(state).controller is not None:
        raise UnsupportedError(
            f"hold_budget moves thresholds with every token that is run, and {name} runs some that "
            "are thrown away; leave the block."
        )
    for key, only in (("num_beams", 1), ("use_cache", True), ("output_hidden_states", False),
                      ("output_attentions", False), ("token_healing", False)):  # fmt: skip
        value = _setting(model, given, key, only)
        if value != only:
            raise UnsupportedError(f"{key}={value!r}: {name} takes {key}={only!r} only.")
    for key in ("assistant_model", "custom_generate", "inputs_embeds", "prompt_lookup_num_tokens",
                "negative_prompt_ids", "synced_gpus"):  # fmt: skip
        if given.get(key) is not None and given[key] is not False:
            raise UnsupportedError(f"{key} does not go with {name}; leave it out.")


def _setting(model: Any, given: dict[str, Any], key: str, default: Any) -> Any:
    """What ``generate`` will use: an argument, else the config that was given, else the model's."""
    configs = (given.get("generation_config"), model.generation_config)
    found = (given.get(key), *(getattr(config, key, None) for config in configs))
    return next((value for value in found if value is not None), default)


def _with_stop_strings(given: dict[str, Any]) -> dict[str, Any]:
    """Stop strings as a criterion: ``generate`` keeps the tokenizer from a loop that is not its
    own."""
    strings, tokenizer = given.get("stop_strings"), given.get("tokenizer")
    rest = {key: value for key, value in given.items() if key not in ("stop_strings", "tokenizer")}
    if strings is None:
        return rest
    if tokenizer is None:
        raise ConfigError(f"stop_strings={strings!r} needs tokenizer=.")
    mine = StopStringCriteria(tokenizer, strings)
    criteria = StoppingCriteriaList([*(given.get("stopping_criteria") or ()), mine])
    return rest | {"stopping_criteria": criteria}


def _loop(
    model: Any,
    input_ids: Tensor,
    decoder: Decoder,
    stats: DecodingStats,
    streamer: Any,
    processors: Any,
    criteria: Any,
    config: Any,
    more: dict[str, Any],
    cache_is_kept: bool,
) -> Any:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UnsupportedError(
            f"{mode.value} does not go with this decoder; it is greedy or samples."
        )
    longest = criteria.max_length or config.max_length
    rows = _sequences(model, input_ids, processors, config, more, int(longest))
    wants = bool(config.return_dict_in_generate)
    kept = _Kept(rows.batch, wants and config.output_scores, wants and config.output_logits)
    logits = rows.prefill(decoder.prompt, getattr(config, "prefill_chunk_size", None))
    try:
        scores = rows.scores(logits)
        decoder.begin(rows, logits[:, -1])
        first = [[int(token)] for token in rows.choose(scores)[:, 0]]
        _take(rows, Step(first, scores, logits), criteria, streamer, kept)
        while not all(rows.done):
            before = stats.new_tokens
            step = decoder.step(rows)
            stats.passes += 1
            counts = _take(rows, step, criteria, streamer, kept)
            stats.new_tokens = before + sum(counts)
            most = max(counts)  # of rows that go on; the others' columns do not matter
            rows.commit([n or most for n in counts])
        if cache_is_kept and not rows.moved:
            decoder.end(rows)
    finally:
        rows.end()
        if streamer is not None:
            streamer.end()
    out = rows.ids[:, : max(rows.lengths)]
    if not wants:
        return out
    fields = {f.name for f in dataclasses.fields(GenerateDecoderOnlyOutput)}
    cache = "cache" if "cache" in fields else "past_key_values"
    made: Any = GenerateDecoderOnlyOutput
    mine = None if rows.moved else rows.cache  # rows that were moved do not go on as plain ones
    return made(sequences=out, **kept.found(), **{cache: mine})


def _sequences(
    model: Any,
    input_ids: Tensor,
    processors: Any,
    config: Any,
    more: dict[str, Any],
    longest: int,
) -> Sequences:
    cache = more.pop("cache", None)
    if cache is None:
        cache = more.pop("past_key_values", None)
    if cache is None:
        raise UnsupportedError("use_cache=False leaves nothing to decode with; leave it out.")
    mask, position_ids = more.pop("attention_mask", None), more.pop("position_ids", None)
    whole = getattr(config, "_mask_length", None) if mask is None else mask.shape[1]
    if whole is not None and whole != input_ids.shape[1]:
        raise UnsupportedError(
            f"attention_mask covers {whole} tokens and input_ids {input_ids.shape[1]}; give all "
            "ids, those in the cache included."
        )
    for known in ("use_cache", "logits_to_keep"):
        more.pop(known, None)
    unknown = sorted(key for key, value in more.items() if value is not None)
    if unknown:
        raise UnsupportedError(f"{', '.join(unknown)}: no decoder passes this on to the model.")
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    for each in processors:
        if isinstance(each, ONE_BY_ONE) or (
            isinstance(each, ROW_BY_ROW) and input_ids.shape[0] > 1
        ):
            raise UnsupportedError(
                f"{type(each).__name__} follows the order of plain decoding, row by row and token "
                "by token; leave it out, or give one row."
            )
    pad = getattr(config, "_pad_token_tensor", None)
    return Sequences(
        model, input_ids, mask, position_ids, room=longest, cache=cache,
        processors=processors, sample=bool(config.do_sample), pad=0 if pad is None else int(pad),
    )  # fmt: skip


def _take(rows: Sequences, step: Step, criteria: Any, streamer: Any, kept: _Kept) -> list[int]:
    """Append what a step found, until a row's criteria end it; tokens taken of each row."""
    counts = [0] * rows.batch
    for row, tokens in enumerate(step.tokens):
        for at, token in enumerate(tokens):
            if rows.done[row]:
                break
            rows.ids[row, rows.lengths[row]] = token
            rows.lengths[row] += 1
            counts[row] += 1
            kept.add(row, step, at)
            if streamer is not None:
                streamer.put(torch.tensor([token]))
            rows.done[row] = _ended(criteria, rows.row(row))
    return counts


def _ended(criteria: StoppingCriteriaList, ids: Tensor) -> bool:
    return bool(criteria(ids, None).all())


class _Kept:
    """Scores and logits of the taken tokens, where they are to be returned."""

    def __init__(self, batch: int, scores: bool, logits: bool) -> None:
        self.wanted = {"scores": bool(scores), "logits": bool(logits)}
        self.rows: dict[str, list[list[Tensor]]] = {
            name: [[] for _ in range(batch)] for name, wanted in self.wanted.items() if wanted
        }

    def add(self, row: int, step: Step, at: int) -> None:
        for name, rows in self.rows.items():
            rows[row].append(getattr(step, name)[row, at].clone())

    def found(self) -> dict[str, Any]:
        """One ``[B, V]`` per new token; zeros where a row had ended before."""
        out = {}
        for name, rows in self.rows.items():
            nothing = torch.zeros_like(rows[0][0])
            longest = max(map(len, rows))
            out[name] = tuple(
                torch.stack([row[at] if at < len(row) else nothing for row in rows])
                for at in range(longest)
            )
        return out
