"""What a decoder did, beside the tokens that it returns."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["DecodingStats"]


@dataclasses.dataclass(slots=True)
class DecodingStats:
    """Counts of one or more generations; pass one as ``stats=``.

    Attributes:
        passes: calls of the model that decided on tokens, the prompt's apart. new_tokens: tokens
            that came out of them, in all rows.
        draft_calls: calls of the draft policy. drafted, accepted: tokens that were checked, and
            found right.
        exits: tokens that came out of the first layers.
        discarded: tokens decoded and thrown away. refreshed: cached tokens computed again.
        switches: changes between the cheap and the full policy.
    """

    passes: int = 0
    new_tokens: int = 0
    draft_calls: int = 0
    drafted: int = 0
    accepted: int = 0
    exits: int = 0
    discarded: int = 0
    refreshed: int = 0
    switches: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were right; 0 where none was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """New tokens for each checking pass, over all rows."""
        return self.new_tokens / self.passes if self.passes else 0.0

    def to_json(self) -> dict[str, Any]:
        """All counts and the two rates."""
        rates = {"acceptance": self.acceptance, "tokens_per_pass": self.tokens_per_pass}
        return dataclasses.asdict(self) | rates
