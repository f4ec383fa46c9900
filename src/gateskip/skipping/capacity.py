"""What a budget leaves to those who can be skipped."""

from __future__ import annotations

from gateskip.costs import net_share
from gateskip.errors import BudgetError
from gateskip.skipping.state import GateSkipState

__all__ = ["capacity"]


def capacity(state: GateSkipState, compute: float) -> float:
    """Share of the tokens that gated branches may keep, at a share of the dense MACs spent.

    Raises:
        BudgetError: gated branches cannot save that much.
    """
    assert state.policy is not None
    costs, keys = state.costs(), state.policy.mean_keys
    most, least = (
        net_share(costs, dict.fromkeys(state.branches, keep), keys) for keep in (1.0, 0.0)
    )
    found = (compute - least) / (most - least)
    if found <= 0.0:
        raise BudgetError(
            f"compute={compute:g}: gates on {len(state.branches)} branches of {state.shape.layers} "
            f"layers save {1.0 - least:.0%} at most; gate more of them (every=1 of "
            "mixture_of_depths), or give a larger budget."
        )
    return min(found, 1.0)
