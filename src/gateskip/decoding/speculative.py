"""Speculative decoding with one set of weights (arXiv 2211.17192), lossless.

A cheap policy drafts, one pass of the target policy over the drafted tokens checks them. The
longest run that agrees is taken: for chosen tokens what the target would have chosen, for drawn
ones with probability min(1, p/q) each, and where one is refused the next is drawn from what p has
more than q (its algorithm 1). The check computes the keys and values of all taken tokens anew, so
the cache is the target's.

Shapes: B rows, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gateskip.decoding.drafts import Draft, Drafter, as_drafter
from gateskip.decoding.length import DraftLength, length_of
from gateskip.decoding.loop import Step, run
from gateskip.decoding.policies import Current, Policy, as_policy, check_policy
from gateskip.decoding.sequences import Sequences, draw
from gateskip.decoding.stats import DecodingStats

__all__ = ["generate_speculative"]


def generate_speculative(
    model: nn.Module,
    input_ids: Any,
    *,
    draft_keep: float = 0.5,
    draft_tokens: int | str = 4,
    draft_policy: Any = None,
    target: Any = None,
    stats: DecodingStats | None = None,
    **generate_kwargs: Any,
) -> Any:
    """``model.generate``, with several tokens a pass where a cheap draft is right.

    Greedy decoding gives plain decoding's tokens; sampling gives its distribution.

    Args:
        input_ids: prompts ``[B, T]``, padded at the left with an ``attention_mask``, or what a
            tokenizer returns.
        draft_keep: share of token×branch pairs that drafting keeps.
        draft_tokens: drafted before each check, or ``"auto"``: as many as pay at the rate at which
            they were right so far.
        draft_policy: another draft: a budget (``{"compute": 0.4}``), ``"lookup"`` (what followed
            the last words when they came before; costs nothing), a policy of
            :mod:`gateskip.decoding`, or a function of a row's ids ``[L]`` and a count.
        target: what the tokens are to be those of: None, the model's current budget; a share kept,
            a budget, or ``"dense"``, the original model.
        stats: counts are added to it.
        generate_kwargs: any of ``generate``'s, beams and assistants apart.

    Returns:
        What ``generate`` returns: ids ``[B, T + new]``, or its output object. Scores after a row's
        end are zeros.

    Raises:
        ConfigError, BudgetError: options out of range, or a policy that the model cannot run.
        UnsupportedError: arguments of ``generate`` that do not go with it, caches that cannot give
            tokens back.
    """
    aim = as_policy("target", target)
    check_policy("target", aim, model)
    drafter = as_drafter(draft_policy, draft_keep, model)
    counts = stats or DecodingStats()
    decoder = Speculative(drafter, aim, length_of(draft_tokens), counts)
    return run(model, decoder, input_ids, counts, "generate_speculative", generate_kwargs)


class Speculative:
    """Draft, check, accept."""

    ragged = True

    def __init__(
        self, drafter: Drafter, target: Policy, length: DraftLength, stats: DecodingStats
    ) -> None:
        self.drafter, self.prompt, self.length, self.stats = drafter, target, length, stats
        self.budgeted = isinstance(target, Current)

    def check(self, batch: int) -> None:
        """Any number of rows."""

    def begin(self, rows: Sequences, logits_BV: Tensor) -> None:
        """Nothing to know."""

    def end(self, rows: Sequences) -> None:
        """Nothing is left to do."""

    def step(self, rows: Sequences) -> Step:
        """One draft and its check."""
        wanted = self.length.wanted(self.drafter.cost(rows))
        count = max(0, min(wanted, rows.remaining() - 1))
        if count:
            draft = self.drafter.propose(rows, count, self.stats, self.length.least)
        else:
            draft = _nothing(rows)
        fed = torch.cat([rows.last_B1, draft.tokens], 1)
        logits = rows.forward(fed, self.prompt)
        scores = rows.scores(logits, draft.tokens)
        tokens, accepted = _drawn(scores, draft) if rows.sample else _chosen(scores, draft)
        if count:
            self.drafter.told(rows, accepted)
        for row, end in enumerate(rows.done):
            if not end:
                self.stats.drafted += draft.counts[row]
                self.stats.accepted += accepted[row]
                self.length.seen(accepted[row], draft.counts[row])
        return Step(tokens, scores, logits)


def _nothing(rows: Sequences) -> Draft:
    return Draft(rows.ids[:, :0], [0] * rows.batch)


def _chosen(scores_BTV: Tensor, draft: Draft) -> tuple[list[list[int]], list[int]]:
    """The target's own choices, as far as they are those of the draft, and the next one."""
    best_BT = scores_BTV.argmax(-1)
    right_BK = (best_BT[:, :-1] == draft.tokens).tolist()
    tokens, accepted = [], []
    for row, choices in enumerate(best_BT.tolist()):
        n = 0
        while n < draft.counts[row] and right_BK[row][n]:
            n += 1
        tokens.append(choices[: n + 1])
        accepted.append(n)
    return tokens, accepted


def _drawn(scores_BTV: Tensor, draft: Draft) -> tuple[list[list[int]], list[int]]:
    """Accept with probability min(1, p/q); the first that is refused comes from (p − q)₊."""
    p_BTV = scores_BTV.softmax(-1)
    batch, most = draft.tokens.shape
    count_B = torch.tensor(draft.counts, device=p_BTV.device)
    p_BK = p_BTV[:, :most].gather(2, draft.tokens[..., None])[..., 0]
    q_BK = torch.ones_like(p_BK)
    if draft.q is not None:
        q_BK = draft.q.gather(2, draft.tokens[..., None])[..., 0]
    right_BK = torch.rand(batch, most, device=p_BTV.device) * q_BK < p_BK
    right_BK &= torch.arange(most, device=p_BTV.device) < count_B[:, None]
    accepted_B = right_BK.long().cumprod(1).sum(1)
    rows = torch.arange(batch, device=p_BTV.device)
    p_BV = p_BTV[rows, accepted_B]
    if most:
        at_B = accepted_B.clamp(max=most - 1)
        if draft.q is None:
            q_BV = torch.zeros_like(p_BV).scatter_(1, draft.tokens[rows, at_B][:, None], torch.inf)
        else:
            q_BV = draft.q[rows, at_B]
        rest_BV = (p_BV - q_BV).clamp(min=0.0)
        # All zero only where rounding makes p and q alike: then p is as good.
        refused_B = (accepted_B < count_B) & (rest_BV.sum(1) > 0)
        p_BV = torch.where(refused_B[:, None], rest_BV, p_BV)
    last = draw(p_BV)
    accepted = accepted_B.tolist()
    drafted = draft.tokens.tolist()
    tokens = [[*drafted[row][:n], int(last[row])] for row, n in enumerate(accepted)]
    return tokens, accepted
