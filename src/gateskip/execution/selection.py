"""Who is kept and who is skipped at a branch, as flat indices, from one look at the decision.

Shapes: B rows, T new tokens. On a GPU every question to a tensor waits for the device, so all of
them are one.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from gateskip.skipping.call import Call

__all__ = ["Selection", "select"]


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """Flat indices (row·T + position, ascending, int64) of a decision.

    Attributes:
        kept, skipped: valid tokens. counts: tokens kept of each batch row.
    """

    kept: Tensor
    skipped: Tensor
    counts: list[int]

    def note(self, call: Call, key: tuple[int, str]) -> None:
        """Tell the ledger how many rows entered the branch's projections."""
        if call.recorder is not None:
            call.computed[key] = torch.tensor(self.counts, device=call.device)


def select(keep_BT: Tensor, call: Call) -> Selection:
    """The selection of a bool ``[B, T]`` decision."""
    if keep_BT.device.type == "cpu":
        keep = keep_BT.numpy()
        skip = ~keep if call.valid_BT is None else ~keep & call.valid_BT.numpy()
        kept, skipped = (torch.from_numpy(np.flatnonzero(mask)) for mask in (keep, skip))
        return Selection(kept, skipped, keep.sum(1).tolist())
    skip_BT = ~keep_BT if call.valid_BT is None else ~keep_BT & call.valid_BT
    # Kept first, then skipped, then padding; a stable sort leaves each in order.
    rank = 2 - 2 * keep_BT.to(torch.int8) - skip_BT.to(torch.int8)
    order = rank.flatten().argsort(stable=True)
    *counts, skips = torch.cat((keep_BT.sum(1), skip_BT.sum()[None])).tolist()
    kept = sum(counts)
    return Selection(order[:kept], order[kept : kept + skips], counts)
