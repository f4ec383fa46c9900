"""Forward passes over text with an observer on every branch.

Shapes: B rows, T tokens, N valid tokens, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from rich.progress import track
from torch import Tensor, nn

from gateskip.config import BranchKey
from gateskip.data import Batch
from gateskip.retrofit.attach import decoder_of
from gateskip.retrofit.devices import device_of
from gateskip.skipping.call import Call
from gateskip.skipping.state import override, state_of

__all__ = ["Observer", "flat_valid", "run_pass", "shown"]


class Observer(Protocol):
    """Receives every gated branch of a masked pass.

    Attributes:
        ungated: True to add outputs unscaled, as the dense model does.
    """

    ungated: bool

    def branch(
        self, key: BranchKey, h: Tensor, u: Tensor, o: Tensor, keep: Tensor, call: Call
    ) -> None:
        """h, u, o ``[B, T, H]``: residual, branch input, branch output; keep ``[B, T]``."""


def flat_valid(call: Call, mask_BT: Tensor | None = None) -> Tensor:
    """Flat indices of valid, unprotected tokens (of ``mask``, if given)."""
    wanted = call.everyone()
    if call.protected_BT is not None:
        wanted = wanted & ~call.protected_BT
    if mask_BT is not None:
        wanted = wanted & mask_BT
    return wanted.flatten().nonzero()[:, 0]


def shown(batches: Sequence[Batch], title: str | None) -> Iterable[Batch]:
    """The batches, under a progress bar where there is a title."""
    return track(batches, description=title, transient=True) if title else batches


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, restored afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def run_pass(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    thresholds: Mapping[BranchKey, float] | None = None,
    title: str | None = None,
    **override_fields: Any,
) -> None:
    """One pass of the decoder (no LM head) over all batches under an override.

    Args:
        thresholds: skip below these; None keeps everything.
        title: shows a progress bar.
        override_fields: ``observer``, ``scores``, ``recorder`` or ``execution``.
    """
    state = state_of(model)
    decoder = decoder_of(model, state.family)
    device = device_of(decoder)
    with eval_mode(model), override(state, thresholds=thresholds, **override_fields):
        for batch in shown(batches, title):
            decoder(
                input_ids=batch.ids.to(device),
                attention_mask=batch.mask.to(device),
                use_cache=False,
            )
