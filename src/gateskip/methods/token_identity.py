"""Token identity: a token is as important as its id is on average.

What a policy gains over this it knows from the context.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor

from gateskip.errors import UnsupportedError
from gateskip.methods.table import TableMethod, TableRule
from gateskip.skipping.call import Call

__all__ = ["ById", "TokenIdentity"]


class ById(TableRule):
    name: ClassVar[str] = "token_identity"

    def entries(self, call: Call) -> Tensor:
        if call.ids_BT is None:
            raise UnsupportedError(
                "method 'token_identity' needs input_ids, and the model was given embeddings."
            )
        return call.ids_BT


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenIdentity(TableMethod):
    """Mean score of each token id; an id never seen has the branch's mean."""

    rule: ClassVar[type[TableRule]] = ById

    def size(self, model: Any, longest: int) -> int:
        return int(model.get_input_embeddings().weight.shape[0])
