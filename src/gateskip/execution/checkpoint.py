"""Public ``save`` and ``load`` of a gated model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gateskip.config import Budget, GateConfig
from gateskip.errors import CheckpointError
from gateskip.execution.api import attach, detach
from gateskip.retrofit.attach import gated_branches
from gateskip.retrofit.checkpoint import read_checkpoint, write_checkpoint
from gateskip.retrofit.fingerprint import check_fingerprint
from gateskip.skipping.compensation import Compensation, set_compensation
from gateskip.skipping.policy import ThresholdTable
from gateskip.skipping.state import state_of

__all__ = ["load", "save"]


def save(model: nn.Module, path: str | Path, *, overwrite: bool = True) -> None:
    """Write gates, compensation, thresholds and the default budget; not the base model.

    Args:
        path: folder; files of other names in it are kept.
        overwrite: False refuses a folder that exists and is not empty.

    Raises:
        AttachError: not gated. OutputError: in the way or not writable; nothing is lost then.
    """
    from gateskip import __version__

    state = state_of(model)
    tensors: dict[str, Tensor] = {}
    for (layer, kind), module in gated_branches(model, state.family).items():
        for part in ("skip_gate", "skip_compensation"):
            child = module._modules.get(part)
            if child is not None:
                for name, tensor in child.state_dict().items():
                    tensors[f"{layer}.{kind}.{part}.{name}"] = tensor
    config = {
        "gateskip_version": __version__,
        "gate": state.config.to_json(),
        "base": state.base,
        "fitted": state.fitted,
        "policy": None if state.policy is None else state.policy.to_json(),
        "budget": None if state.default_budget is None else state.default_budget.to_json(),
    }
    write_checkpoint(path, config, tensors, overwrite=overwrite)


def load(
    path: str | Path,
    base: str | Path | nn.Module | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
) -> Any:
    """Rebuild a gated model from its folder (or hub name) and its base model.

    Args:
        path: what :func:`save` wrote, or a hub repository that holds it.
        base: name, folder or already loaded base model; None takes the name that was saved.
        dtype, device_map, quantization_config: passed to ``from_pretrained``.

    Raises:
        CheckpointError: missing, damaged, too new, or made for another base model.
        UnsupportedError: an unsupported architecture.
    """
    folder = _folder(path)
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
    check_fingerprint(base_info, model, str(folder))
    attach(model, gate)
    try:
        _fill(model, config, tensors, str(folder))
    except BaseException:
        detach(model)
        raise
    return model.eval()


def _folder(path: str | Path) -> Path:
    if Path(path).exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") != 1:
        return Path(path).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=["gateskip_*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"path={str(path)!r} is no local folder and the hub did not give it: {error}."
        ) from error


def _fill(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], where: str) -> None:
    state = state_of(model)
    left = dict(tensors)
    for (layer, kind), module in gated_branches(model, state.family).items():
        prefix = f"{layer}.{kind}."
        gate = module._modules["skip_gate"]
        assert gate is not None
        wanted = gate.state_dict()
        for name, mine in wanted.items():
            found = left.pop(f"{prefix}skip_gate.{name}", None)
            if found is None or found.shape != mine.shape:
                raise CheckpointError(
                    f"{where}: gate tensor {prefix}{name} is missing or misshapen."
                )
            wanted[name] = found
        gate.load_state_dict(wanted)
        parts = {
            n: left.pop(f"{prefix}skip_compensation.{n}", None) for n in ("bias", "down", "up")
        }
        if parts["bias"] is not None:
            set_compensation(module, Compensation(parts["bias"], parts["down"], parts["up"]))
            state.compensated = True
    if left:
        raise CheckpointError(f"{where}: unknown tensor {next(iter(left))!r}; upgrade gateskip.")
    state.fitted = bool(config.get("fitted"))
    if config.get("policy") is not None:
        state.policy = ThresholdTable.from_json(config["policy"])
    budget = Budget.of(config.get("budget"))
    if budget is not None:
        state.resolve(budget)
        state.default_budget = budget
