"""A rule: scores that do not come from gates.

Every method that ranks tokens is a rule; thresholds, budgets, the ledger and both executions are
the same for all of them.

Shapes: B rows, T new tokens, H hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from torch import Tensor

from gateskip.config import BranchKey
from gateskip.errors import UnsupportedError
from gateskip.registry import Registry

if TYPE_CHECKING:
    from gateskip.skipping.call import Call
    from gateskip.skipping.state import GateSkipState

__all__ = ["RULES", "Rule", "rule_of", "set_rule"]


class Rule(Protocol):
    """What ranks tokens at a branch.

    Attributes:
        name: as in the registry of rules. causal: whether a token's score depends on nothing
            after it, and on no other row.

    A rule whose tokens, once they skip, skip all that follows (exits) says ``nested = True``: one
    threshold holds for all branches, and scores of who has left say nothing. It may also have
    ``macs(key, shape)``, the MACs of one token's score where they are worth counting, and
    ``bind(model)``, which is called with the model that it is loaded into.
    """

    name: ClassVar[str]
    causal: ClassVar[bool]

    def score(self, key: BranchKey, h_BTH: Tensor, call: Call) -> Tensor:
        """Scores ``[B, T]``, float32; the lowest are skipped.

        Args:
            h_BTH: the residual stream that the branch reads.
        """

    def tensors(self) -> Mapping[str, Tensor]:
        """What has to be saved, by name."""

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Rebuild from :meth:`tensors`. Raises KeyError or ValueError where they are damaged."""


#: Rules by name, so that a checkpoint finds its own.
RULES: Registry[type[Rule]] = Registry("rule", "gateskip.rules")
RULES.register("exit", "gateskip.methods.exits:ExitRule")
RULES.register("position", "gateskip.methods.position:ByPlace")
RULES.register("token_identity", "gateskip.methods.token_identity:ById")


def set_rule(state: GateSkipState, rule: Rule) -> None:
    """Let a rule rank the tokens of a gated model; thresholds of other scores are dropped."""
    state.rule = rule
    state.config = dataclasses.replace(state.config, importance="rule")
    state.policy, state.latency, state.default_budget = None, (), None


def rule_of(state: GateSkipState) -> Rule:
    """The model's rule. Raises UnsupportedError where a model was loaded without one."""
    if state.rule is None:
        raise UnsupportedError(
            "importance='rule', but the model has no rule; apply a method of gateskip.methods."
        )
    return state.rule
