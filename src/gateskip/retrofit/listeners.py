"""Who listens to a module or stands in its place, so that it has to be called as it is.

transformers leaves hooks behind that capture outputs only while a call asks for them; those are
silent otherwise.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.utils import output_capturing

__all__ = ["heard", "listened"]


def heard(hooks: dict[Any, Any]) -> bool:
    """Whether any of a module's hooks does something now."""
    if not hooks:
        return False
    for hook in hooks.values():
        if getattr(hook, "__module__", None) != output_capturing.__name__:
            return True
    collector: Any = getattr(output_capturing, "_active_collector", None)
    return collector is None or bool(collector.get())  # names of what is collected


def listened(module: nn.Module) -> bool:
    """Whether somebody hooks the module or has replaced its forward."""
    return (
        "forward" in vars(module)
        or heard(module._forward_hooks)
        or heard(module._forward_pre_hooks)
    )
