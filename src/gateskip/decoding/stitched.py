"""Self-stitching: R-Stitch (arXiv 2507.17307) on one set of weights.

Decode cheaply; where the next token is uncertain, throw it away and decode with the full policy,
until that is certain again. The paper has two models, each with a cache of its own; here it is one
model under two policies, and one cache.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gateskip.config import Budget, RowBudgets
from gateskip.decoding.entropy import normalised_entropy
from gateskip.decoding.loop import Step, run
from gateskip.decoding.policies import AtBudget, Policy, as_policy, check_policy
from gateskip.decoding.sequences import Sequences
from gateskip.decoding.stats import DecodingStats
from gateskip.errors import ConfigError, UnsupportedError

__all__ = ["Stitched", "generate_stitched"]

PROMPTS = ("full", "cheap")


def generate_stitched(
    model: nn.Module,
    input_ids: Any,
    *,
    threshold: float,
    cheap: Any = 0.5,
    full: Any = 1.0,
    prompt: str = "full",
    refresh: bool = False,
    stats: DecodingStats | None = None,
    **generate_kwargs: Any,
) -> Any:
    """``model.generate`` that decodes cheaply while it is certain.

    Args:
        input_ids: prompts ``[B, T]``, padded at the left with an ``attention_mask``, or what a
            tokenizer returns.
        threshold: normalised entropy of the next token, of what the model itself says, above which
            a cheap token is thrown away. Below 0 everything is decoded with ``full``, from 1 on
            everything with ``cheap``.
        cheap, full: a share kept, a budget, ``"dense"`` or a policy; several rows take budgets
            only.
        prompt: which of the two, ``"full"`` or ``"cheap"``, the prompt runs with.
        refresh: at a change to ``full``, compute keys and values of the cheap tokens anew, and of a
            cheap prompt; one row, no windows.
        stats: counts are added to it.
        generate_kwargs: any of ``generate``'s, beams and assistants apart.

    Returns:
        What ``generate`` returns.

    Raises:
        ConfigError, BudgetError: options out of range. UnsupportedError: several rows with other
            policies than budgets, or with ``refresh``.
    """
    if not isinstance(threshold, int | float) or isinstance(threshold, bool):
        raise ConfigError(f"threshold={threshold!r} must be a number, usually between 0 and 1.")
    if prompt not in PROMPTS:
        raise ConfigError(f"prompt={prompt!r} must be one of {', '.join(PROMPTS)}.")
    policies = as_policy("cheap", cheap), as_policy("full", full)
    for name, policy in zip(("cheap", "full"), policies, strict=True):
        check_policy(name, policy, model)
    counts = stats or DecodingStats()
    decoder = Stitched(*policies, float(threshold), prompt == "cheap", refresh, counts)
    return run(model, decoder, input_ids, counts, "generate_stitched", generate_kwargs)


class Stitched:
    """Two policies, and who is decoded with which."""

    ragged = budgeted = False

    def __init__(
        self,
        cheap: Policy,
        full: Policy,
        threshold: float,
        cheap_prompt: bool,
        refresh: bool,
        stats: DecodingStats,
    ) -> None:
        self.cheap, self.full, self.threshold = cheap, full, threshold
        self.prompt = cheap if cheap_prompt else full
        self.cheap_prompt, self.refresh, self.stats = cheap_prompt, refresh, stats
        self.is_full: list[bool] = []
        self.stale = 0  # tokens at the cache's end that the cheap policy computed

    def unsure(self, logits_BV: Tensor) -> list[bool]:
        """Which rows' next token is uncertain."""
        found: list[bool] = (normalised_entropy(logits_BV) > self.threshold).tolist()
        return found

    def check(self, batch: int) -> None:
        """Several rows take budgets, and are not refreshed."""
        if batch > 1:
            if self.refresh:
                raise UnsupportedError(
                    f"refresh=True takes one row, and the batch has {batch}: their cheap tokens "
                    "differ in number."
                )
            for name, policy in (("cheap", self.cheap), ("full", self.full)):
                if not isinstance(policy, AtBudget) or isinstance(policy.budget, RowBudgets):
                    raise UnsupportedError(
                        f"{name}={policy!r}: several rows take one budget for each of cheap and "
                        "full, such as 0.5 and 1.0; or give one row."
                    )

    def begin(self, rows: Sequences, logits_BV: Tensor) -> None:
        """Begin cheaply."""
        self.is_full = [False] * rows.batch
        self.stale = rows.prefilled if self.cheap_prompt else 0

    def end(self, rows: Sequences) -> None:
        """Nothing is left to do."""

    def step(self, rows: Sequences) -> Step:
        """A token of every row, decoded again where it is not certain."""
        logits = rows.forward(rows.last_B1, self._policy())
        unsure = self.unsure(logits[:, -1])
        again = [a and not full and not end
                 for a, full, end in zip(unsure, self.is_full, rows.done, strict=True)]  # fmt: skip
        if any(again):
            self.stats.discarded += sum(again)
            self.stats.switches += sum(again)
            self.is_full = [full or a for full, a in zip(self.is_full, again, strict=True)]
            logits = self._again(rows)
            unsure = self.unsure(logits[:, -1])
        elif not self.is_full[0]:
            self.stale += 1
        certain = [full and not u for full, u in zip(self.is_full, unsure, strict=True)]
        self.stats.switches += sum(certain)
        if any(certain):
            self.is_full = [f and not c for f, c in zip(self.is_full, certain, strict=True)]
        scores = rows.scores(logits)
        return Step([[int(t)] for t in rows.choose(scores)[:, 0]], scores, logits)

    def _again(self, rows: Sequences) -> Tensor:
        """The rows' last tokens once more, with those before them where they are refreshed."""
        rows.rewind(1)
        stale = self.stale if self.refresh else 0
        if not stale:
            return rows.forward(rows.last_B1, self._policy())
        rows.rewind(stale)
        self.stats.refreshed += stale
        self.stale = 0
        length = rows.lengths[0]
        fed = rows.ids[:, length - 1 - stale : length]
        return rows.forward(fed, self.full)[:, -1:]

    def _policy(self) -> Policy:
        if all(self.is_full):
            return self.full
        if not any(self.is_full):
            return self.cheap
        assert isinstance(self.cheap, AtBudget)
        assert isinstance(self.full, AtBudget)
        cheap, full = self.cheap.budget, self.full.budget
        assert isinstance(cheap, Budget)
        assert isinstance(full, Budget)
        return AtBudget(RowBudgets(tuple(full if f else cheap for f in self.is_full)))
