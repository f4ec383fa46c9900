"""LLM-Drop (arXiv 2406.15786): single attentions or MLPs that turn the stream least are removed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import nn

from gateskip.config import one_of
from gateskip.data import Sample
from gateskip.methods.influence import Influence
from gateskip.methods.static import Group, Static
from gateskip.skipping.state import GateSkipState

__all__ = ["LLMDrop"]

TARGETS = ("both", "attention", "mlp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LLMDrop(Static):
    """By 1 − E[cos(x, x + f(norm(x)))] of each branch (its equation 4 and its joint drop).

    Attributes:
        target: which branches may go.
    """

    paper: ClassVar[str] = "arXiv 2406.15786"
    target: Literal["both", "attention", "mlp"] = "both"

    def __post_init__(self) -> None:
        one_of("target", self.target, TARGETS)

    def order(
        self, model: nn.Module, state: GateSkipState, samples: list[Sample]
    ) -> Sequence[Group]:
        influence = Influence.of(model, samples).branches
        wanted = [key for key in influence if self.target in ("both", key[1])]
        return [(key,) for key in sorted(wanted, key=lambda key: influence[key])]
