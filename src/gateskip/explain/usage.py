"""Which branches each token of a text used.

Shapes: T tokens, N gated branches in execution order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gateskip.config import BranchKey
from gateskip.errors import ConfigError, DataError
from gateskip.fitting.passes import eval_mode
from gateskip.retrofit.attach import decoder_of
from gateskip.retrofit.devices import device_of
from gateskip.skipping.ledger import Trace
from gateskip.skipping.state import override, state_of

__all__ = ["Usage", "branch_usage", "usage_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """Decisions of one forward pass over one text.

    Attributes:
        branches: gated branches in execution order, N of them.
        kept_TN: True where a token was computed, bool ``[T, N]``.
        macs_saved: share of the dense decoder's MACs saved, net of gates and compensation.
    """

    branches: tuple[BranchKey, ...]
    kept_TN: Tensor
    macs_saved: float

    @property
    def skip_rate(self) -> float:
        """Share of token×branch pairs skipped."""
        return 1.0 - float(self.kept_TN.double().mean())

    @property
    def used_share(self) -> Tensor:
        """Share of the branches that each token used, float64 ``[T]``."""
        return self.kept_TN.double().mean(1)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers with gated branches, first to last."""
        return tuple(sorted({layer for layer, _ in self.branches}))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Gated branch kinds, in execution order within a layer."""
        return tuple(dict.fromkeys(kind for _, kind in self.branches))

    @property
    def skip_by_branch(self) -> dict[BranchKey, float]:
        """Skip rate of every branch."""
        kept_N = self.kept_TN.double().mean(0).tolist()
        return {key: 1.0 - kept for key, kept in zip(self.branches, kept_N, strict=True)}

    @property
    def skip_by_layer(self) -> dict[int, float]:
        """Skip rate of every layer, over its gated branches."""
        return {layer: self._mean(0, layer) for layer in self.layers}

    @property
    def skip_by_kind(self) -> dict[str, float]:
        """Skip rate of attention and of MLPs."""
        return {kind: self._mean(1, kind) for kind in self.kinds}

    def of_kind(self, kind: str) -> Tensor:
        """Decisions of one branch kind, bool ``[layers with such a gate, T]``."""
        columns = [n for n, (_, found) in enumerate(self.branches) if found == kind]
        return self.kept_TN[:, columns].T

    def to_json(self, tokens: Sequence[str] | None = None) -> dict[str, Any]:
        """A JSON-ready dictionary; ``tokens`` are the text's pieces, if wanted in it.

        Raises:
            ConfigError: as many tokens as decisions are needed.
        """
        if tokens is not None:
            self.check_tokens(tokens)
        return {
            "tokens": None if tokens is None else list(tokens),
            "branches": [list(key) for key in self.branches],
            "kept": self.kept_TN.int().tolist(),
            "skip_rate": self.skip_rate,
            "macs_saved": self.macs_saved,
            "skip_by_layer": {str(layer): rate for layer, rate in self.skip_by_layer.items()},
            "skip_by_kind": self.skip_by_kind,
        }

    def check_tokens(self, tokens: Sequence[str]) -> None:
        """Raise ConfigError unless there is one label per token."""
        if len(tokens) != self.kept_TN.shape[0]:
            raise ConfigError(
                f"tokens has {len(tokens)} labels for {self.kept_TN.shape[0]} tokens; give one "
                "per token."
            )

    def _mean(self, part: int, value: object) -> float:
        rates = [rate for key, rate in self.skip_by_branch.items() if key[part] == value]
        return sum(rates) / len(rates)


def branch_usage(model: nn.Module, input_ids: Tensor) -> Usage:
    """Run one text through the decoder at the budget in force, and say who was computed where.

    Args:
        model: a gated model; ``gateskip.set_budget`` or ``gateskip.budget`` choose the budget.
        input_ids: int64 ``[1, T]``.

    Raises:
        AttachError: the model has no gates. DataError: another shape, or no token.
        BudgetError: the budget in force needs thresholds that are not there.
    """
    state = state_of(model)
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise DataError(
            f"input_ids has shape {tuple(input_ids.shape)}; give one text as [1, T] with T ≥ 1."
        )
    decoder = decoder_of(model, state.family)
    device = device_of(decoder)
    recorder = Trace()
    with eval_mode(model), override(state, recorder=recorder):
        decoder(input_ids=input_ids.to(device), use_cache=False)
    return usage_of(recorder)


def usage_of(trace: Trace) -> Usage:
    """The usage of row 0 over all calls of a trace (a prompt, then generated tokens).

    Raises:
        DataError: the trace is empty.
    """
    if not trace.calls:
        raise DataError("trace has no calls; run the model within the trace block.")
    keep = trace.keep
    columns = [torch.cat([mask[0].cpu() for mask in masks]) for masks in keep.values()]
    valid_T = torch.cat([call.valid_BT[0].cpu() for call in trace.calls])
    return Usage(
        branches=tuple(keep),
        kept_TN=torch.stack(columns, 1)[valid_T],
        macs_saved=1.0 - trace.ledger.compute,
    )
