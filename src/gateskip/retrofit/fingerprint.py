"""Is this the base model that the gates were made for? Names, sizes and a sample of the weights."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from gateskip.errors import CheckpointError

__all__ = ["check_fingerprint", "fingerprint"]

SAMPLED_TENSORS = 16
SAMPLES = 8
TOLERANCE = 2.0**-6  # a base loaded in bfloat16 or float16 is still the same base
SIZES = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "intermediate_size", "vocab_size",
)  # fmt: skip


def _base_parameters(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    named = ((n, p.detach()) for n, p in model.named_parameters())
    return sorted((n, p) for n, p in named if ".skip_" not in n)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """JSON-ready: architecture sizes, a hash of parameter names and shapes, sampled weights."""
    config: Any = model.config
    parameters = sorted(_base_parameters(model), key=lambda item: item[0])
    layout = hashlib.sha256()
    for name, tensor in parameters:
        layout.update(f"{name}:{tuple(tensor.shape)};".encode())
    samples: dict[str, list[float]] = {}
    step = max(1, len(parameters) // SAMPLED_TENSORS)
    for name, tensor in parameters[::step]:
        if tensor.is_meta or not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        at = torch.arange(SAMPLES) * (tensor.numel() - 1) // (SAMPLES - 1)
        samples[name] = tensor.reshape(-1)[at.to(tensor.device)].float().cpu().tolist()
    return {
        "name_or_path": str(getattr(config, "_name_or_path", "") or ""),
        "sizes": {name: getattr(config, name, None) for name in SIZES},
        "layout": layout.hexdigest(),
        "samples": samples,
    }


def check_fingerprint(expected: dict[str, Any], model: nn.Module, path: str) -> None:
    """Raise CheckpointError, naming what differs, unless ``model`` is the expected base."""
    found = fingerprint(model)
    for name, value in expected["sizes"].items():
        if found["sizes"].get(name) != value:
            raise CheckpointError(
                f"{path} was made for a base with {name}={value!r}, this one has "
                f"{found['sizes'].get(name)!r}; pass base= with the right model."
            )
    if found["layout"] != expected["layout"]:
        raise CheckpointError(
            f"{path} was made for a base with other parameter names or shapes; pass base= with "
            "the right model."
        )
    for name, values in expected["samples"].items():
        here = torch.tensor(found["samples"].get(name, [float("nan")] * len(values)))
        there = torch.tensor(values)
        scale = there.abs().max().clamp(min=1e-6)
        if not bool(((here - there).abs() <= TOLERANCE * scale).all()):
            raise CheckpointError(
                f"{path} was made for other weights ({name} differs); pass base= with the model "
                f"that it was fitted on ({expected['name_or_path'] or 'name unknown'})."
            )
