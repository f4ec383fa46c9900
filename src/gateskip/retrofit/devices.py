"""Modules whose weights accelerate brings and takes away: several devices, CPU and disk offload.

accelerate replaces ``forward`` on the instance by one that loads weights, calls ``_old_forward``
and unloads them. So a class's forward is only asked where ``_old_forward`` is bound to it anew, and
a weight may be read only while its own module runs.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

__all__ = ["comes_and_goes", "device_of", "is_patched", "rebind"]


def comes_and_goes(module: nn.Module) -> bool:
    """Whether accelerate manages the module's weights."""
    return "_hf_hook" in vars(module)


def is_patched(module: nn.Module) -> bool:
    """Whether somebody else's ``forward`` stands before the class's."""
    if not comes_and_goes(module):
        return "forward" in vars(module)
    inner: Any = vars(module).get("_old_forward")
    return getattr(inner, "__func__", None) is not type(module).forward


def rebind(module: nn.Module) -> None:
    """After a change of class: let accelerate call the new class's forward."""
    if comes_and_goes(module):
        vars(module)["_old_forward"] = types.MethodType(type(module).forward, module)


def device_of(module: nn.Module) -> torch.device:
    """Where the module runs; meta where nobody would bring its weights."""
    for inner in module.modules():
        device = getattr(vars(inner).get("_hf_hook"), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device
