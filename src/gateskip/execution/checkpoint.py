"""Public ``save`` and ``load`` of a gated model."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gateskip.config import Budget, GateConfig
from gateskip.errors import BudgetError, CheckpointError
from gateskip.execution.api import attach, detach
from gateskip.execution.top_k_attention import keys_kept, set_top_k_attention
from gateskip.retrofit.attach import gated_branches, inner_model, is_sharded
from gateskip.retrofit.checkpoint import read_backbone, read_checkpoint, write_checkpoint
from gateskip.retrofit.fingerprint import check_fingerprint
from gateskip.retrofit.hub import download, is_hub_name
from gateskip.retrofit.lora import (
    Factors,
    add_live,
    joined,
    live_factors,
    load_live,
    merge,
    quantised,
)
from gateskip.skipping.compensation import Compensation, compensation_of, set_compensation
from gateskip.skipping.latency import LatencyRecord
from gateskip.skipping.policy import ThresholdTable
from gateskip.skipping.rule import RULES
from gateskip.skipping.state import GateSkipState, state_of

__all__ = ["load", "save"]


RULE = "rule."  # before the names of a rule's tensors


def save(
    model: nn.Module,
    path: str | Path,
    *,
    overwrite: bool = True,
    dtype: torch.dtype | None = None,
) -> None:
    """Write gates, compensation, thresholds and the default budget; not the base model.

    What training changed in the backbone is written too: LoRA as its factors, merged or not, a
    backbone trained in full as its weights.

    Args:
        path: folder; files of other names in it are kept.
        overwrite: False refuses a folder that exists and is not empty.
        dtype: store compensation and LoRA in this dtype; gates stay float32.

    Of a model under ``fully_shard`` every process has to call it, and the first one writes.

    Raises:
        AttachError: not gated. OutputError: in the way or not writable; nothing is lost then.
    """
    from gateskip import __version__

    state, model = state_of(model), inner_model(model)
    tensors: dict[str, Tensor] = {}
    if state.rule is not None:
        tensors |= {RULE + name: t.detach().cpu() for name, t in state.rule.tensors().items()}
    seen: set[nn.Module] = set()  # a gate of all layers is written once
    for (layer, kind), module in gated_branches(model, state.family).items():
        for part in ("skip_gate", "skip_compensation"):
            child = module._modules.get(part)
            if child is not None and child not in seen:
                seen.add(child)
                for name, tensor in child.state_dict().items():
                    gate = part == "skip_gate"
                    tensors[f"{layer}.{kind}.{part}.{name}"] = _stored(tensor, dtype, gate)
    for prefix, factors in (("merged", state.tuned), ("lora", live_factors(model))):
        for name, pair in factors.items():
            for factor, tensor in zip(("down", "up"), pair, strict=True):
                tensors[f"{prefix}.{name}.{factor}"] = _stored(tensor, dtype, False)
    backbone: dict[str, Tensor] | None = None
    if state.backbone_trained:
        backbone = _whole(_backbone(model))
    tensors = _whole(tensors)
    if is_sharded(model, state.family) and torch.distributed.get_rank():
        return
    config = {
        "gateskip_version": __version__,
        "gate": state.config.to_json(),
        "base": state.base,
        "gates_sha256": _hash(tensors),
        "fitted": state.fitted,
        "method": state.method,
        "rule": None if state.rule is None else state.rule.name,
        "backbone_trained": state.backbone_trained,
        "policy": None if state.policy is None else state.policy.to_json(),
        "latency": [dataclasses.asdict(record) for record in state.latency],
        "budget": None if state.default_budget is None else state.default_budget.to_json(),
        "top_k_attention": keys_kept(model.config),
    }
    write_checkpoint(path, config, tensors, overwrite=overwrite, backbone=backbone)


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """Hash of all gates, which thresholds belong to."""
    found = hashlib.sha256()
    for name in sorted(name for name in tensors if ".skip_gate." in name):
        found.update(name.encode())
        found.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _stored(tensor: Tensor, dtype: torch.dtype | None, gate: bool) -> Tensor:
    return tensor if gate or dtype is None else tensor.to(dtype)


def load(
    path: str | Path,
    base: str | Path | nn.Module | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    revision: str | None = None,
) -> Any:
    """Rebuild a gated model from its folder (or hub name) and its base model.

    Args:
        path: what :func:`save` wrote, or a hub repository that holds it.
        base: name, folder or already loaded base model; None takes the name that was saved.
        dtype, device_map, quantization_config: passed to ``from_pretrained``.
        revision: branch, tag or commit of the hub repository of the gates.

    Raises:
        CheckpointError: missing, damaged, too new, or made for another base model.
        UnsupportedError: an unsupported architecture.
    """
    folder = _folder(path, revision)
    config, tensors = read_checkpoint(folder)
    try:
        gate, base_info = GateConfig.from_json(config["gate"]), config["base"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} lacks {error}; save again.") from error
    model = base if isinstance(base, nn.Module) else None
    if model is None:
        name = str(base or base_info.get("name_or_path") or "")
        if not name:
            raise CheckpointError(f"{folder} does not name its base model; pass base=.")
        from transformers import AutoModelForCausalLM

        options = {"device_map": device_map, "quantization_config": quantization_config}
        given = {k: v for k, v in options.items() if v is not None}
        if dtype is not None:
            given["dtype"] = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        try:
            model = AutoModelForCausalLM.from_pretrained(name, **given)
        except OSError as error:
            raise CheckpointError(
                f"base model {name!r} could not be loaded ({error}); pass base=."
            ) from error
    if "_gateskip_tuned" in vars(model):
        raise CheckpointError(
            "the base model's weights were changed by an earlier training; load it afresh."
        )
    check_fingerprint(base_info, model, str(folder))
    tuned = joined(_take_factors(tensors, "merged"), _take_factors(tensors, "lora"))
    backbone = read_backbone(folder) if config.get("backbone_trained") else None
    attach(model, gate)
    try:
        fill(model, config, tensors, str(folder))
        _tune(model, tuned, backbone, str(folder))
        set_top_k_attention(model, config.get("top_k_attention"))
    except BaseException:
        detach(model)
        raise
    return model.eval()


def _folder(path: str | Path, revision: str | None) -> Path:
    if is_hub_name(path):
        return download(str(path), revision=revision)
    if revision is not None:
        raise CheckpointError(
            f"revision={revision!r} is for a hub name, but path={str(path)!r} is a folder; drop "
            "one."
        )
    return Path(path).expanduser()


def _backbone(model: nn.Module) -> dict[str, Tensor]:
    """The backbone's weights under the names that they have without LoRA layers."""
    return {
        name.replace(".base_layer.", "."): p
        for name, p in model.named_parameters()
        if ".skip_" not in name and ".lora_" not in name
    }


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with shards gathered; every process has to come here."""
    return {n: getattr(t, "full_tensor", lambda t=t: t)() for n, t in tensors.items()}


def _take_factors(tensors: dict[str, Tensor], prefix: str) -> Factors:
    """Move the backbone's factors out of a checkpoint's tensors."""
    begin = f"{prefix}."
    names = {n.removeprefix(begin).rpartition(".")[0] for n in tensors if n.startswith(begin)}
    try:
        return {
            n: (tensors.pop(f"{begin}{n}.down"), tensors.pop(f"{begin}{n}.up"))
            for n in sorted(names)
        }
    except KeyError as error:
        raise CheckpointError(f"tensor {error} is missing; save again.") from error


def _tune(model: nn.Module, tuned: Factors, backbone: dict[str, Tensor] | None, where: str) -> None:
    """Bring the backbone to where training left it."""
    state = state_of(model)
    if backbone is not None:
        _fill_backbone(model, backbone, where)
        state.backbone_trained = True
    if tuned and _packed(model, tuned):
        add_live(model, tuned)
        return
    merge(model, tuned)
    state.tuned = tuned


def _packed(model: nn.Module, factors: Factors) -> bool:
    """Whether the weights that a change is for are quantised."""
    modules = dict(model.named_modules())
    return any(name in modules and quantised(modules[name]) for name in factors)


def _fill_backbone(model: nn.Module, backbone: dict[str, Tensor], where: str) -> None:
    mine = _backbone(model)
    if mine.keys() != backbone.keys():
        name = next(iter(mine.keys() ^ backbone.keys()))
        raise CheckpointError(f"{where}: backbone weight {name!r} is missing or unknown.")
    with torch.no_grad():
        for name, weight in mine.items():
            if weight.shape != backbone[name].shape or not weight.is_floating_point():
                raise CheckpointError(f"{where}: backbone weight {name!r} does not fit.")
            weight.copy_(backbone[name])


def restore(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Bring a gated model, with LoRA layers or without, to a checkpoint of itself.

    Returns:
        The checkpoint's config.

    Raises:
        CheckpointError: damaged, or of another configuration.
    """
    config, tensors = read_checkpoint(Path(path))
    state = state_of(model)
    theirs, mine = config.get("gate"), state.config.to_json()
    if theirs != mine:
        names = [k for k in mine if not isinstance(theirs, dict) or theirs.get(k) != mine[k]]
        raise CheckpointError(f"{path} was made with another gate config ({', '.join(names)}).")
    merged, live = _take_factors(tensors, "merged"), _take_factors(tensors, "lora")
    if merged.keys() != state.tuned.keys():
        raise CheckpointError(f"{path} belongs to a model with another training before this one.")
    if live:
        load_live(model, live)
    fill(model, config, tensors, str(path))
    if config.get("backbone_trained"):
        _fill_backbone(model, read_backbone(Path(path)), str(path))
    return config


