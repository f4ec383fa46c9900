"""Position only: a token is as important as tokens at its place are on average.

What a policy gains over this it knows from the text.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor

from gateskip.methods.table import TableMethod, TableRule
from gateskip.skipping.call import Call

__all__ = ["ByPlace", "Position"]


class ByPlace(TableRule):
    name: ClassVar[str] = "position"

    def entries(self, call: Call) -> Tensor:
        return (call.visible_keys() - 1).clamp(min=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position(TableMethod):
    """Mean score of each place; beyond the longest text seen, that of its last place."""

    rule: ClassVar[type[TableRule]] = ByPlace

    def size(self, model: Any, longest: int) -> int:
        return longest
