"""In-place surgery on a model: gates as new children, layers as dynamic subclasses, and back.

Nothing is re-parented, so base parameter names stay. The layers' classes are replaced by
subclasses of the same name (instance-level ``forward`` would bypass gradient checkpointing, and
``_no_split_modules`` matches by name). What the new ``forward`` does is handed in as *wiring*,
since execution is not known here.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn

from gateskip.config import BranchKey, GateConfig
from gateskip.errors import AttachError, UnsupportedError
from gateskip.gates import GATES, Gate
from gateskip.retrofit.devices import device_of, is_patched, rebind
from gateskip.retrofit.families import FAMILIES, FamilySpec

__all__ = [
    "Wiring",
    "branch_module",
    "decoder_of",
    "find_family",
    "gate_of",
    "gated_branches",
    "head_of",
    "inner_model",
    "install",
    "is_gated",
    "is_sharded",
    "layers_of",
    "resume",
    "suspend",
    "uninstall",
]

STATE_ATTRIBUTE = "_gateskip"
GATE_NAME = "skip_gate"


@dataclasses.dataclass(frozen=True, slots=True)
class Wiring:
    """The functions that make installed gates do something.

    Attributes:
        layer_forward: replaces a decoder layer's ``forward``.
        decoder_hook: forward pre-hook (with keyword arguments) of the decoder.
        methods: methods of the model that are replaced, by name.
        head_forward: replaces the LM head's ``forward``, where it is a plain linear layer.
    """

    layer_forward: Callable[..., Any]
    decoder_hook: Callable[..., Any]
    methods: Mapping[str, Callable[..., Any]]
    head_forward: Callable[..., Any]


def find_family(config: Any) -> FamilySpec:
    """The family of a Hugging Face config. Raises UnsupportedError with the supported list."""
    name = getattr(config, "model_type", None)
    if name not in FAMILIES.names():
        raise UnsupportedError(
            f"model_type={name!r} is not supported; supported are {', '.join(FAMILIES.names())}."
        )
    return FAMILIES.get(name)


def inner_model(model: nn.Module) -> nn.Module:
    """The causal LM within wrappers: PEFT's, data-parallel and compiled ones."""
    while True:
        if hasattr(type(model), "get_base_model"):  # PEFT's
            model = cast(Any, model).get_base_model()
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif "_orig_mod" in vars(model)["_modules"]:  # torch.compile's
            model = cast(Any, model)._orig_mod
        else:
            return model


def decoder_of(model: nn.Module, family: FamilySpec) -> nn.Module:
    """The module that owns the layers."""
    return inner_model(model).get_submodule(family.decoder)


def layers_of(model: nn.Module, family: FamilySpec) -> list[nn.Module]:
    """The decoder layers, first to last."""
    return list(getattr(decoder_of(model, family), family.layers))


def head_of(model: nn.Module) -> nn.Module | None:
    """The module that makes logits of hidden states, or None."""
    found = getattr(inner_model(model), "get_output_embeddings", lambda: None)()
    return found if isinstance(found, nn.Module) else None


def branch_module(layer: nn.Module, family: FamilySpec, kind: str) -> nn.Module:
    """A layer's attention or MLP."""
    found: nn.Module = getattr(layer, family.attention if kind == "attention" else family.mlp)
    return found


def gated_branches(model: nn.Module, family: FamilySpec) -> dict[BranchKey, nn.Module]:
    """Branch modules that have a gate, in execution order."""
    return {
        (index, kind): branch_module(layer, family, kind)
        for index, layer in enumerate(layers_of(model, family))
        for kind in ("attention", "mlp")
        if hasattr(branch_module(layer, family, kind), GATE_NAME)
    }


