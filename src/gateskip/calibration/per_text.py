"""Loss and likeliest tokens of every text apart, dense or at a budget.

Shapes: B rows, T tokens, V vocabulary, N texts.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gateskip.config import Budget
from gateskip.data import Sample, to_batches
from gateskip.execution.api import dense, trace
from gateskip.fitting.passes import eval_mode
from gateskip.retrofit.devices import device_of
from gateskip.skipping.ledger import Ledger
from gateskip.skipping.state import override, state_of

__all__ = ["PerText", "per_text"]


@dataclasses.dataclass(frozen=True, slots=True)
class PerText:
    """One pass over texts.

    Attributes:
        loss: mean loss per scored token, nats, ``[N]``.
        tokens: scored tokens, ``[N]``.
        top: likeliest ids of the scored positions, one int32 tensor for each text.
        compute: share of dense MACs spent, net.
    """

    loss: NDArray[np.float64]
    tokens: NDArray[np.int64]
    top: tuple[Tensor, ...]
    compute: float

    def agreement(self, other: PerText) -> NDArray[np.float64]:
        """Share of scored positions with the same likeliest id, ``[N]``."""
        pairs = zip(self.top, other.top, strict=True)
        return np.array([float((a == b).float().mean()) for a, b in pairs])


@torch.no_grad()
def per_text(
    model: nn.Module,
    samples: Sequence[Sample],
    budget: Budget | None,
    *,
    advance: Callable[[], None] = lambda: None,
) -> PerText:
    """Run all texts; None runs the dense model (the same weights without gates).

    Args:
        samples: each with at least one scored token after its first. advance: called per batch.
    """
    # As batches are made: sorted by length, in order where lengths are equal.
    order = sorted(range(len(samples)), key=lambda n: samples[n].ids.shape[0])
    found: dict[int, tuple[float, int, Tensor]] = {}
    device = device_of(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        recorder = None
        if budget is None:
            if "_gateskip" in vars(model):
                stack.enter_context(dense(model))
        else:
            stack.enter_context(override(state_of(model), budget=budget))
            recorder = stack.enter_context(trace(model))
        at = 0
        for batch in to_batches(samples):
            run: Any = model
            out = run(
                input_ids=batch.ids.to(device), attention_mask=batch.mask.to(device),
                use_cache=False,
            )  # fmt: skip
            for row in range(batch.ids.shape[0]):
                scored = batch.scored[row, 1:].to(device)
                logits_NV = out.logits[row, :-1][scored].float()
                target_N = batch.ids[row, 1:].to(device)[scored]
                loss = nn.functional.cross_entropy(logits_NV, target_N)
                top = logits_NV.argmax(-1).int().cpu()
                found[order[at]] = (float(loss), int(top.shape[0]), top)
                at += 1
            advance()
    ledger = None
    if recorder is not None:
        ledger = Ledger.of(call.without_padding() for call in recorder.calls)
    rows = [found[n] for n in range(len(samples))]
    return PerText(
        loss=np.array([row[0] for row in rows]),
        tokens=np.array([row[1] for row in rows]),
        top=tuple(row[2] for row in rows),
        compute=1.0 if ledger is None else ledger.compute,
    )
