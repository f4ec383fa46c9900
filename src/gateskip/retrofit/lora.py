"""Low-rank changes of the backbone: read from PEFT's layers, kept as factors, merged into weights.

A trained backbone is saved as its factors beside the gates, and merged when it is loaded, so that
inference pays nothing for it. Shapes: O output and I input features, R rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gateskip.errors import CheckpointError, UnsupportedError

__all__ = [
    "Factors",
    "add_live",
    "fits",
    "joined",
    "live_factors",
    "load_live",
    "lora_layers",
    "merge",
    "merge_live",
    "mergeable",
    "quantised",
    "without_lora",
]

Factors = dict[str, tuple[Tensor, Tensor]]
"""Module name to (down [R, I], up [O, R]); the change of its weight is up · down."""


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's LoRA layers in a model, by name."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            yield name, module


def live_factors(model: nn.Module) -> Factors:
    """The factors of PEFT's LoRA layers in ``model``, scaling folded into ``up``.

    Raises:
        UnsupportedError: a variant that is no sum of a weight and two factors (DoRA, embeddings).
    """
    found: Factors = {}
    for name, module in lora_layers(model):
        adapters = list(module.lora_A)
        if len(adapters) > 1:
            raise UnsupportedError(
                f"{name} has several adapters ({', '.join(adapters)}); keep one, or merge the "
                "others into the model first."
            )
        if getattr(module, "lora_variant", None) or len(module.lora_embedding_A):
            raise UnsupportedError(
                f"{name} has a LoRA variant that gateskip cannot save; use plain LoRA on linear "
                "layers (use_dora=False)."
            )
        for adapter in adapters:
            down = module.lora_A[adapter].weight.detach()
            up = module.lora_B[adapter].weight.detach() * float(module.scaling[adapter])
            found = joined(found, {name: (down, up)})
    return found


def load_live(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write factors back into the LoRA layers that they came from (resuming a training).

    Raises:
        CheckpointError: other layers, or another rank.
    """
    layers = dict(lora_layers(model))
    if layers.keys() != factors.keys():
        name = next(iter(layers.keys() ^ factors.keys()))
        raise CheckpointError(f"the checkpoint has other LoRA layers ({name}); use its options.")
    with torch.no_grad():
        for name, (down, up) in factors.items():
            module = layers[name]
            (adapter,) = module.lora_A
            mine = module.lora_A[adapter].weight
            if mine.shape != down.shape:
                raise CheckpointError(
                    f"the checkpoint has LoRA rank {down.shape[0]} at {name}, this training "
                    f"{mine.shape[0]}; use its options."
                )
            mine.copy_(down)
            module.lora_B[adapter].weight.copy_(up / float(module.scaling[adapter]))


def joined(first: Factors, second: Mapping[str, tuple[Tensor, Tensor]]) -> Factors:
    """The sum of two changes, as factors."""
    out = dict(first)
    for name, (down, up) in second.items():
        if name in out:
            a, b = out[name]
            down = torch.cat((a, down.to(a)))
            up = torch.cat((b, up.to(b)), 1)
        out[name] = (down, up)
    return out


def merge(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Add the change to the weights, in float32, rounded once.

    Raises:
        CheckpointError: no such module, or another shape. UnsupportedError: quantised weights.
    """
    weights: dict[str, Tensor] = {}
    for name, (down, up) in factors.items():  # all checks before the first change
        try:
            module: Any = model.get_submodule(name)
        except AttributeError as error:
            raise CheckpointError(f"the backbone's change names {name!r}, not in it.") from error
        weights[name] = mergeable(name, getattr(module, "base_layer", module))
        if weights[name].shape != (up.shape[0], down.shape[1]):
            raise CheckpointError(f"the change of {name} has another shape than its weight.")
    for name, (down, up) in factors.items():
        weight = weights[name]
        with torch.no_grad():
            change = up.to(weight.device).float() @ down.to(weight.device).float()
            weight.copy_((weight.float() + change).to(weight.dtype))


def mergeable(name: str, layer: nn.Module) -> nn.Parameter:
    """The weight of a linear layer. Raises UnsupportedError where it is quantised."""
    weight = _plain_weight(layer)
    if weight is None:
        raise UnsupportedError(
            f"{name} is quantised or no plain linear layer, so a trained change cannot be merged "
            "into it; train without quantization_config and quantise afterwards."
        )
    return weight


def quantised(layer: nn.Module) -> bool:
    """Whether a linear layer's weight is packed, by bitsandbytes or torchao."""
    return isinstance(layer, nn.Linear) and _plain_weight(layer) is None


def _plain_weight(layer: nn.Module) -> nn.Parameter | None:
    weight = layer._parameters.get("weight")
    plain = type(layer) is nn.Linear and type(weight) is nn.Parameter
    return weight if plain and weight is not None and weight.is_floating_point() else None


def fits(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether every named layer's weight is a plain one that a change can be merged into."""
    modules = (model.get_submodule(name) for name in names)
    layers = (getattr(module, "base_layer", module) for module in modules)
    return all(_plain_weight(layer) is not None for layer in layers)


def add_live(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Add LoRA layers that compute a change beside quantised weights, which cannot take it up.

    Raises:
        CheckpointError: PEFT is not installed, or the layers are not the model's.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise CheckpointError(
            "the backbone's change stays beside quantised weights, which needs PEFT: "
            "pip install gateskip[train]."
        ) from error
    ranks = {name: int(down.shape[0]) for name, (down, _) in factors.items()}
    highest = max(ranks.values())
    config = LoraConfig(
        r=highest, lora_alpha=highest, target_modules=sorted(ranks), rank_pattern=ranks,
        alpha_pattern=ranks, init_lora_weights=False,
    )  # fmt: skip
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise CheckpointError(f"the backbone's change names layers not in it ({error}).") from error
    load_live(model, factors)


def merge_live(model: nn.Module) -> Factors:
    """Merge PEFT's LoRA layers and put the plain layers back; returns their factors."""
    factors = {n: (d.float().cpu(), u.float().cpu()) for n, (d, u) in live_factors(model).items()}
    merge(model, factors)
    for name, module in list(lora_layers(model)):
        parent, _, child = name.rpartition(".")
        base = module.base_layer
        # PEFT froze it; a model without adapters is trainable, as it was loaded.
        base.requires_grad_(base.weight.is_floating_point())
        setattr(model.get_submodule(parent), child, base)
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        vars(model).pop(attribute, None)
    return factors


@contextlib.contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Run with the LoRA layers switched off within the block."""
    layers = [module for _, module in lora_layers(model)]
    before = [module._disable_adapters for module in layers]
    for module in layers:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module, value in zip(layers, before, strict=True):
            module._disable_adapters = value
