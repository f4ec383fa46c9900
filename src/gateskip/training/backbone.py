"""What is trained: gates, compensation, and the backbone frozen, by LoRA or in full."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gateskip.errors import ConfigError, UnsupportedError
from gateskip.execution.api import dense
from gateskip.gates import Gate
from gateskip.retrofit.attach import gated_branches, inner_model, layers_of
from gateskip.retrofit.lora import (
    fits,
    joined,
    live_factors,
    lora_layers,
    merge_live,
    mergeable,
    quantised,
)
from gateskip.skipping.compensation import Compensation, set_compensation
from gateskip.skipping.state import state_of
from gateskip.training.config import GateSkipTrainingConfig

__all__ = ["adapted", "dense_copy", "finish", "free_added", "own_rates", "parts", "prepare"]


def parts(model: nn.Module) -> dict[str, set[int]]:
    """ids of the parameters of ``"gates"``, ``"compensation"`` and learned ``"thresholds"``."""
    found = {
        name: {
            id(p)
            for module in model.modules()
            if isinstance(module, kind)
            for p in module.parameters(recurse=False)
        }
        for name, kind in (("gates", Gate), ("compensation", Compensation))
    }
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    found["thresholds"] = {id(gate.threshold) for gate in gates if gate.threshold is not None}
    found["gates"] -= found["thresholds"]
    return found


def prepare(model: nn.Module, config: GateSkipTrainingConfig, *, add_lora: bool = True) -> None:
    """Freeze, add LoRA layers, and make small trained parts float32, in place.

    Args:
        add_lora: False where somebody else will.

    Raises:
        UnsupportedError: a quantised backbone in full. ConfigError: PEFT is not installed.
    """
    state = state_of(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if config.backbone == "lora" and add_lora:
        _add_lora(inner_model(model), config)
    elif config.backbone == "full":
        _free(model)
        state.backbone_trained = True
    free_added(model, config)
    # Parameters that are still to come.
    later = config.thresholds == "learned" or not add_lora
    if not later and not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            "nothing is trained: there is no compensation yet (call gateskip.fit first), and "
            "gates and backbone are frozen."
        )


def free_added(model: nn.Module, config: GateSkipTrainingConfig) -> None:
    """Let what was added be trained, as the config says; small parts become float32."""
    state = state_of(model)
    gates = config.arm == "gateskip"
    for module in gated_branches(model, state.family).values():
        for child in module.children():
            if isinstance(child, Gate):
                for parameter in child.parameters(recurse=False):
                    learned = parameter is child.threshold
                    parameter.requires_grad_(gates and (learned or config.train_gates))
            elif isinstance(child, Compensation):
                # bfloat16 would round small updates away.
                child.float()
                for parameter in child.parameters():
                    parameter.requires_grad_(gates and config.train_compensation)


def _free(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if ".skip_" in name:
            continue
        if not parameter.is_floating_point():
            raise UnsupportedError(
                f"{name} is quantised; load the model without quantization_config, train, and "
                "quantise afterwards."
            )
        parameter.requires_grad_(True)
    dtype = next(model.parameters()).dtype
    if dtype in (torch.bfloat16, torch.float16):
        warnings.warn(
            f"a {str(dtype).removeprefix('torch.')} backbone loses small updates to rounding; "
            "load it with dtype='float32' and pass bf16=True to the training arguments.",
            stacklevel=3,
        )


def _add_lora(model: nn.Module, config: GateSkipTrainingConfig) -> None:
    if live_factors(model):  # the user's own, or an earlier trainer's
        _fuse_lora(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("backbone='lora' needs PEFT: pip install gateskip[train].") from error
    state = state_of(model)
    linear = [
        (name, module)
        for layer in layers_of(model, state.family)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    for name, module in linear:
        if not quantised(module):
            mergeable(name, module)  # now, not when training is over
    if not linear:
        raise ConfigError(
            f"backbone='lora' needs linear layers, and {state.family.model_type} has none; use "
            "backbone='full' or 'frozen'."
        )
    mine = {id(module) for _, module in linear}
    names = sorted(name for name, module in model.named_modules() if id(module) in mine)
    options: Any = {
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        # In full: of bare names PEFT would make out that fused experts are meant too.
        "target_modules": names,
    }
    inject_adapter_in_model(LoraConfig(**options), model)
    for name, layer in lora_layers(model):  # PEFT may have taken more than it was told to
        if not quantised(layer.base_layer):
            mergeable(name, layer.base_layer)
    _fuse_lora(model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:  # bfloat16 would round small updates away
            parameter.data = parameter.data.float()


def _fuse_lora(model: nn.Module) -> None:
    from gateskip.training.lora_linear import speed_up  # PEFT is an extra

    speed_up(model)


def own_rates(optimizer: Any, model: nn.Module, config: GateSkipTrainingConfig) -> None:
    """Move what was added, where it has a learning rate of its own, to groups of its own."""
    rates = {
        "gates": config.gate_learning_rate,
        "compensation": config.compensation_learning_rate,
        "thresholds": config.threshold_learning_rate,
    }
    ids = parts(model)
    for group in list(optimizer.param_groups):
        for name, rate in rates.items():
            mine = [p for p in group["params"] if id(p) in ids[name]]
            if rate is None or not mine:
                continue
            group["params"] = [p for p in group["params"] if id(p) not in ids[name]]
            options = {k: v for k, v in group.items() if k not in ("params", "lr")}
            optimizer.add_param_group(options | {"params": mine, "lr": rate})
    optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]


def dense_copy(model: Any) -> nn.Module:
    """The dense model before training, a teacher for a backbone that is trained in full."""
    from transformers import AutoModelForCausalLM

    with dense(model):
        weights = {n: p for n, p in model.state_dict().items() if ".skip_" not in n}
        first = next(model.parameters())
        copy: nn.Module = AutoModelForCausalLM.from_config(model.config, dtype=first.dtype)
        missing = copy.load_state_dict(weights, strict=False).missing_keys
    if set(missing) - set(getattr(copy, "_tied_weights_keys", None) or ()):
        raise UnsupportedError(f"the teacher's copy lacks {missing[0]!r}; set distill=0.")
    return copy.to(first.device).eval().requires_grad_(False)


@contextlib.contextmanager
def adapted(model: nn.Module) -> Iterator[None]:
    """The Trainer refuses quantised weights without adapters; what was added here are some."""
    name, held = "_hf_peft_config_loaded", vars(model)
    before = held.get(name)
    if getattr(model, "is_quantized", False):
        held[name] = True
    try:
        yield
    finally:
        if before is None:
            held.pop(name, None)
        else:
            held[name] = before


def finish(model: nn.Module) -> None:
    """After training: LoRA merged into the weights, compensation in the model's dtype.

    The model computes what it did, without LoRA's cost; saving it writes the factors. Beside
    quantised weights LoRA layers stay.
    """
    state, model = state_of(model), inner_model(model)
    live = live_factors(model)
    if live and fits(model, live):
        state.tuned = joined(state.tuned, merge_live(model))
    for module in gated_branches(model, state.family).values():
        for child in list(module.children()):
            if isinstance(child, Compensation):
                set_compensation(module, child)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
