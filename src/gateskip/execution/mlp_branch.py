"""An MLP branch of a gated layer: whole, of one token, compacted.

Shapes: B rows, T new tokens, N flat tokens, M selected ones, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gateskip.execution.branch import Branch
from gateskip.execution.finish import compensate, finish_whole, learnable
from gateskip.execution.fused_mlp import own_mlp, run_mlp
from gateskip.execution.selection import select
from gateskip.execution.token import YES

__all__ = ["mlp_branch"]


def mlp_branch(branch: Branch, h: Tensor, base: Tensor, *, owned: bool) -> Tensor:
    """``base`` plus what the branch, which reads ``h``, adds to it.

    Args:
        owned: nobody else holds ``base``, so it may be changed in place.
    """
    call, gate = branch.call, branch.gate
    keep = branch.decide(h)
    if keep is None or call.masked:
        x, u = branch.inputs(h)
        o = branch.out(own_mlp(branch.module, x))
        return finish_whole(branch, h, base, u, o, keep)
    assert gate is not None
    if call.single:
        if keep is YES or bool(keep):
            x, u = branch.inputs(h)
            return branch.join(base, branch.out(own_mlp(branch.module, x)), u)
        call.computed[branch.key] = torch.zeros(1, dtype=torch.int64)
        if branch.compensation is None:
            return base
        return base + branch.compensation(branch.read(h))
    flat, flat_base = h.flatten(0, 1), base.flatten(0, 1)
    chosen = select(keep, call)
    kept = chosen.kept
    if kept.shape[0] == keep.numel():
        x, u = branch.inputs_at(flat, None)
        o = _run_mlp(branch, x)
        out = branch.join(flat_base, o, u, branch.score_N)
        return learnable(branch, out, o, u, kept).view_as(h)
    chosen.note(call, branch.key)
    skip = u_skip = None
    if branch.compensation is not None:
        skip = chosen.skipped
        u_skip = branch.read_at(flat, skip, rounded=True)
    if kept.shape[0]:
        x, u = branch.inputs_at(flat, kept, rounded=True)
        n = kept.shape[0]
        call.padding[branch.key] = u.shape[0] - n
        o, u = _run_mlp(branch, x)[:n], u[:n]
        out = flat_base if owned else flat_base.clone()
        out = branch.join_at(out, flat_base, o, u, kept)
        out = learnable(branch, out, o, u, kept)
    else:
        out = flat_base if owned else flat_base.clone()
    if skip is not None:
        out = compensate(branch, out, skip, u_skip)
    return out.view_as(h)


def _run_mlp(branch: Branch, x: Tensor) -> Tensor:
    """What the MLP adds for rows ``[M, H]`` or ``[B, T, H]``."""
    return branch.out(run_mlp(branch.module, branch.family, x))
