"""Budgets that vary within a generation: by position, by entropy, by a function.

Shapes: B rows, L tokens of a row so far.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from gateskip.config import Budget
from gateskip.decoding.entropy import normalised_entropy
from gateskip.decoding.loop import Step, run
from gateskip.decoding.policies import AtBudget, Current, Policy, as_policy, check_policy
from gateskip.decoding.sequences import Sequences
from gateskip.decoding.stats import DecodingStats
from gateskip.errors import ConfigError

__all__ = ["Moment", "Schedule", "by_entropy", "by_position", "generate_scheduled"]


@dataclasses.dataclass(frozen=True, slots=True)
class Moment:
    """What a schedule knows when a token is to be decoded: the past alone, so it is causal.

    Attributes:
        new_tokens: decoded so far; 1 at the first call of the model after the prompt's.
        ids: int64 ``[B, L]``, prompt included. entropy: of the distribution that the last token
            came from, normalised to [0, 1], float32 ``[B]``.
    """

    new_tokens: int
    ids: Tensor
    entropy: Tensor


Schedule = Callable[[Moment], Any]


def by_position(*parts: tuple[int | None, float]) -> Schedule:
    """Shares kept by place in the answer: ``by_position((32, 1.0), (None, 0.5))`` keeps everything
    for the first 32 new tokens, then half.

    Args:
        parts: (new tokens up to which, share kept), in rising order; None: to the end.

    Raises:
        ConfigError: parts that do not rise or do not end with None. BudgetError: a share.
    """
    ends = [end for end, _ in parts]
    if not parts or ends[-1] is not None:
        raise ConfigError(f"by_position{parts!r}: the last part must be (None, share).")
    rising = [0, *ends[:-1]]
    if any(b is None or a is None or b <= a for a, b in itertools.pairwise(rising)):
        raise ConfigError(f"by_position{parts!r}: positions must rise.")
    budgets = [Budget(keep=share) for _, share in parts]

    def schedule(moment: Moment) -> Budget:
        for end, budget in zip(ends, budgets, strict=True):
            if end is None or moment.new_tokens <= end:
                return budget
        raise AssertionError

    return schedule


def by_entropy(threshold: float, *, low: float, high: float) -> Schedule:
    """``high`` where the last token's normalised entropy was above ``threshold``, else ``low``.

    Args:
        threshold: in [0, 1]. low, high: shares kept.

    Raises:
        ConfigError: threshold. BudgetError: a share.
    """
    if not 0.0 <= threshold <= 1.0:
        raise ConfigError(f"threshold={threshold!r} must be between 0 and 1.")
    Budget(keep=low), Budget(keep=high)

    def schedule(moment: Moment) -> dict[str, Any]:
        unsure = (moment.entropy > threshold).tolist()
        return {"keep": [high if u else low for u in unsure]}

    return schedule


def generate_scheduled(
    model: nn.Module,
    input_ids: Any,
    *,
    schedule: Schedule,
    prompt: Any = None,
    stats: DecodingStats | None = None,
    **generate_kwargs: Any,
) -> Any:
    """``model.generate`` with a budget for every token.

    Args:
        input_ids: prompts ``[B, T]``, padded at the left with an ``attention_mask``, or what a
            tokenizer returns.
        schedule: from a :class:`Moment` to a share kept, a budget (of every row, or a list of one
            for each), a policy, or None, the model's current budget. :func:`by_position`,
            :func:`by_entropy`, or your own.
        prompt: what the prompt runs with; None: the current budget.
        stats: counts are added to it.
        generate_kwargs: any of ``generate``'s, beams and assistants apart.

    Returns:
        What ``generate`` returns.

    Raises:
        ConfigError, BudgetError: a schedule that is not callable, or what it returns.
    """
    if not callable(schedule):
        raise ConfigError(
            f"schedule={schedule!r} must be a function, such as "
            "by_position((32, 1.0), (None, 0.5))."
        )
    first = as_policy("prompt", prompt)
    check_policy("prompt", first, model)
    counts = stats or DecodingStats()
    decoder = Scheduled(schedule, first)
    return run(model, decoder, input_ids, counts, "generate_scheduled", generate_kwargs)


class Scheduled:
    """One token a step, at a budget of its own."""

    ragged, budgeted = False, True

    def __init__(self, schedule: Schedule, prompt: Policy) -> None:
        self.schedule, self.prompt = schedule, prompt
        self.first, self.entropy = 0, Tensor()

    def check(self, batch: int) -> None:
        """Any number of rows."""

    def begin(self, rows: Sequences, logits_BV: Tensor) -> None:
        """Remember how sure the prompt's model was."""
        self.first, self.entropy = rows.lengths[0], normalised_entropy(logits_BV)

    def end(self, rows: Sequences) -> None:
        """Nothing is left to do."""

    def step(self, rows: Sequences) -> Step:
        """Ask, decode."""
        length = max(rows.lengths)
        moment = Moment(length - self.first, rows.ids[:, :length], self.entropy)
        policy = _asked(self.schedule(moment), rows)
        logits = rows.forward(rows.last_B1, policy)
        self.entropy = normalised_entropy(logits[:, -1])
        scores = rows.scores(logits)
        return Step([[int(t)] for t in rows.choose(scores)[:, 0]], scores, logits)


def _asked(value: Any, rows: Sequences) -> Policy:
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = {"keep": list(value)}
    policy = as_policy("schedule", value)
    if isinstance(policy, AtBudget | Current):
        if (
            isinstance(policy, AtBudget)
            and rows.batch == 1
            and not isinstance(policy.budget, Budget)
        ):
            policy = AtBudget(policy.budget.rows[0])  # remembered thresholds are plain numbers
        return policy
    check_policy("schedule", policy, rows.model)
    return policy
