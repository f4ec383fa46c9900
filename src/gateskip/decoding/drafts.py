"""Where drafted tokens come from: the model under a cheaper policy, the text so far, a function.

Shapes: B rows, K drafted tokens, V vocabulary, L tokens of a row.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from gateskip.data import Sample, encode
from gateskip.decoding.policies import Policy, as_policy, check_policy
from gateskip.decoding.sequences import Sequences, draw
from gateskip.decoding.stats import DecodingStats
from gateskip.errors import ConfigError

__all__ = [
    "Draft",
    "Drafter",
    "FunctionDraft",
    "LookupDraft",
    "NgramStore",
    "PolicyDraft",
    "as_drafter",
]

MEMORY = 0.98  # of how often matches were right, for each drafted token
STORED = 2  # tokens that a store's matches have at least: after one, other texts say little


@dataclasses.dataclass(frozen=True, slots=True)
class Draft:
    """What is to be checked.

    Attributes:
        tokens: int64 ``[B, K]``. counts: how many of each row's are drafted; the rest fills up.
        q: distributions that they were drawn from, ``[B, K, V]``; None: chosen, not drawn.
    """

    tokens: Tensor
    counts: list[int]
    q: Tensor | None = None


class Drafter(Protocol):
    """A source of drafts."""

    def propose(self, rows: Sequences, count: int, stats: DecodingStats, least: float) -> Draft:
        """At most ``count`` tokens for every row; the cache is left as it was.

        Args:
            least: chance of being taken below which a token is not worth its check; 0: all are.
        """

    def told(self, rows: Sequences, accepted: list[int]) -> None:
        """How many of each row's last drafted tokens were right."""

    def cost(self, rows: Sequences) -> float:
        """MACs of one drafted token, as a share of a plain token's, LM head included."""


class PolicyDraft:
    """The model itself, run with less. Its keys and values are taken out of the cache again."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def propose(self, rows: Sequences, count: int, stats: DecodingStats, least: float) -> Draft:
        last = rows.last_B1
        tokens: list[Tensor] = []
        q: list[Tensor] = []
        for _ in range(count):
            logits = rows.forward(last, self.policy)
            drafted = torch.cat(tokens, 1) if tokens else None
            scores = _later(rows, logits, drafted)
            if rows.sample:
                q.append(scores.softmax(-1))
                last = draw(q[-1])
            else:
                last = scores.argmax(-1)
            tokens.append(last)
        rows.rewind(count)
        stats.draft_calls += count
        return Draft(torch.cat(tokens, 1), [count] * rows.batch, torch.cat(q, 1) if q else None)

    def told(self, rows: Sequences, accepted: list[int]) -> None:
        """Does not matter."""

    def cost(self, rows: Sequences) -> float:
        shape = rows.state.shape
        decoder = sum(cost.computed for cost in rows.state.costs().values())
        head = shape.macs_lm_head
        return (self.policy.share(rows.state) * decoder + head) / (decoder + head)


def _later(rows: Sequences, logits_B1V: Tensor, drafted_BK: Tensor | None) -> Tensor:
    """Scores of the token after the drafted ones, ``[B, 1, V]``."""
    if drafted_BK is None or not rows.processors:
        return rows.scores(logits_B1V)
    out = torch.empty_like(logits_B1V)
    for row in range(rows.batch):
        seen = torch.cat([rows.row(row), drafted_BK[row : row + 1]], 1)
        out[row] = rows.of_row(row)(seen, logits_B1V[row].clone())
    return out


class LookupDraft:
    """What followed the last words when they came before (prompt lookup): no call of the model.

    With a store, other texts are looked up as well (REST, arXiv 2311.08252): answers of the same
    kind that the model gave earlier are the best of them. The longest match counts, the row's own
    text first. How often matches of each length were right is remembered.

    Args:
        longest, shortest: tokens that are looked for. store: of other texts.
    """

    def __init__(
        self, longest: int = 4, shortest: int = 1, store: NgramStore | None = None
    ) -> None:
        if not 1 <= shortest <= longest:
            raise ConfigError(f"shortest={shortest!r} must be at least 1 and at most {longest!r}.")
        self.longest, self.shortest, self.store = longest, shortest, store
        self._known: weakref.WeakKeyDictionary[Sequences, list[_RowIndex]]
        self._known = weakref.WeakKeyDictionary()
        #: (right, tried) by length of the match; before anything is seen, longer ones are better.
        self.rates = {n: (n / (n + 2), 1.0) for n in range(shortest, longest + 1)}

    @classmethod
    def of(cls, data: Any, tokenizer: Any = None, **options: Any) -> Self:
        """With a store of texts, rows or id tensors, as ``calibrate`` takes them."""
        found = cls(**options)
        found.store = NgramStore(encode(data, tokenizer, 1 << 30), found.longest)
        return found

    def propose(self, rows: Sequences, count: int, stats: DecodingStats, least: float) -> Draft:
        if rows not in self._known:
            self._known[rows] = [_RowIndex(self.longest, self.shortest) for _ in range(rows.batch)]
        found = []
        for row, index in enumerate(self._known[rows]):
            index.extend(rows.row(row)[0, len(index.ids) :].tolist())
            pairs = [] if rows.done[row] else self.follow(index, count, least)
            found.append([token for token, _ in pairs])
            index.matches = [n for _, n in pairs]
        return _filled(found, rows)

    def told(self, rows: Sequences, accepted: list[int]) -> None:
        """Count by length of the match; tokens after the first wrong one say nothing."""
        for index, right in zip(self._known[rows], accepted, strict=True):
            self.count(index.matches, right)

    def count(self, matches: list[int], right: int) -> None:
        """Note that the first ``right`` of drafted tokens were right, by their matches' lengths."""
        for at, n in enumerate(matches[: right + 1]):
            a, b = self.rates[n]
            self.rates[n] = MEMORY * a + (at < right), MEMORY * b + 1.0

    def follow(self, index: _RowIndex, count: int, least: float = 0.0) -> list[tuple[int, int]]:
        """(token, length of its match) after a row's last ones, looked up with those before it."""
        ids, chance = index.ids[-self.longest :], 1.0
        found: list[tuple[int, int]] = []
        while len(found) < count:
            pair = self._next(index, ids)
            if pair is None:
                break
            right, tried = self.rates[pair[1]]
            chance *= right / tried
            if chance < least:
                break
            found.append(pair)
            ids = [*ids, pair[0]][-self.longest :]
        return found

    def _next(self, index: _RowIndex, ids: list[int]) -> tuple[int, int] | None:
        for n in range(min(self.longest, len(ids)), self.shortest - 1, -1):
            key = tuple(ids[-n:])
            token = index.after.get(key)
            if token is None and self.store is not None and n >= STORED:
                token = self.store.after.get(key)
            if token is not None:
                return token, n
        return None

    def cost(self, rows: Sequences) -> float:
        return 0.0

    def __repr__(self) -> str:
        stored = "" if self.store is None else f", store of {len(self.store.after)}"
        return f"LookupDraft({self.longest}, {self.shortest}{stored})"