def fill(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], where: str) -> None:
    """Write a checkpoint's gates, compensation, thresholds and budget into a gated model.

    Raises:
        CheckpointError: a tensor is missing, misshapen or unknown.
    """
    state = state_of(model)
    if config.get("gates_sha256", _hash(tensors)) != _hash(tensors):
        raise CheckpointError(
            f"{where}: the thresholds in gateskip_config.json are of another gate set than "
            "gateskip_model.safetensors; copy both files of one save."
        )
    left = dict(tensors)
    if config.get("rule"):
        rule = RULES.get(config["rule"])
        named = {n.removeprefix(RULE): left.pop(n) for n in tensors if n.startswith(RULE)}
        try:
            state.rule = rule.of_tensors(named)
            getattr(state.rule, "bind", lambda _: None)(model)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{where}: rule {rule.name!r} is damaged ({error}).") from error
    filled: set[nn.Module] = set()
    for (layer, kind), module in gated_branches(model, state.family).items():
        prefix = f"{layer}.{kind}."
        gate = module._modules["skip_gate"]
        assert gate is not None
        if gate not in filled:
            _fill_gate(gate, left, prefix, where)
            filled.add(gate)
        parts = {
            n: left.pop(f"{prefix}skip_compensation.{n}", None) for n in ("bias", "down", "up")
        }
        if parts["bias"] is not None:
            _fill_compensation(module, parts)
            state.compensated = True
    if left:
        raise CheckpointError(f"{where}: unknown tensor {next(iter(left))!r}; upgrade gateskip.")
    state.fitted = bool(config.get("fitted"))
    state.method = str(config.get("method", state.method))
    if config.get("policy") is not None:
        state.policy = ThresholdTable.from_json(config["policy"])
        _check_thresholds(state, where)
    state.latency = tuple(LatencyRecord.from_json(row) for row in config.get("latency", ()))
    saved = config.get("budget")
    if saved is not None:
        budget = Budget(**saved)
        try:
            state.resolve(budget)
        except BudgetError as error:
            if budget.unit != "latency":
                raise
            warnings.warn(f"the saved budget is not in force: {error}", stacklevel=2)
        else:
            state.default_budget = budget


