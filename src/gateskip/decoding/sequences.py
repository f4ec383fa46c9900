"""The rows of one generation: their tokens, and the cache of all but the last of them.

Shapes: B rows, T tokens of a call, C cached columns, V vocabulary.

Rows take their own number of tokens from a call. The cache has one length for all of them, so a row
that takes fewer is moved to the right, and what is then at its left is masked: padding on the left,
as in a prompt's batch, and every row ends at the last column.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from gateskip.config import RowBudgets
from gateskip.decoding.policies import AtBudget, Policy
from gateskip.errors import BudgetError, UnsupportedError
from gateskip.execution.memory import realign, rewind
from gateskip.skipping.state import state_of

__all__ = ["Sequences"]

#: Processors that look at one token's scores alone, so that all can be processed at once.
ALONE = (
    TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper,
    TypicalLogitsWarper, EpsilonLogitsWarper, EtaLogitsWarper,
)  # fmt: skip
#: What processors know of every row.
BY_ROW = ("prompt_ignore_length", "encoder_input_ids")


class Sequences:
    """Tokens, cache, mask and positions of the rows.

    Args:
        ids_BT: the prompts, padded at the left. mask_BT: their real tokens, or None: all.
        position_BT: their positions. room: tokens that a row may have in the end.
        cache: as ``generate`` prepared it. processors: of logits. sample: draw tokens.
        pad: what rows that have ended are filled with.

    Attributes:
        ids: int64 ``[B, room]``. lengths: tokens of every row. done: rows that have ended.
        moved: whether rows took different numbers of tokens. prefilled: real tokens that the
            prompt's pass cached of the first row.
    """

    def __init__(
        self,
        model: Any,
        ids_BT: Tensor,
        mask_BT: Tensor | None,
        position_BT: Tensor,
        *,
        room: int,
        cache: Any,
        processors: Any,
        sample: bool,
        pad: int,
    ) -> None:
        self.model, self.state, self.cache = model, state_of(model), cache
        self.batch, prompt = ids_BT.shape
        self.ids = torch.full((self.batch, max(room, prompt)), pad, device=ids_BT.device)
        self.ids[:, :prompt] = ids_BT
        self.lengths = [prompt] * self.batch
        self.done = [False] * self.batch
        self.mask: Tensor | None = None if mask_BT is None else mask_BT.bool().clone()
        self.next_B1 = position_BT[:, -1:].expand(self.batch, 1) + 1
        self.position_BT = position_BT
        self._last = int(position_BT[:, -1].max()) + self.ids.shape[1] - prompt
        self.processors, self.sample = processors, sample
        self._fed = self._since = 0
        self._windows, self._shared = False, True
        self.moved = False
        self._recording: list[Any] = []
        self.prefilled = 0

    @property
    def last_B1(self) -> Tensor:
        """Every row's last token, which is not in the cache yet."""
        places = torch.tensor(self.lengths, device=self.ids.device)[:, None] - 1
        return self.ids.gather(1, places)

    @property
    def has_windows(self) -> bool:
        """Whether the cache forgets old tokens."""
        return any(getattr(part, "is_sliding", False) for part in self.cache.layers)

    def last_tokens(self, count: int) -> Tensor:
        """Every row's last tokens, ``[B, count]``; of a row that has ended they do not matter."""
        ends = torch.tensor(self.lengths, device=self.ids.device)[:, None]
        steps = torch.arange(-count, 0, device=self.ids.device)
        return self.ids.gather(1, (ends + steps).clamp(min=0))

    def row(self, row: int) -> Tensor:
        """A row's tokens so far, ``[1, L]``."""
        return self.ids[row : row + 1, : self.lengths[row]]

    def remaining(self) -> int:
        """Tokens that a row may still take: the one with most left; the one with least, where the
        cache has no place for more."""
        left = [self.ids.shape[1] - n for n, end in zip(self.lengths, self.done, strict=True)
                if not end]  # fmt: skip
        return (min if isinstance(self.cache, StaticCache) else max)(left, default=0)

    def prefill(self, policy: Policy, chunk: int | None) -> Tensor:
        """Cache the prompt, what was cached before apart; logits after it, ``[B, 1, V]``."""
        past, end = int(self.cache.get_seq_length()), self.lengths[0]
        if past >= end:
            raise UnsupportedError(
                f"the cache holds {past} tokens and the prompt {end}: there is nothing to begin "
                "with; crop the cache by one token."
            )
        places_BT = self.position_BT[:, past - end :].expand(self.batch, -1)
        logits: Any = None
        for at in range(past, end, chunk or end):
            stop = min(at + (chunk or end), end)
            logits = self._call(
                policy, self.ids[:, at:stop], places_BT[:, at - past : stop - past], stop, 1
            )
        if not getattr(self.cache, "is_croppable", True):
            raise UnsupportedError(
                f"{type(self.cache).__name__} cannot give tokens back; use a DynamicCache, the "
                "default of generate."
            )
        self._since = end
        layers = self.cache.layers
        sliding = [part for part in layers if getattr(part, "is_sliding", False)]
        self._windows = any(not isinstance(part, StaticLayer) for part in sliding)
        self._recording = [p for p in layers if getattr(p, "record_past", None) is False]
        for part in self._recording:
            part.activate_past_recording()
        self.prefilled = end - past
        if self.mask is not None:
            self.prefilled = int(self.mask[0, past:end].sum())
        return self._float(logits)

    def end(self) -> None:
        """Leave the cache as plain decoding needs it."""
        for part in self._recording:
            part.record_past = False

    def forward(self, tokens_BT: Tensor, policy: Policy) -> Tensor:
        """Run new tokens of every row and cache them; float32 logits ``[B, T, V]``."""
        new = tokens_BT.shape[1]
        steps = torch.arange(self._fed, self._fed + new, device=self.next_B1.device)
        self._fed += new
        if self.mask is not None:
            ones = self.mask.new_ones(self.batch, new)
            self.mask = torch.cat([self.mask, ones], 1)
        end = int(self.cache.get_seq_length()) + new
        # What is past the longest length is thrown away; its position must exist all the same.
        places = (self.next_B1 + steps).clamp(max=self._last)
        return self._float(self._call(policy, tokens_BT, places, end, new))

    def rewind(self, tokens: int) -> None:
        """Take back the last columns; of a window only those since the last :meth:`commit`."""
        if self._windows and tokens > self._fed:
            raise UnsupportedError(
                "caches of sliding windows forget what refresh=True would compute anew; leave it "
                "off."
            )
        rewind(self.cache, tokens, self._since)
        self._fed -= tokens
        if self.mask is not None:
            self.mask = self.mask[:, : self.mask.shape[1] - tokens]

    def commit(self, counts: list[int]) -> None:
        """Keep the first ``counts[b]`` of the columns that were fed since the last commit; what is
        left of a row that has ended does not matter."""
        fed, most = self._fed, max(counts)
        self._fed = 0
        self.next_B1 = self.next_B1 + torch.tensor(counts, device=self.ids.device)[:, None]
        if min(counts) == most and not self.moved:
            rewind(self.cache, fed - most, self._since)
            if self.mask is not None:
                self.mask = self.mask[:, : self.mask.shape[1] - (fed - most)]
            return
        self.moved = True
        columns = int(self.cache.get_seq_length())
        if self.mask is None:
            self.mask = torch.ones(self.batch, columns, dtype=torch.bool, device=self.ids.device)
        ends = [columns - fed + count for count in counts]
        pads = self.mask.to(torch.uint8).argmax(1).tolist()
        width = columns - fed + most
        if not self._windows:  # a window's columns must not move out of it
            going = [end - pad for end, pad, over in zip(ends, pads, self.done, strict=True)
                     if not over]  # fmt: skip
            width = max(going, default=width)
        right = [width - end for end in ends]
        realign(self.cache, right, columns - width, shared=self._shared)
        self._shared = self._shared and not any(right)
        new = torch.zeros(self.batch, width, dtype=torch.bool, device=self.ids.device)
        for row, (pad, end) in enumerate(zip(pads, ends, strict=True)):
            real = self.mask[row, max(pad, end - width) : end]
            new[row, width - real.shape[0] :] = real
        self.mask = new

    def scores(self, logits_BTV: Tensor, drafted_BT: Tensor | None = None) -> Tensor:
        """Logits after the processors; ``drafted_BT`` come between a row's tokens and the later of
        its logits."""
        if not self.processors:
            return logits_BTV
        batch, new, size = logits_BTV.shape
        if all(type(each) in ALONE for each in self.processors):
            nothing = self.ids[:1, :1].expand(batch * new, 1)
            return self.processors(nothing, logits_BTV.reshape(-1, size)).view(batch, new, size)
        out = torch.empty_like(logits_BTV)
        for row in range(batch):
            ids = self.row(row)
            if drafted_BT is not None:
                ids = torch.cat([ids, drafted_BT[row : row + 1]], 1)
            processors = self.of_row(row)
            for step in range(new):
                seen = ids[:, : self.lengths[row] + step]
                out[row, step] = processors(seen, logits_BTV[row : row + 1, step].clone())
        return out

    def of_row(self, row: int) -> Any:
        """The processors as they are for one row alone."""
        if self.batch == 1:
            return self.processors
        found = type(self.processors)()
        for each in self.processors:
            parts = {
                name: value[row : row + 1]
                for name, value in vars(each).items()
                if name in BY_ROW and isinstance(value, Tensor) and value.shape[0] == self.batch
            }
            if parts:
                each = copy.copy(each)
                vars(each).update(parts)
            found.append(each)
        return found

    def choose(self, scores_BTV: Tensor) -> Tensor:
        """Tokens ``[B, T]``: the best, or drawn."""
        if not self.sample:
            return scores_BTV.argmax(-1)
        return draw(scores_BTV.softmax(-1))

    def _call(self, policy: Policy, ids: Tensor, places: Tensor, end: int, keep: int) -> Tensor:
        budget = policy.budget if isinstance(policy, AtBudget) else None
        if isinstance(budget, RowBudgets) and len(budget.rows) != self.batch:
            raise BudgetError(
                f"budget has {len(budget.rows)} rows, the batch {self.batch}; give one number for "
                "every row."
            )
        mask = None if self.mask is None else self.mask[:, :end].long()
        with policy.on(self.state):
            out = self.model(
                input_ids=ids, attention_mask=mask, position_ids=places, cache=self.cache,
                use_cache=True, logits_to_keep=keep, return_dict=True,
            )  # fmt: skip
        found: Tensor = out.logits
        return found

    def _float(self, logits: Tensor) -> Tensor:
        return logits.to(device=self.ids.device, dtype=torch.float32)


def draw(p_BTV: Tensor) -> Tensor:
    """A token from each distribution, ``[B, T]``."""
    flat = p_BTV.reshape(-1, p_BTV.shape[-1])
    return torch.multinomial(flat, 1).view(p_BTV.shape[:-1])
