"""Find the draft that is fastest on a machine, if any is faster than plain decoding."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from gateskip.data import Sample, encode
from gateskip.decoding.drafts import as_drafter
from gateskip.decoding.length import length_of
from gateskip.decoding.speculative import generate_speculative
from gateskip.decoding.stats import DecodingStats
from gateskip.errors import ConfigError, DataError
from gateskip.execution.api import trace
from gateskip.retrofit.attach import inner_model
from gateskip.retrofit.devices import device_of
from gateskip.skipping.ledger import Ledger
from gateskip.skipping.state import state_of

__all__ = ["TriedDraft", "TunedDraft", "tune_draft"]


@dataclasses.dataclass(frozen=True, slots=True)
class TriedDraft:
    """One setting, and what it gave.

    Attributes:
        settings: arguments of ``generate_speculative``; empty: plain decoding. In JSON what is
            neither a number nor a word is told by its ``repr``.
        seconds_per_token: of decoding, the prompt's pass and the token after it apart; median over
            repeats. speedup: plain over this.
        acceptance, tokens_per_pass: of the drafts. macs: decoder MACs over plain decoding's,
            likewise.
        same: share of prompts whose tokens are plain decoding's.
    """

    settings: dict[str, Any]
    seconds_per_token: float
    speedup: float
    acceptance: float
    tokens_per_pass: float
    macs: float
    same: float


@dataclasses.dataclass(frozen=True, slots=True)
class TunedDraft:
    """All that was tried; ``best`` is None where nothing beats plain decoding."""

    tried: tuple[TriedDraft, ...]

    @property
    def best(self) -> TriedDraft | None:
        """The fastest setting that beats plain decoding."""
        found = max(self.tried, key=lambda t: t.speedup)
        return found if found.settings else None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        best = self.best
        return {
            "best": None if best is None else _told(best.settings),
            "tried": [
                {f.name: getattr(t, f.name) for f in dataclasses.fields(t)}
                | {"settings": _told(t.settings)}
                for t in self.tried
            ],
        }


def _told(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: v if isinstance(v, int | float | str) else repr(v) for k, v in settings.items()}


def tune_draft(
    model: nn.Module,
    prompts: Any,
    tokenizer: Any = None,
    *,
    draft_keep: Sequence[float] = (0.3, 0.5),
    draft_tokens: Sequence[int | str] = (2, 4, "auto"),
    draft_policies: Sequence[Any] = ("lookup",),
    new_tokens: int = 64,
    max_prompts: int = 8,
    repeats: int = 3,
) -> TunedDraft:
    """Time greedy decoding with each draft beside plain decoding, one prompt at a time.

    Args:
        prompts: texts, a dataset, or id tensors, as for ``calibrate``; of a row with an answer what
            comes before that.
        draft_keep, draft_policies, draft_tokens: every share and policy is tried with every length.
        new_tokens: of each prompt. max_prompts: the first of them. repeats: alternated rounds.

    Raises:
        ConfigError: nothing to try. DataError: no prompts.
    """
    tries: list[dict[str, Any]] = [
        {"draft_keep": keep, "draft_tokens": tokens}
        for keep in draft_keep
        for tokens in draft_tokens
    ]
    tries += [
        {"draft_policy": policy, "draft_tokens": tokens}
        for policy in draft_policies
        for tokens in draft_tokens
    ]
    if not tries or new_tokens < 2 or repeats < 1 or max_prompts < 1:
        raise ConfigError(
            "nothing to try: give draft_keep or draft_policies, draft_tokens, new_tokens of at "
            "least 2, and at least one prompt and repeat."
        )
    for each in tries:
        length_of(each["draft_tokens"])
        as_drafter(each.get("draft_policy"), each.get("draft_keep", 0.5), model)
    ids = [_prompt(sample) for sample in encode(prompts, tokenizer, 2048)][:max_prompts]
    if not ids:
        raise DataError("prompts are empty; give at least one.")
    inner: Any = inner_model(model)
    state_of(inner)
    arms: list[dict[str, Any]] = [{}, *tries]
    seconds: list[list[float]] = [[] for _ in arms]
    outputs: list[list[Tensor]] = [[] for _ in arms]
    stats = [DecodingStats() for _ in arms]
    macs = [0.0] * len(arms)
    for at, settings in enumerate(arms):  # not timed: kernels compile, and the ledger is kept
        for row in ids:
            with trace(inner) as traced:
                outputs[at].append(_decoded(inner, row, settings, new_tokens, stats[at])[0])
            macs[at] += Ledger.of(traced.calls[1:]).macs_spent
    for _ in range(repeats):
        for at, settings in enumerate(arms):
            made = [_decoded(inner, row, settings, new_tokens, DecodingStats()) for row in ids]
            count = sum(out.shape[1] - 1 for out, _ in made)
            seconds[at].append(sum(spent for _, spent in made) / max(count, 1))
    medians = [statistics.median(each) for each in seconds]
    return TunedDraft(tuple(
        TriedDraft(
            settings, medians[at], medians[0] / medians[at], stats[at].acceptance,
            stats[at].tokens_per_pass if settings else 1.0, macs[at] / macs[0],
            statistics.mean(float(torch.equal(a, b))
                            for a, b in zip(outputs[at], outputs[0], strict=True)),
        )
        for at, settings in enumerate(arms)
    ))  # fmt: skip


def _prompt(sample: Sample) -> Tensor:
    first = int(sample.scored.to(torch.uint8).argmax())
    return sample.ids[:first] if first > 1 else sample.ids


class _FirstToken(BaseStreamer):  # type: ignore[misc]
    """When the first new token came."""

    def __init__(self) -> None:
        self.seen, self.at = 0, 0.0

    def put(self, value: Any) -> None:
        self.seen += 1
        if self.seen == 2:  # after the prompt
            self.at = time.perf_counter()

    def end(self) -> None:
        """Nothing to do."""


def _decoded(
    model: Any, ids: Tensor, settings: dict[str, Any], new: int, stats: DecodingStats
) -> tuple[Tensor, float]:
    """(new tokens of a prompt, seconds from the first of them on)."""
    row, first = ids.reshape(1, -1).to(device_of(model)), _FirstToken()
    common: dict[str, Any] = {
        "attention_mask": torch.ones_like(row), "max_new_tokens": new, "do_sample": False,
        "streamer": first,
    }  # fmt: skip
    if settings:
        out = generate_speculative(model, row, stats=stats, **settings, **common)
    else:
        out = model.generate(row, **common)
    if out.is_cuda:
        torch.cuda.synchronize(out.device)
    return out[:, row.shape[1] :], time.perf_counter() - first.at
