"""What ends a branch, whatever its execution: join, compensation, and a decision's gradient.

Shapes: B rows, T new tokens, N flat tokens, M selected ones, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gateskip.execution.branch import Branch
from gateskip.skipping.masked import masked_join

__all__ = ["compensate", "finish_whole", "learnable"]


def finish_whole(
    branch: Branch, h: Tensor, base: Tensor, u: Tensor, o: Tensor, keep: Tensor | None
) -> Tensor:
    call, gate = branch.call, branch.gate
    if call.observer is not None and gate is not None:
        shown = call.everyone() if keep is None else keep
        call.observer.branch(branch.key, h, u, o, shown, call)
        if call.observer.ungated:
            return base + o
    if gate is None:
        return base + o
    kept_BTH = branch.join(base, o, u)
    if keep is None:
        return kept_BTH
    out = masked_join(base, kept_BTH, u, keep, call.everyone(), branch.compensation)
    if call.objective is None:
        return out
    kept = (call.everyone() if call.objective.everyone else keep).flatten().nonzero()[:, 0]
    o_MH, u_MH = (t.flatten(0, 1).index_select(0, kept) for t in (o, u))
    return learnable(branch, out.flatten(0, 1), o_MH, u_MH, kept).view_as(h)


def compensate(branch: Branch, out_NH: Tensor, skip: Tensor, u_skip: Tensor | None) -> Tensor:
    """Add the compensation to skipped tokens of the flat stream; ``u_skip`` may have more rows."""
    compensation = branch.compensation
    if compensation is None or skip.shape[0] == 0:
        return out_NH
    assert u_skip is not None
    return compensation.add_at(out_NH, u_skip, skip)


def learnable(branch: Branch, out_NH: Tensor, o_MH: Tensor, u_MH: Tensor, kept: Tensor) -> Tensor:
    """``out``, unchanged in value; in training a kept token's decision may get a gradient."""
    call, gate = branch.call, branch.gate
    if call.objective is None or call.thresholds is None or not torch.is_grad_enabled():
        return out_NH
    assert gate is not None
    threshold = call.thresholds[branch.key]
    gained = o_MH if branch.apart else None
    noise_BT = call.noise(branch.key)
    noise_M = None if noise_BT is None else noise_BT.flatten().index_select(0, kept)
    change = call.objective.decision(
        gate, o_MH, u_MH, threshold, branch.compensation, gained, noise_M
    )
    return out_NH if change is None else out_NH.index_add(0, kept, change.to(out_NH.dtype))
