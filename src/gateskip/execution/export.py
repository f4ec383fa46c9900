"""``export_static``: a plain Hugging Face checkpoint without the branches that are never used.

Whole layers go, and the rest is renumbered. A single branch cannot go, since a plain model computes
both of a layer: its output is made zero, which changes the logits alike and saves nothing.

Shapes: H hidden.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gateskip.config import BranchKey, Budget
from gateskip.errors import BudgetError, ConfigError, OutputError, UnsupportedError
from gateskip.gates import Gate
from gateskip.retrofit.attach import branch_module, gate_of, inner_model, layers_of
from gateskip.retrofit.checkpoint import check_output_folder
from gateskip.retrofit.lora import live_factors
from gateskip.skipping.compensation import compensation_of
from gateskip.skipping.policy import OFF
from gateskip.skipping.state import GateSkipState, state_of

__all__ = ["ExportReport", "export_static", "never_used"]

#: Projections that end a branch, in the families that are built in.
ENDS = {
    "attention": ("o_proj", "dense", "c_proj"),
    "mlp": ("down_proj", "dense_4h_to_h", "c_proj", "experts.down_proj"),
}
PROBES, PROBE_SCALE = 8, 10.0
#: Lists of a config that have an entry for each layer.
BY_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")


@dataclasses.dataclass(frozen=True, slots=True)
class ExportReport:
    """What was exported.

    Attributes:
        removed: branches left out. layers_removed: layers that went as wholes, by old number.
        layers: layers left. zeroed: removed branches that had to stay as zeros.
        macs_saved: share of the dense decoder's MACs per token that a plain model saves.
        left_out: what the exported model lacks, where the export is not exact.
    """

    removed: tuple[BranchKey, ...]
    layers_removed: tuple[int, ...]
    layers: int
    zeroed: tuple[BranchKey, ...]
    macs_saved: float
    left_out: tuple[str, ...]


def never_used(model: nn.Module, budget: Budget | None = None) -> tuple[BranchKey, ...]:
    """Branches that are always off at a budget; None takes the model's default."""
    state = state_of(model)
    thresholds = state.resolve(budget or state.default_budget) or {}
    return tuple(key for key in state.branches if float(thresholds.get(key, 0.0)) >= OFF)


