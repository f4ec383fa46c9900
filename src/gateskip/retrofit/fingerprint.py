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
    named = (
        (_plain(n), p)
        for n, p in model.named_parameters()
        if ".skip_" not in n and ".lora_" not in n
    )
    return sorted(named, key=lambda item: item[0])


def _plain(name: str) -> str:
    """A parameter's name without PEFT's layers around it."""
    return name.replace(".base_layer.", ".")


def _quantised(parameter: torch.Tensor) -> bool:
    """Whether its numbers are not the base model's: packed integers, or a subclass that hides them.

    A bfloat16 or float32 weight is a plain Parameter.
    """
    return type(parameter) is not nn.Parameter or not parameter.is_floating_point()


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights as they were before anything packed them."""
    found = {_plain(name): tuple(p.shape) for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        weight = _plain(f"{name}.weight")
        if weight in found and isinstance(module, nn.Linear):
            found[weight] = (module.out_features, module.in_features)
    return found


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """JSON-ready: architecture sizes, a hash of parameter names and shapes, sampled weights.

    Of a quantised model, weights that were left as they were are sampled; the rest is the same.
    """
    config: Any = model.config
    parameters, shapes = _base_parameters(model), _shapes(model)
    layout = hashlib.sha256()
    for name, _ in parameters:
        layout.update(f"{name}:{shapes[name]};".encode())
    samples: dict[str, list[float]] = {}
    step = max(1, len(parameters) // SAMPLED_TENSORS)
    for name, tensor in parameters[::step]:
        if tensor.is_meta or _quantised(tensor) or tensor.numel() == 0:
            continue
        tensor = tensor.detach()
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
    quantised = {name for name, p in _base_parameters(model) if _quantised(p)}
    for name, values in expected["samples"].items():
        if name in quantised:
            continue
        here = torch.tensor(found["samples"].get(name, [float("nan")] * len(values)))
        there = torch.tensor(values)
        scale = there.abs().max().clamp(min=1e-6)
        if not bool(((here - there).abs() <= TOLERANCE * scale).all()):
            raise CheckpointError(
                f"{path} was made for other weights ({name} differs); pass base= with the model "
                f"that it was fitted on ({expected['name_or_path'] or 'name unknown'})."
            )
