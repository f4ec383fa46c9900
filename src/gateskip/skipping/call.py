"""One forward call of the decoder: who is valid, who is protected, what was decided.

Shapes: B rows, T new tokens, S keys (cached and new).

The call object travels through the layers as a keyword argument. Decisions are recorded in it, so
that recomputation under gradient checkpointing replays them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from gateskip.config import BranchKey, RowBudgets
from gateskip.errors import BudgetError, UnsupportedError
from gateskip.skipping.policy import OFF
from gateskip.skipping.quantile import FromBatch
from gateskip.skipping.state import GateSkipState, Override, Thresholds, effective_budget

__all__ = ["Call"]


class Call:
    """What the layers of one forward call share.

    Attributes:
        alike: every gate's value is one dot product in this call (for the ledger).
        valid_BT: True for real tokens, bool; None when all are.
        protected_BT: True for tokens that no branch may skip, bool; None when there is none.
        thresholds: τ per gated branch, a number, float32 ``[]`` or ``[B]``, or one from the batch;
            None keeps everything.
        keep: decisions, ``(layer, kind)`` to bool ``[B, T]``.
        computed: rows that really entered a branch's projections, per batch row, ``[B]``.
        padding: rows added to a branch to round its row count up, keys and values apart.
        ids_BT: token ids of the new tokens; None where the model was given embeddings.
        kv: K and V that attention layers wrote for the new tokens (``kv_source="previous"``).
        masks: mask rows of this call, made once by the execution, by what they were made from.
        memory: of a rule, from one branch of this call to the next.
        asked: tokens that a rule looked at, ``[B]``, where they are fewer than all valid ones.
        held: what moves the thresholds while the call runs, or None.
        learned: branches from which the objective has taken what this call says.
        single: batch 1, one new token, no padding: the batch-1 decoding path.
        layers: the decoder's. stacked: whether the first one has computed all of them.
    """

    def __init__(
        self,
        state: GateSkipState,
        over: Override,
        *,
        batch: int,
        new: int,
        past: int,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        device: torch.device,
        alike: bool = False,
        input_ids: Tensor | None = None,
    ) -> None:
        self.state = state
        self.batch, self.new, self.past = batch, new, past
        self.device, self.alike = device, alike
        self.ungated = over.ungated
        #: Of random skipping.
        self.seed: int = state.config.seed if over.seed is None else over.seed
        thresholds = None if over.ungated else over.thresholds
        if thresholds is None and not over.ungated:
            budget = effective_budget(state)
            thresholds = state.resolve(budget)
            if thresholds is not None and isinstance(budget, RowBudgets):
                rows = len(budget.rows)
                thresholds = _by_row(thresholds, rows, batch, device, over.generating)
        self.thresholds = thresholds
        self.observer = over.observer
        self.recorder = over.recorder
        self.scores = over.scores
        self.objective = over.objective
        self.learned: set[BranchKey] = set()
        self._noise_scale = over.noise
        self._noise: dict[BranchKey, Tensor] = {}
        self.forced = next(over.forced) if over.forced is not None else None
        self.memory: dict[Any, Any] = {}
        self.asked: dict[BranchKey, Tensor] = {}
        self.held: Any = None
        self.masked = over.execution == "masked"
        if self.observer is not None:
            self.masked = True
        self.keep: dict[BranchKey, Tensor] = {}
        self.computed: dict[BranchKey, Tensor] = {}
        self.padding: dict[BranchKey, int] = {}
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}
        self.masks: dict[Any, Any] = {}
        self.layers: list[nn.Module] = []
        #: Keys that attention keeps of every query; None: all.
        self.top_k: int | None = None
        self.stacked = False
        self._valid_N: Tensor | None = None
        self.ids_BT = input_ids
        #: Places that a mask of attention, made for a cache of fixed size, no longer tells.
        self.places_BT: Tensor | None = None
        made = isinstance(attention_mask, dict) or getattr(attention_mask, "ndim", 2) == 4
        if over.generating and made and position_ids is not None:
            self.places_BT = position_ids.expand(batch, -1) + 1
        self.mask_2d = _two_dimensional(attention_mask, batch, past + new, over.generating)
        self.valid_BT, self.protected_BT = self._tokens(position_ids, input_ids)
        one = batch == 1 and new == 1 and self.valid_BT is None
        # Elsewhere than on a CPU a Python decision would wait for the device at every branch.
        self.single = one and device.type == "cpu"

    @property
    def decides(self) -> bool:
        """False when everything is kept and the dense modules run as they are."""
        return self.thresholds is not None or self.forced is not None

    @functools.cached_property
    def known(self) -> bool:
        """Whether thresholds alone say who is skipped: everyone or nobody, branch by branch."""
        if self.scores is not None or self.forced is not None or self.held is not None:
            return False
        assert self.thresholds is not None
        return all(
            not isinstance(t, FromBatch | Tensor) and (t >= OFF or t == -math.inf)
            for t in self.thresholds.values()
        )

    @property
    def valid_N(self) -> Tensor | None:
        """Flat indices of the real tokens, int64; None when all are."""
        if self.valid_BT is None:
            return None
        if self._valid_N is None:
            self._valid_N = self.valid_BT.flatten().nonzero()[:, 0]
        return self._valid_N

    def move(self, device: torch.device) -> None:
        """Follow the stream to the device of the next layers."""
        self.device = device
        for name in ("valid_BT", "protected_BT", "mask_2d", "_valid_N", "ids_BT", "places_BT"):
            t = getattr(self, name)
            setattr(self, name, None if t is None else t.to(device))
        if self.thresholds is not None:
            moved = {k: t.to(device) if isinstance(t, Tensor) else t
                     for k, t in self.thresholds.items()}  # fmt: skip
            self.thresholds = moved
        self.masks.clear()

    def everyone(self) -> Tensor:
        """The keep mask of a branch that skips nobody."""
        if self.valid_BT is not None:
            return self.valid_BT
        return torch.ones(self.batch, self.new, dtype=torch.bool, device=self.device)

    def free(self) -> Tensor:
        """Valid tokens that a branch may skip, bool ``[B, T]``."""
        valid_BT = self.everyone()
        return valid_BT if self.protected_BT is None else valid_BT & ~self.protected_BT

    def decide(self, key: BranchKey, score_BT: Tensor) -> Tensor:
        """keep = valid and (s ≥ τ or protected), recorded; bool ``[B, T]``."""
        if key in self.keep:
            return self.keep[key]
        if self.scores is not None:
            self.scores.add(key, score_BT, self)
        if self.forced is not None:
            keep_BT = self.forced[key].to(self.device)
        elif self.held is not None and self.new > 1:
            free_BT, valid_BT = self.free(), self.everyone()
            keep_BT = self.held.scan(key, score_BT, free_BT) | (valid_BT & ~free_BT)
        else:
            assert self.thresholds is not None
            threshold = self.thresholds[key]
            if isinstance(threshold, FromBatch):
                threshold = threshold.threshold(score_BT, self.free(), self.everyone())
            if isinstance(threshold, Tensor) and threshold.dim():
                threshold = threshold[:, None]
            noise_BT = self.noise(key)
            keep_BT = (score_BT if noise_BT is None else score_BT + noise_BT) >= threshold
            if self.protected_BT is not None:
                keep_BT = keep_BT | (self.protected_BT & (threshold < OFF))
            if self.valid_BT is not None:
                keep_BT = keep_BT & self.valid_BT
        self.keep[key] = keep_BT
        return keep_BT

    def noise(self, key: BranchKey) -> Tensor | None:
        """What training adds to a branch's scores, float32 ``[B, T]``: drawn once for the call.

        Logistic: the difference of two Gumbel variables, so that with scale 1 a token is kept with
        probability σ(s − τ) (Gumbel-softmax of two choices, arXiv 1611.01144).
        """
        if not self._noise_scale:
            return None
        if key not in self._noise:
            uniform_BT = torch.rand(self.batch, self.new)
            self._noise[key] = self._noise_scale * torch.logit(uniform_BT, eps=1e-6)
        return self._noise[key].to(self.device)

    def visible_keys(self) -> Tensor:
        """Keys that each new token may attend to, itself included, int64 ``[B, T]``."""
        if self.places_BT is not None:
            return self.places_BT
        if self.mask_2d is not None:
            counts = self.mask_2d[:, : self.past + self.new].long().cumsum(-1)
            return counts[:, -self.new :]
        ramp = torch.arange(self.past + 1, self.past + self.new + 1, device=self.device)
        return ramp.expand(self.batch, self.new)

    def _tokens(
        self, position_ids: Tensor | None, input_ids: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(valid, protected), None where all are, and where none is."""
        valid_BT = self._valid_tokens()
        protected_BT = self._beginnings(position_ids)
        named = self.state.config.protected_ids
        if named:
            if input_ids is None:
                raise UnsupportedError(
                    f"protected_ids={named} needs input_ids, and the model was given embeddings; "
                    "attach with protected_ids=()."
                )
            wanted = torch.tensor(named, dtype=input_ids.dtype, device=input_ids.device)
            protected_BT = protected_BT | torch.isin(input_ids, wanted)
        if torch.compiler.is_compiling():  # a graph cannot ask
            return valid_BT, protected_BT
        if valid_BT is not None and bool(valid_BT.all()):
            valid_BT = None
        return valid_BT, protected_BT if bool(protected_BT.any()) else None

    def _valid_tokens(self) -> Tensor | None:
        end = self.past + self.new
        if self.mask_2d is not None:
            if self.mask_2d.shape[1] < end:
                raise UnsupportedError(
                    f"attention_mask of shape {tuple(self.mask_2d.shape)} covers fewer than the "
                    f"{end} cached and new tokens; pass a mask over all of them."
                )
            return self.mask_2d.bool()[:, self.past : end]
        return None

    def _beginnings(self, position_ids: Tensor | None) -> Tensor:
        """The first tokens of each sequence, as many as the config protects, bool ``[B, T]``."""
        end, first = self.past + self.new, self.state.config.protected_first
        columns = torch.arange(self.past, end, device=self.device)
        if self.mask_2d is not None:
            start_B1 = self.mask_2d.to(torch.uint8).argmax(-1, keepdim=True)
            return (columns[None] >= start_B1) & (columns[None] < start_B1 + first)
        begins = torch.zeros(self.batch, self.new, dtype=torch.bool, device=self.device)
        begins[:, 0] = self.past == 0
        if position_ids is not None and self.new > 1:  # packed sequences
            begins[:, 1:] |= (position_ids[:, 1:] != position_ids[:, :-1] + 1).to(self.device)
        found = begins | (columns[None] < first) if self.past else begins.clone()
        for n in range(1, min(first, self.new)):
            found[:, n:] |= begins[:, :-n]
        return found


