"""A controller that holds a budget while text drifts: one offset per branch and request.

After every token of a request a branch's threshold moves by gain · range · (kept − share): up when
it computed a token, down when it skipped one, so that in the long run it keeps the share that its
calibration promised, whatever the text. It is the tracking of a quantile by online gradient steps
(adaptive conformal inference, Gibbs & Candès, arXiv 2106.00170): after T tokens the kept share is
off by at most (the offset's span) / (gain · range · T).

The offset of a token follows from the same branch's earlier tokens of the same row alone, so
decisions stay causal, independent of batch mates and alike in prefill and decoding.

Shapes: B rows, T new tokens, S tokens of the request so far, N branches.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gateskip import kernels
from gateskip.config import BranchKey, Budget, RowBudgets
from gateskip.errors import BudgetError, ConfigError, UnsupportedError
from gateskip.skipping.policy import OFF

__all__ = ["BudgetController"]

Floats = NDArray[np.float64]


@dataclasses.dataclass(slots=True)
class _Request:
    """Offsets before each token of one cache's rows.

    Attributes:
        offsets: per branch a list of float64 ``[B, T]``, one of each call. end: after the last.
        length: tokens seen, padding included. batch: rows.
    """

    batch: int
    length: int
    offsets: dict[BranchKey, list[Floats]]
    end: dict[BranchKey, Floats]

    def cut(self, length: int) -> None:
        """Forget what came after ``length`` tokens (a cropped cache)."""
        for key, parts in self.offsets.items():
            whole = np.concatenate(parts, axis=1)
            self.end[key] = whole[:, length].copy()
            self.offsets[key] = [whole[:, :length]]
        self.length = length


class BudgetController:
    """Offsets of all requests within a ``gateskip.hold_budget`` block.

    Attributes:
        gain: step of a threshold after one token, in units of the branch's range of thresholds.
    """

    def __init__(self, gain: float) -> None:
        if not (isinstance(gain, int | float) and 0.0 < gain <= 1.0):
            raise ConfigError(f"gain={gain!r} must be in (0, 1]; 0.05 is usual.")
        self.gain = float(gain)
        self._requests: weakref.WeakKeyDictionary[Any, _Request] = weakref.WeakKeyDictionary()
        self._new: _Request | None = None

    def begin(self, call: Any, budget: Budget | RowBudgets | None, cache: Any) -> _Held | None:
        """What this call is held by; None where nothing is skipped.

        Raises:
            UnsupportedError: a cache whose earlier tokens the controller has not seen, or a GPU.
        """
        if call.thresholds is None or budget is None:
            return None
        if call.device.type != "cpu":
            raise UnsupportedError(
                f"hold_budget on {call.device.type}: thresholds move on the CPU only; leave the "
                "block for this model."
            )
        request = self._request(call, cache)
        rows = budget.rows if isinstance(budget, RowBudgets) else (budget,)
        if call.batch % len(rows):
            raise BudgetError(f"budget has {len(rows)} rows, the batch {call.batch}.")
        held = _Held(self, request, call, rows)
        if call.new == 1:
            call.thresholds = held.thresholds()
        return held

    def _request(self, call: Any, cache: Any) -> _Request:
        found = self._requests.get(cache) if cache is not None else None
        new = self._new
        if found is None and new is not None and (new.length, new.batch) == (call.past, call.batch):
            # The first call made this cache itself.
            found, self._new = new, None
            self._requests[cache] = found
        if call.past == 0:
            found = _Request(call.batch, 0, {}, {})
            if cache is None:
                self._new = found
            else:
                self._requests[cache] = found
        if found is None or found.batch != call.batch or found.length < call.past:
            raise UnsupportedError(
                f"hold_budget has not seen the {call.past} tokens of this cache with "
                f"{call.batch} rows (reordered beams, or a cache from elsewhere); begin the "
                "request within the block, without beams."
            )
        if found.length > call.past:
            found.cut(call.past)
        return found


class _Held:
    """One call under a controller."""

    def __init__(
        self, controller: BudgetController, request: _Request, call: Any, rows: tuple[Budget, ...]
    ) -> None:
        self.request, self.batch = request, call.batch
        self.base: dict[BranchKey, Floats] = {}
        self.shares: dict[BranchKey, Floats] = {}
        self.steps: dict[BranchKey, float] = {}
        table, expected = call.state.policy, [call.state.expected(row) for row in rows]
        free = 1.0 - table.protected
        each = call.batch // len(rows)
        for n, key in enumerate(call.state.branches):
            threshold = np.asarray(call.thresholds[key], dtype=np.float64)
            self.base[key] = np.broadcast_to(threshold, (call.batch,))
            shares = np.array([(row[key] - table.protected) / max(free, 1e-9) for row in expected])
            self.shares[key] = np.repeat(np.clip(shares, 0.0, 1.0), each)
            low, high = table.thresholds[0][n], table.thresholds[-1][n]
            span = high - low if math.isfinite(low) and abs(high) < OFF else 0.0
            self.steps[key] = controller.gain * span
            if key not in request.end:
                request.end[key] = np.zeros(call.batch)
                request.offsets[key] = []

    def thresholds(self) -> dict[BranchKey, Any]:
        """τ of the next token, as a number or float32 ``[B]``."""
        found: dict[BranchKey, Any] = {}
        for key, base in self.base.items():
            values = (base + self.request.end[key]).astype(np.float32)
            found[key] = float(values[0]) if self.batch == 1 else torch.from_numpy(values)
        return found

    def scan(self, key: BranchKey, score_BT: Tensor, free_BT: Tensor) -> Tensor:
        """keep of free tokens one after another, bool ``[B, T]``; others stay False.

        Args:
            free_BT: real tokens that may be skipped.
        """
        scores = score_BT.detach().float().numpy()
        free = free_BT.numpy()
        kept = np.zeros(scores.shape, dtype=np.bool_)
        before = np.empty(scores.shape, dtype=np.float64)
        offset = self.request.end[key].copy()
        run = _compiled() if kernels.backend() == "numba" else _scan
        run(scores, free, self.base[key], self.shares[key], self.steps[key], offset, before, kept)
        self.request.offsets[key].append(before)
        self.request.end[key] = offset
        return torch.from_numpy(kept)

    def finish(self, call: Any) -> None:
        """After the last layer: take note of one decoded token's decisions, in all branches."""
        request = self.request
        if call.new == 1:
            valid_B = call.everyone()[:, 0]
            free_B = valid_B if call.protected_BT is None else valid_B & ~call.protected_BT[:, 0]
            free = free_B.numpy()
            for key, step in self.steps.items():
                offset = request.end[key]
                request.offsets[key].append(offset[:, None])
                kept = call.keep[key][:, 0].numpy() if key in call.keep else free
                moved = offset + step * (kept.astype(np.float64) - self.shares[key])
                request.end[key] = np.where(free, moved, offset)
        else:
            for key, parts in request.offsets.items():
                if sum(part.shape[1] for part in parts) < request.length + call.new:
                    # Never asked: this branch is not decided here.
                    parts.append(np.repeat(request.end[key][:, None], call.new, axis=1))
        request.length += call.new


def _scan(
    scores: Any, free: Any, base: Any, shares: Any, step: float, offset: Any, before: Any, kept: Any
) -> None:
    """The recursion of every row. ``offset`` ``[B]`` is moved; ``before`` and ``kept`` written."""
    for row in range(scores.shape[0]):
        o = offset[row]
        for t in range(scores.shape[1]):
            before[row, t] = o
            if free[row, t]:
                keep = scores[row, t] >= np.float32(base[row] + o)
                kept[row, t] = keep
                o += step * ((1.0 if keep else 0.0) - shares[row])
        offset[row] = o


_cached: list[Any] = []


def _compiled() -> Any:
    """The recursion as machine code."""
    if not _cached:
        import numba

        _cached.append(numba.njit(cache=True)(_scan))
    return _cached[0]