def _gated_class(cls: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    namespace = {
        "forward": forward,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_gateskip_base": cls,
    }
    return type(cls.__name__, (cls,), namespace)


def install(
    model: nn.Module, family: FamilySpec, config: GateConfig, state: object, wiring: Wiring
) -> None:
    """Gate ``model`` in place; on any failure it is left as it was.

    Raises:
        AttachError: the model has gates already.
        UnsupportedError: layers that are offloaded or patched.
    """
    if STATE_ATTRIBUTE in vars(model):
        raise AttachError("model is gated already; call gateskip.detach(model) first.")
    _check_layers(model, family)
    generator = torch.Generator().manual_seed(config.seed)
    hidden: int = cast(Any, model).config.hidden_size
    gate_classes = {kind: GATES.get(config.kind_of(kind)) for kind in config.branches}
    try:
        classes: dict[type[nn.Module], type[nn.Module]] = {}
        common: dict[str, Gate] = {}
        decoder = decoder_of(model, family)
        for index, layer in enumerate(layers_of(model, family)):
            for kind in config.branches:
                if not config.gates((index, kind)):
                    continue
                module = branch_module(layer, family, kind)
                gate, gate_class = common.get(kind), gate_classes[kind]
                if gate is None:
                    gate = gate_class.build(config, hidden, generator)
                    gate.detach_input = config.detach_input
                    if config.importance == "head" and config.kind_of(kind) == config.kind:
                        gate.add_head(hidden)
                    gate.to(device_of(module))
                    gate.train(module.training)
                if gate_class.shared:
                    common[kind] = gate
                    _check_device(gate, module, config.kind)
                module.add_module(GATE_NAME, gate)
            base = type(layer)
            classes.setdefault(base, _gated_class(base, wiring.layer_forward))
            vars(layer)["_gateskip_layer"] = (state, index)
            layer.__class__ = classes[base]
            rebind(layer)
        head = head_of(model)
        if type(head) is nn.Linear:
            head.__class__ = _gated_class(nn.Linear, wiring.head_forward)  # type: ignore[assignment]
            rebind(head)
        vars(decoder)[STATE_ATTRIBUTE] = state
        decoder.register_forward_pre_hook(wiring.decoder_hook, with_kwargs=True)
        for name, method in wiring.methods.items():
            vars(model)[name] = types.MethodType(method, model)
        vars(model)[STATE_ATTRIBUTE] = state
    except BaseException:
        uninstall(model, family, wiring)
        raise


def _check_device(gate: Gate, module: nn.Module, kind: str) -> None:
    if gate.score_scale.device != device_of(module):
        raise UnsupportedError(
            f"kind={kind!r} has one gate for all layers, and these are on several devices; choose "
            "another kind, or one device."
        )


def _check_layers(model: nn.Module, family: FamilySpec) -> None:
    """Raise UnsupportedError where a layer's class would not be asked, or weights are elsewhere."""
    for index, layer in enumerate(layers_of(model, family)):
        if is_patched(layer):
            raise UnsupportedError(
                f"layer {index} has a forward of its own (a patch), so it would run dense; attach "
                "gates before patching."
            )
        if device_of(layer).type == "meta":
            raise UnsupportedError(
                f"layer {index} has no weights (it is on the meta device); load the model first."
            )


def uninstall(model: nn.Module, family: FamilySpec, wiring: Wiring) -> None:
    """Take everything out that :func:`install` put in, whether or not it got to the end."""
    suspend(model, family, wiring)
    decoder = decoder_of(model, family)
    for layer in layers_of(model, family):
        for name in [name for name in vars(layer) if name.startswith("_gateskip")]:
            del vars(layer)[name]
        for kind in ("attention", "mlp"):
            module = branch_module(layer, family, kind)
            for name in (GATE_NAME, "skip_compensation"):
                module._modules.pop(name, None)
    for owner in (model, decoder):
        vars(owner).pop(STATE_ATTRIBUTE, None)


def is_gated(model: nn.Module, family: FamilySpec) -> bool:
    """Whether the layers of an attached model skip now, and are not suspended."""
    return all(hasattr(type(layer), "_gateskip_base") for layer in layers_of(model, family)[:1])


def is_sharded(model: nn.Module, family: FamilySpec) -> bool:
    """Whether FSDP2 has replaced the layers' classes in turn."""
    layer = layers_of(model, family)[0]
    return is_gated(model, family) and "_gateskip_base" not in vars(type(layer))


def gate_of(module: nn.Module) -> Gate:
    """The gate of a branch module."""
    found = getattr(module, GATE_NAME)
    assert isinstance(found, Gate)
    return found


def _gated_modules(model: nn.Module, family: FamilySpec) -> list[nn.Module]:
    """Modules whose class may be replaced."""
    head = head_of(model)
    return layers_of(model, family) + ([] if head is None else [head])


def suspend(model: nn.Module, family: FamilySpec, wiring: Wiring) -> dict[str, Any]:
    """Make ``model`` run as the dense model, gates left in place; :func:`resume` undoes it.

    Returns:
        What resume needs.
    """
    if is_sharded(model, family):
        raise UnsupportedError(
            "a model under fully_shard cannot run dense or lose its gates; do so before it is "
            "sharded."
        )
    decoder = decoder_of(model, family)
    gated = _gated_modules(model, family)
    classes = [type(module) for module in gated]
    for module in gated:
        base = type(module).__dict__.get("_gateskip_base")
        if base is not None:
            module.__class__ = base
            rebind(module)
    hooks = decoder._forward_pre_hooks
    mine = [i for i, hook in hooks.items() if hook is wiring.decoder_hook]
    for hook_id in mine:
        del hooks[hook_id]
        decoder._forward_pre_hooks_with_kwargs.pop(hook_id, None)
    methods = {n: vars(model).pop(n) for n in wiring.methods if n in vars(model)}
    return {"classes": classes, "methods": methods, "hooked": bool(mine)}


def resume(model: nn.Module, family: FamilySpec, wiring: Wiring, kept: dict[str, Any]) -> None:
    """Undo :func:`suspend`."""
    for module, cls in zip(_gated_modules(model, family), kept["classes"], strict=True):
        module.__class__ = cls
        rebind(module)
    if kept["hooked"]:  # not within another suspension
        decoder_of(model, family).register_forward_pre_hook(wiring.decoder_hook, with_kwargs=True)
    vars(model).update(kept["methods"])
