"""How many tokens to draft."""

from __future__ import annotations

from typing import Protocol

from gateskip.errors import ConfigError

__all__ = ["DraftLength", "Fitting", "Fixed", "length_of"]

LONGEST = 8
#: What a drafted token adds to the time of the pass that checks it, as a share of a plain pass
#: (benchmarks/speculative.py measures it).
CHECK = 0.17
RETRY = 16  # passes without a draft after which one is tried again
MEMORY = 0.9  # of what was seen, for each pass


class DraftLength(Protocol):
    """Decides on the length of the next draft."""

    #: Chance of being taken that a token needs to be worth its check; 0: none.
    least: float

    def wanted(self, cost: float) -> int:
        """Tokens to draft at a cost of one, as a share of a plain token's."""

    def seen(self, accepted: int, drafted: int) -> None:
        """Told how a row's draft went."""


class Fixed:
    """Always as many."""

    least = 0.0

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def wanted(self, cost: float) -> int:
        return self.tokens

    def seen(self, accepted: int, drafted: int) -> None:
        """Does not matter."""


class Fitting:
    """As many as give the most tokens for the time, at the rate at which drafts were right lately.

    With α the chance of a token after a right one, k drafted tokens give (1 − α^(k+1)) / (1 − α)
    tokens (arXiv 2211.17192, its equation 1) for 1 + k · (cost + check) plain passes.
    """

    least = CHECK

    def __init__(self) -> None:
        self.right, self.tried = 1.0, 1.5
        self.idle = 0

    def wanted(self, cost: float) -> int:
        if cost == 0.0:  # the draft knows better how sure it is of each token
            return LONGEST
        alpha = min(self.right / self.tried, 0.999)

        def gain(k: int) -> float:
            found: float = (1.0 - alpha ** (k + 1)) / (1.0 - alpha) / (1.0 + k * (cost + CHECK))
            return found

        best = max(range(LONGEST + 1), key=gain)
        if best == 0:
            self.idle += 1
            if self.idle >= RETRY:
                self.idle = 0
                return 1
        return best

    def seen(self, accepted: int, drafted: int) -> None:
        if drafted:  # tokens after the first wrong one say nothing
            self.right = MEMORY * self.right + accepted
            self.tried = MEMORY * self.tried + min(accepted + 1, drafted)


def length_of(value: int | str) -> DraftLength:
    """From what users give. Raises ConfigError."""
    if isinstance(value, str) and value == "auto":
        return Fitting()
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(
            f"draft_tokens={value!r} must be a whole number of at least 1, or 'auto'."
        )
    return Fixed(value)