def _by_row(
    thresholds: Thresholds, rows: int, batch: int, device: torch.device, generating: bool
) -> Thresholds:
    """Budgets by row, for the rows that a call has: ``generate`` expands each for its beams."""
    if batch % rows or (batch != rows and not generating):
        raise BudgetError(
            f"budget has {rows} rows, the batch {batch}; give one number for every row."
        )
    if batch == 1:
        return {key: float(t) for key, t in thresholds.items()}
    return {key: t.repeat_interleave(batch // rows).to(device) for key, t in thresholds.items()}


def _two_dimensional(mask: Any, batch: int, end: int, generating: bool) -> Tensor | None:
    """The mask of real tokens ``[B, S]``.

    ``generate`` makes masks of attention before the decoder is called where a cache has a fixed
    size. Those are causality, windows and padding: a real token is seen by itself at least, and
    what has left the window counts as real.
    """
    if generating and isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return None
    if generating and isinstance(mask, Tensor) and mask.dim() == 4:
        seen = (mask if mask.dtype == torch.bool else mask >= 0)[:, 0].any(-2).expand(batch, -1)
        return nn.functional.pad(seen, (max(end - seen.shape[1], 0), 0), value=True)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedError(
            f"attention_mask {shape} hides which tokens are padding; pass the 2-D mask [B, S]."
        )
    return mask