def _check_thresholds(state: GateSkipState, where: str) -> None:
    """Raise CheckpointError where a table's rows are not of these branches."""
    assert state.policy is not None
    rows, wanted = state.policy.thresholds, len(state.branches)
    if any(len(row) != wanted for row in rows) or len(rows) != len(state.policy.keep):
        raise CheckpointError(
            f"{where}: the thresholds are of another gate set ({len(rows[0]) if rows else 0} "
            f"branches, these gates have {wanted}); calibrate again."
        )


def _fill_gate(gate: nn.Module, left: dict[str, Tensor], prefix: str, where: str) -> None:
    """Take a gate's tensors out of ``left``."""
    wanted = gate.state_dict()
    for name, mine in wanted.items():
        found = left.pop(f"{prefix}skip_gate.{name}", None)
        if found is None or found.shape != mine.shape:
            raise CheckpointError(f"{where}: gate tensor {prefix}{name} is missing or misshapen.")
        wanted[name] = found
    gate.load_state_dict(wanted)


def _fill_compensation(module: nn.Module, parts: dict[str, Tensor | None]) -> None:
    """Into the parameters that are there, which an optimiser may hold, or new ones."""
    bias = parts["bias"]
    assert bias is not None
    there = compensation_of(module)
    fits = there is not None and all(
        (getattr(there, name) is None) == (tensor is None)
        and (tensor is None or getattr(there, name).shape == tensor.shape)
        for name, tensor in parts.items()
    )
    if not fits:
        # Copies: a file's tensors lie anywhere in memory, and sums depend on how they are aligned.
        own = [None if t is None else t.clone() for t in (bias, parts["down"], parts["up"])]
        set_compensation(module, Compensation(*own))  # type: ignore[arg-type]
        return
    with torch.no_grad():
        for name, tensor in parts.items():
            if tensor is not None:
                getattr(there, name).copy_(tensor)
