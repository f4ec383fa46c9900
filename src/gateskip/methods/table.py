"""Rules that are tables: a branch's mean score for each token id, or for each place.

Shapes: B rows, T tokens, E entries of the table, L·2 branches.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from gateskip.calibration.thresholds import calibrate
from gateskip.config import BranchKey
from gateskip.data import encode, take_tokens, to_batches
from gateskip.execution.api import attach
from gateskip.fitting.closed_form import fit
from gateskip.fitting.closed_loop import keep_all
from gateskip.fitting.passes import run_pass
from gateskip.methods.base import Method, is_gated
from gateskip.skipping.call import Call
from gateskip.skipping.rule import Rule, set_rule
from gateskip.skipping.score import random_score
from gateskip.skipping.state import state_of

__all__ = ["TableMethod", "TableRule"]

#: Entries are shared by many tokens; a hash of the place, so small against them, breaks ties.
DITHER = 1e-3


class TableRule(Rule):
    """Scores by an entry of a table ``[E]`` per branch; one never seen has the branch's mean."""

    causal: ClassVar[bool] = True

    def __init__(self, tables: dict[BranchKey, Tensor]) -> None:
        self.tables = tables
        spread = torch.cat(list(tables.values())).std().item() if tables else 0.0
        self.step = DITHER * (spread if spread > 0 else 1.0)

    @abstractmethod
    def entries(self, call: Call) -> Tensor:
        """The entry of every token, int64 ``[B, T]``, at least 0."""

    def tensors(self) -> Mapping[str, Tensor]:
        return {f"{layer}.{kind}": table for (layer, kind), table in self.tables.items()}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        names = {name: name.split(".") for name in tensors}
        return cls({(int(layer), kind): tensors[n].float() for n, (layer, kind) in names.items()})

    def score(self, key: BranchKey, h_BTH: Tensor, call: Call) -> Tensor:
        table_E = self.tables[key].to(h_BTH.device)
        at_BT = self.entries(call).to(h_BTH.device).clamp(max=table_E.shape[0] - 1)
        return table_E[at_BT] + self.step * random_score(call.visible_keys(), key, call.seed)


class _Means:
    """An override's ``scores``: their mean by entry."""

    def __init__(self, rule: TableRule, size: int) -> None:
        self.rule, self.size = rule, size
        self.sums: dict[BranchKey, Tensor] = {}
        self.counts: dict[BranchKey, Tensor] = {}

    def add(self, key: BranchKey, score_BT: Tensor, call: Call) -> None:
        wanted = call.everyone()
        if call.protected_BT is not None:
            wanted = wanted & ~call.protected_BT
        at = self.rule.entries(call)[wanted].cpu().clamp(max=self.size - 1)
        zeros = torch.zeros(self.size, dtype=torch.float64)
        sums, counts = self.sums.setdefault(key, zeros), self.counts.setdefault(key, zeros.clone())
        sums.index_add_(0, at, score_BT[wanted].double().cpu())
        counts.index_add_(0, at, torch.ones(at.shape[0], dtype=torch.float64))

    def tables(self) -> dict[BranchKey, Tensor]:
        found = {}
        for key, sums in self.sums.items():
            counts = self.counts[key]
            mean = sums.sum() / counts.sum()
            found[key] = torch.where(counts > 0, sums / counts.clamp(min=1), mean).float()
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableMethod(Method):
    """Replaces the scores of a model's gates by their means; gates and compensation stay.

    Attributes:
        max_tokens: tokens that the means are of.
    """

    paper: ClassVar[str] = "null"
    rule: ClassVar[type[TableRule]]
    max_tokens: int = 50_000

    @abstractmethod
    def size(self, model: Any, longest: int) -> int:
        """Entries of a table."""

    def apply(self, model: nn.Module, data: Any, tokenizer: Any = None) -> nn.Module:
        if not is_gated(model):
            attach(model)
        state = state_of(model)
        if not state.fitted:
            fit(model, data, tokenizer)
        samples = take_tokens(encode(data, tokenizer, 512), self.max_tokens)
        longest = max(sample.ids.shape[0] for sample in samples)
        means = _Means(self.rule({}), self.size(model, longest))
        run_pass(model, to_batches(samples), thresholds=keep_all(state), scores=means)
        set_rule(state, self.rule(means.tables()))
        calibrate(model, data, tokenizer)
        return model
