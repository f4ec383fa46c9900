"""What parity tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gateskip.execution import layer as layer_module
from gateskip.execution import stack


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of one token ran as one."""
    seen: list[bool] = []

    def noted(*args: Any) -> Tensor | None:
        found = stack.token_stack(*args)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(layer_module, "token_stack", noted)
    return seen


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Flex attention without its compiler, which takes minutes."""
    torch._dynamo.reset()
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")
