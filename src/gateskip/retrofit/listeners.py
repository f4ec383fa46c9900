"""Who listens to a module or stands in its place, so that it has to be called as it is.

transformers leaves hooks behind that capture outputs only while a call asks for them; those are
silent otherwise.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

__all__ = ["heard", "listened"]

CAPTURING = "transformers.utils.output_capturing"


def heard(hooks: dict[Any, Any]) -> bool:
    """Whether any of a module's hooks does something now."""
    if not hooks:
        return False
    for hook in hooks.values():
        if getattr(hook, "__module__", None) != CAPTURING:
            return True
    collector: Any = getattr(sys.modules.get(CAPTURING), "_active_collector", None)
    return collector is None or bool(collector.get())  # names of what is collected


def listened(module: nn.Module) -> bool:
    """Whether somebody hooks the module or has replaced its forward."""
    return (
        "forward" in vars(module)
        or heard(module._forward_hooks)
        or heard(module._forward_pre_hooks)
    )