class _RowIndex:
    """What followed every few tokens of a row the last time."""

    def __init__(self, longest: int, shortest: int) -> None:
        self.longest, self.shortest = longest, shortest
        self.ids: list[int] = []
        self.matches: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}

    def extend(self, more: list[int]) -> None:
        for token in more:
            for n in range(self.shortest, min(self.longest, len(self.ids)) + 1):
                self.after[tuple(self.ids[-n:])] = token
            self.ids.append(token)


class NgramStore:
    """What most often follows two to ``longest`` tokens in texts."""

    def __init__(self, samples: Sequence[Sample], longest: int) -> None:
        counts: dict[tuple[int, ...], Counter[int]] = {}
        for sample in samples:
            ids = sample.ids.tolist()
            for at in range(STORED, len(ids)):
                for n in range(STORED, min(longest, at) + 1):
                    counts.setdefault(tuple(ids[at - n : at]), Counter())[ids[at]] += 1
        self.after = {key: each.most_common(1)[0][0] for key, each in counts.items()}


class FunctionDraft:
    """A user's function: ids of a row ``[L]`` and a count to at most that many token ids."""

    def __init__(self, function: Callable[[Tensor, int], Sequence[int]]) -> None:
        self.function = function

    def told(self, rows: Sequences, accepted: list[int]) -> None:
        """Does not matter."""

    def propose(self, rows: Sequences, count: int, stats: DecodingStats, least: float) -> Draft:
        size = rows.model.get_input_embeddings().weight.shape[0]
        found = []
        for row in range(rows.batch):
            tokens = [int(t) for t in self.function(rows.row(row)[0], count)][:count]
            wrong = [t for t in tokens if not 0 <= t < size]
            if wrong:
                raise ConfigError(
                    f"draft_policy returned token {wrong[0]}, and the vocabulary has {size}."
                )
            found.append(tokens)
        return _filled(found, rows)

    def cost(self, rows: Sequences) -> float:
        return 0.0


def _filled(found: list[list[int]], rows: Sequences) -> Draft:
    counts = [0 if end else len(each) for each, end in zip(found, rows.done, strict=True)]
    most = max(counts, default=0)
    tokens = torch.zeros(rows.batch, most, dtype=torch.int64, device=rows.ids.device)
    for row, (each, count) in enumerate(zip(found, counts, strict=True)):
        tokens[row, :count] = torch.tensor(each[:count], dtype=torch.int64)
    return Draft(tokens, counts)


def as_drafter(value: Any, keep: float, model: nn.Module) -> Drafter:
    """A drafter from what users give. Raises ConfigError and BudgetError."""
    if isinstance(value, str) and value == "lookup":
        return LookupDraft()
    if hasattr(value, "propose"):
        found: Drafter = value
        return found
    if callable(value):
        return FunctionDraft(value)
    name = "draft_keep" if value is None else "draft_policy"
    policy = as_policy(name, keep if value is None else value)
    check_policy(name, policy, model)
    return PolicyDraft(policy)
