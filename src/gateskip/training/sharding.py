"""Gates under FSDP2: the backbone is split over processes, what was added is whole on each.

Gates and compensation are small, and read outside of their modules' forward; kept whole they stay
float32 whatever the policy of the rest. Their gradients are averaged here, in one order on every
process: which of them a step has depends on who was skipped where.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn

from gateskip.errors import AttachError
from gateskip.gates import Gate
from gateskip.retrofit.attach import inner_model, is_sharded, layers_of
from gateskip.skipping.compensation import Compensation
from gateskip.skipping.state import state_of

__all__ = ["added_parameters", "average_added", "shard"]


def added_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of gates and compensation, in order."""
    return [
        parameter
        for module in inner_model(model).modules()
        if isinstance(module, Gate | Compensation)
        for parameter in module.parameters(recurse=False)
    ]


def shard(model: nn.Module, mesh: Any = None, **options: Any) -> nn.Module:
    """Apply torch's ``fully_shard`` to every decoder layer and to the whole, gates left whole.

    ``accelerate``'s FSDP2 does the same with ``fsdp_ignored_modules`` (examples/accelerate).

    Args:
        model: a gated model; fit, calibrate and evaluate it dense before.
        mesh, options: of ``torch.distributed.fsdp.fully_shard``.

    Raises:
        AttachError: no gates, or sharded already.
    """
    from torch.distributed.fsdp import fully_shard

    state = state_of(model)
    if is_sharded(model, state.family):
        raise AttachError("model is sharded already; shard it once.")
    options = options | ({} if mesh is None else {"mesh": mesh})
    whole = set(added_parameters(model))
    for layer in layers_of(model, state.family):
        fully_shard(layer, ignored_params=whole, **options)
    fully_shard(inner_model(model), ignored_params=whole, **options)
    return model


@torch.no_grad()
def average_added(model: nn.Module) -> None:
    """Average the gradients of what was added over processes, after the last backward of a step."""
    world = distributed.get_world_size()
    for parameter in added_parameters(model):
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:  # nobody of this process needed it
            parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce(parameter.grad)
        parameter.grad /= world
