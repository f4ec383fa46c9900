"""Synchronised parallel decoding: FREE (arXiv 2310.05424), section 4.2.

A token whose successor is certain after the shallow layers stops there and waits. The next one that
is not certain runs through all layers, and those that wait with it, in one pass: so deep layers see
exact keys and values, where copied states (CALM, FREE's own comparison) are an approximation.
Nothing checks the tokens that came out of the shallow layers; ``generate_speculative`` with
``ExitLayer`` does.

Ours versus the paper: the joint pass runs shallow layers again, of the token that is not certain as
well, since states are not kept; and the threshold is given, not estimated while decoding.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gateskip.decoding.loop import Step, run
from gateskip.decoding.policies import ExitLayer, Policy, as_policy, check_policy
from gateskip.decoding.sequences import Sequences
from gateskip.decoding.stats import DecodingStats
from gateskip.errors import ConfigError, UnsupportedError
from gateskip.skipping.score import softmax_gap

__all__ = ["generate_synchronised"]


def generate_synchronised(
    model: nn.Module,
    input_ids: Any,
    *,
    threshold: float,
    layers: int,
    full: Any = 1.0,
    most_waiting: int = 16,
    stats: DecodingStats | None = None,
    **generate_kwargs: Any,
) -> Any:
    """``model.generate`` that leaves after the first layers where it is certain.

    Args:
        input_ids: prompts ``[B, T]``, padded at the left with an ``attention_mask``, or what a
            tokenizer returns.
        threshold: gap between the probabilities of the two most likely next tokens from which on a
            token leaves; above 1 none does, from 0 down all do.
        layers: that every token runs through.
        full: policy of the prompt and of what does not leave: a share kept, a budget, or
            ``"dense"``. At 1.0 rows do not depend on each other; elsewhere the shallow layers of
            those that waited are computed in another way the second time, and when that is depends
            on who is beside them.
        most_waiting: tokens that may wait for their deep layers.
        stats: counts are added to it.
        generate_kwargs: any of ``generate``'s, beams and assistants apart.

    Returns:
        What ``generate`` returns; where the cache is yours or returned, its last tokens have run
        through all layers, too.

    Raises:
        ConfigError, BudgetError: options out of range. UnsupportedError: caches of sliding windows,
            which forget what waits.
    """
    if not isinstance(threshold, int | float) or isinstance(threshold, bool):
        raise ConfigError(f"threshold={threshold!r} must be a number, usually between 0 and 1.")
    if not isinstance(most_waiting, int) or isinstance(most_waiting, bool) or most_waiting < 1:
        raise ConfigError(f"most_waiting={most_waiting!r} must be a whole number of at least 1.")
    shallow, whole = ExitLayer(layers), as_policy("full", full)
    check_policy("layers", shallow, model)
    check_policy("full", whole, model)
    counts = stats or DecodingStats()
    decoder = Synchronised(shallow, whole, float(threshold), most_waiting, counts)
    return run(model, decoder, input_ids, counts, "generate_synchronised", generate_kwargs)


class Synchronised:
    """Leave, or run for all that wait."""

    ragged = budgeted = False

    def __init__(
        self,
        shallow: Policy,
        full: Policy,
        threshold: float,
        most_waiting: int,
        stats: DecodingStats,
    ) -> None:
        self.shallow, self.prompt, self.threshold = shallow, full, threshold
        self.most_waiting, self.stats = most_waiting, stats
        self.waiting = 0  # tokens at the cache's end whose deep keys and values are not exact

    def check(self, batch: int) -> None:
        """Any number of rows."""

    def begin(self, rows: Sequences, logits_BV: Tensor) -> None:
        """Refuse windows before anything waits."""
        if rows.has_windows:
            raise UnsupportedError(
                "caches of sliding windows forget tokens that wait for their deep layers; use "
                "generate_speculative with draft_policy=ExitLayer(...)."
            )

    def step(self, rows: Sequences) -> Step:
        """A token of every row: from the shallow layers where it is certain.

        A row that is certain keeps its token where another row is not: so what it says does not
        depend on who is beside it.
        """
        shallow = rows.forward(rows.last_B1, self.shallow)
        self.stats.draft_calls += 1
        certain_B = softmax_gap(shallow[:, -1]) >= self.threshold
        over_B = torch.tensor(rows.done, device=certain_B.device)
        logits = shallow
        if bool((certain_B | over_B).all()) and self.waiting < self.most_waiting:
            self.waiting += 1
        else:
            deep = self._deep(rows)
            logits = torch.where(certain_B[:, None, None], shallow, deep)
        self.stats.exits += int((certain_B & ~over_B).sum())
        scores = rows.scores(logits)
        return Step([[int(t)] for t in rows.choose(scores)[:, 0]], scores, logits)

    def end(self, rows: Sequences) -> None:
        """Deep layers of those that still wait."""
        count = self.waiting
        if count:
            self.waiting = 0
            rows.rewind(count)
            self.stats.refreshed += count
            rows.forward(rows.last_tokens(count + 1)[:, :-1], self.prompt)

    def _deep(self, rows: Sequences) -> Tensor:
        """Logits of the rows' last tokens, run with those that wait."""
        count = self.waiting
        self.waiting = 0
        rows.rewind(count + 1)
        self.stats.refreshed += count
        return rows.forward(rows.last_tokens(count + 1), self.prompt)[:, -1:]