def export_static(
    model: nn.Module,
    path: str | Path,
    *,
    budget: Budget | None = None,
    remove: Collection[BranchKey] | None = None,
    exact: bool = True,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write the model without some branches as a plain checkpoint, which needs no gateskip.

    All other branches compute every token there. Logits equal those of the gated model with the
    same branches off and nothing else skipped, up to rounding where a constant gate value is
    folded into weights.

    Args:
        budget: removes what is always off at it; None takes the model's default.
        remove: these branches instead, ``(layer, "attention" | "mlp")``.
        exact: False leaves out gate values that vary with the token and compensation of removed
            branches, neither of which a plain model has; it is said in the report.
        tokenizer: saved beside the model.

    Raises:
        BudgetError: no branch is always off. ConfigError: ``remove`` names what is no branch, or
            every layer. UnsupportedError: something has no place in a plain checkpoint.
        OutputError: the folder is in the way, or cannot be written.
    """
    state, inner = state_of(model), inner_model(model)
    check_output_folder(path, overwrite)
    removed = _removed(model, state, budget, remove)
    if any(hasattr(module, "base_layer") for module in inner.modules()):
        raise UnsupportedError("export needs PEFT's layers merged; call merge_and_unload() first.")
    if any(_packed(module) for module in inner.modules()) or live_factors(inner):
        raise UnsupportedError(
            "export needs plain weights; load the gates onto the unquantised model first."
        )
    left_out = _inexact(inner, state, removed)
    if left_out and exact:
        raise UnsupportedError(
            f"a plain checkpoint has no place for {'; '.join(left_out)}. Pass exact=False "
            "(--approximate) to leave that out."
        )
    count = state.shape.layers
    gone = tuple(i for i in range(count) if (i, "attention") in removed and (i, "mlp") in removed)
    if len(gone) == count:
        raise ConfigError("remove: no layer would be left.")
    stay = [i for i in range(count) if i not in gone]
    tensors = _tensors(inner, state, stay, removed, fold=not left_out)
    _write(inner, Path(path), _config(inner, state, stay), tensors, tokenizer)
    costs, keys = state.costs(), state.policy.mean_keys if state.policy else 1.0
    whole = {key: cost.computed + cost.per_key * keys for key, cost in costs.items()}
    saved = sum(value for key, value in whole.items() if key[0] in gone)
    return ExportReport(
        removed=removed,
        layers_removed=gone,
        layers=len(stay),
        zeroed=tuple(key for key in removed if key[0] not in gone),
        macs_saved=saved / sum(whole.values()),
        left_out=tuple(left_out),
    )


def _removed(
    model: nn.Module,
    state: GateSkipState,
    budget: Budget | None,
    remove: Collection[BranchKey] | None,
) -> tuple[BranchKey, ...]:
    if remove is None:
        found = never_used(model, budget)
        if not found:
            raise BudgetError(
                f"no branch is always off at {budget or state.default_budget or 'full compute'}; "
                'calibrate with allocation="searched", or name branches in remove=.'
            )
        return found
    every = {(i, kind) for i in range(state.shape.layers) for kind in ("attention", "mlp")}
    for key in remove:
        if tuple(key) not in every:
            raise ConfigError(
                f"remove: {key!r} is no branch; give (layer, 'attention' or 'mlp') with layers "
                f"0 to {state.shape.layers - 1}."
            )
    if not remove:
        raise ConfigError("remove=() removes nothing; name branches.")
    return tuple(sorted((int(layer), kind) for layer, kind in remove))


def constant_value(gate: Gate) -> Tensor | None:
    """The gate's value ``[H or 1]``, float32, where it is the same for every input; else None."""
    width = gate.decision_vector()[0].shape[0]
    generator = torch.Generator().manual_seed(0)
    u = PROBE_SCALE * torch.randn(PROBES, width, generator=generator)
    with torch.no_grad():
        values = torch.sigmoid(gate.logits(u.to(gate.score_scale.device))).cpu()
    return values[0] if bool((values == values[0]).all()) else None


def _packed(module: nn.Module) -> bool:
    weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
    return weight is not None and not (type(weight) is nn.Parameter and weight.is_floating_point())


def _inexact(model: nn.Module, state: GateSkipState, removed: Collection[BranchKey]) -> list[str]:
    """What the gated model has, with these branches off, and a plain checkpoint lacks."""
    varying = compensated = 0
    for key in state.branches:
        module = branch_module(layers_of(model, state.family)[key[0]], state.family, key[1])
        if key in removed:
            found = compensation_of(module)
            compensated += found is not None and any(bool(p.any()) for p in found.parameters())
            continue
        value = constant_value(gate_of(module))
        if value is None or (state.config.placement == "before" and not bool((value == 1).all())):
            varying += 1
    told = []
    if varying:
        told.append(f"the gate values of {varying} branches, which vary with the token")
    if compensated:
        told.append(f"the compensation of {compensated} removed branches")
    return told


def _tensors(
    model: nn.Module,
    state: GateSkipState,
    stay: list[int],
    removed: Collection[BranchKey],
    fold: bool,
) -> dict[str, Tensor]:
    """The plain model's weights, renumbered, removed branches zero, constant gates folded."""
    family = state.family
    prefix = f"{family.decoder}.{family.layers}."
    number = {old: new for new, old in enumerate(stay)}
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if ".skip_gate." in name or ".skip_compensation." in name:
            continue
        if name.startswith(prefix):
            at, _, rest = name.removeprefix(prefix).partition(".")
            if int(at) not in number:
                continue
            name = f"{prefix}{number[int(at)]}.{rest}"
        found[name] = tensor
    layers = layers_of(model, family)
    for old in stay:
        for kind in ("attention", "mlp"):
            key = (old, kind)
            factor: Tensor | None = None
            if key in removed:
                factor = torch.zeros(1)
            elif fold and key in state.branches:
                factor = constant_value(gate_of(branch_module(layers[old], family, kind)))
            if factor is not None and not bool((factor == 1).all()):
                _scale(found, f"{prefix}{number[old]}.", layers[old], family, kind, factor)
    return found


def _scale(
    tensors: dict[str, Tensor], prefix: str, layer: nn.Module, family: Any, kind: str, by: Tensor
) -> None:
    """Multiply what a branch adds by constants ``[H or 1]``, in its last weights."""
    norms = [
        name
        for name in (family.attention_out if kind == "attention" else family.mlp_out)
        if f"{prefix}{name}.weight" in tensors
    ]
    if norms:  # a norm undoes what is scaled before it
        name = f"{prefix}{norms[-1]}.weight"
        offset = 1.0 if family.norm_kind == "rms_offset" else 0.0
        weight = tensors[name]
        tensors[name] = ((weight.float() + offset) * by.to(weight.device) - offset).to(weight.dtype)
        _scale_vector(tensors, f"{prefix}{norms[-1]}.bias", by)
        return
    below = f"{prefix}{family.attention if kind == 'attention' else family.mlp}."
    for end in ENDS[kind]:
        for name in (f"{below}{end}.weight", f"{below}{end}"):
            if name in tensors:
                _scale_matrix(tensors, name, layer, by)
                _scale_vector(tensors, f"{below}{end}.bias", by)
                _scale_vector(tensors, f"{below}{end}_bias", by)
                return
    raise UnsupportedError(
        f"export does not know the last projection of {below.rstrip('.')} in {family.model_type}."
    )


def _scale_matrix(tensors: dict[str, Tensor], name: str, layer: nn.Module, by: Tensor) -> None:
    weight = tensors[name]
    hidden = by.to(weight.device)
    # Outputs are rows of a linear layer; columns of GPT-2's, and last in stacked experts.
    if weight.dim() == 2 and not _transposed(layer, name):
        hidden = hidden[:, None]
    elif weight.dim() == 3 and not _outputs_last(layer):
        hidden = hidden[:, None]
    tensors[name] = (weight.float() * hidden).to(weight.dtype)


def _transposed(layer: nn.Module, name: str) -> bool:
    from transformers.pytorch_utils import Conv1D

    path = name.rpartition(".")[0].split(".")
    module: Any = layer
    for part in path[-2:]:
        module = getattr(module, part)
    return isinstance(module, Conv1D)


def _outputs_last(layer: nn.Module) -> bool:
    """Whether stacked experts are ``[E, in, out]`` (gpt-oss), not ``[E, out, in]``."""
    return any(hasattr(module, "gate_up_proj_bias") for module in layer.modules())


def _scale_vector(tensors: dict[str, Tensor], name: str, by: Tensor) -> None:
    bias = tensors.get(name)
    if bias is not None:
        tensors[name] = (bias.float() * by.to(bias.device)).to(bias.dtype)


def _config(model: nn.Module, state: GateSkipState, stay: list[int]) -> Any:
    """The base model's config with fewer layers."""
    config: Any = copy.deepcopy(model.config)
    count = state.shape.layers
    for name in BY_LAYER:
        values = getattr(config, name, None)
        if isinstance(values, list) and len(values) == count:
            setattr(config, name, [values[i] for i in stay])
    experts = state.family.experts
    if experts is not None and experts.dense is not None and state.shape.experts:
        dense = [new for new, old in enumerate(stay) if old in state.shape.dense_layers]
        setattr(config, experts.dense, dense)
        if experts.step is not None:
            setattr(config, experts.step, 1)
    if getattr(config, "max_window_layers", None) is not None:
        config.max_window_layers = sum(old < config.max_window_layers for old in stay)
    config.num_hidden_layers = len(stay)
    return config


def _write(
    model: nn.Module, path: Path, config: Any, tensors: dict[str, Tensor], tokenizer: Any
) -> None:
    shell: Any = copy.copy(model)  # shares the modules; only the config differs
    shell.config = config
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        shell.save_pretrained(temporary, state_dict=tensors)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        path.mkdir(exist_ok=True)
        for file in _weights_first(temporary.iterdir()):
            os.replace(file, path / file.name)
    except OSError as error:
        raise OutputError(f"path={str(path)!r} could not be written: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _weights_first(files: Iterable[Path]) -> list[Path]:
    """The config last: a folder without it is no model."""
    return sorted(files, key=lambda file: (file.name == "config.json", file.name))
