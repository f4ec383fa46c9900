"""What a training will take, found by doing one step of it: ``gateskip train --dry-run``."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from typing import Any

import torch
from torch import nn

from gateskip.data import count_tokens
from gateskip.retrofit.attach import gated_branches
from gateskip.skipping.compensation import Compensation, compensation_of, set_compensation
from gateskip.skipping.state import state_of
from gateskip.training import backbone
from gateskip.training.trainer import GateSkipTrainer

__all__ = ["Plan", "add_compensation", "plan"]


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """A training's size.

    Attributes:
        parameters: all of the model. trained: those with a gradient, by part.
        rows: of the data. epochs: passes over them. tokens_per_step: mean, of all micro-batches.
        macs_per_token: of the dense decoder's forward at the rows' mean length; a step is three.
        memory_bytes: most memory of one measured step, and what the optimiser will add.
        step_seconds: of one measured micro-batch at full compute, times the accumulation.
        seconds: of all steps; fitting and calibration come on top.
    """

    parameters: int
    trained: dict[str, int]
    rows: int
    steps: int
    tokens_per_step: float
    epochs: float
    macs_per_token: float
    memory_bytes: int
    step_seconds: float
    seconds: float


def add_compensation(model: nn.Module) -> None:
    """Zeros where a fit will put compensation, so that a plan counts it."""
    state = state_of(model)
    config, hidden = state.config, state.shape.hidden
    if config.compensation == "none":
        return
    for module in gated_branches(model, state.family).values():
        if compensation_of(module) is None:
            thin = config.compensation == "low_rank"
            shapes = ((config.compensation_rank, hidden), (hidden, config.compensation_rank))
            parts = [torch.zeros(shape) for shape in shapes] if thin else []
            set_compensation(module, Compensation(torch.zeros(hidden), *parts))
    state.compensated = True


def plan(trainer: GateSkipTrainer) -> Plan:
    """Take one step's forward and backward passes, twice, and change nothing."""
    model, arguments = trainer.model, trainer.args
    loader = trainer.get_train_dataloader()
    ids = backbone.parts(model)
    trained = {"backbone": 0, "gates": 0, "compensation": 0, "thresholds": 0}
    for parameter in model.parameters():
        if parameter.requires_grad:
            part = next((name for name, mine in ids.items() if id(parameter) in mine), "backbone")
            trained[part] += parameter.numel()
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    batches, seconds = iter(loader), 0.0
    samples, items = trainer.get_batch_samples(batches, 1, device)
    model.train()
    for _ in range(2):  # the first also compiles and allocates
        _wait(device)
        began = time.perf_counter()
        trainer.training_step(model, dict(samples[0]), items)
        _wait(device)
        seconds = time.perf_counter() - began
        model.zero_grad(set_to_none=True)
    dataset: Any = trainer.train_dataset
    rows, tokens = len(dataset), count_tokens(dataset.samples)
    accumulation = int(arguments.gradient_accumulation_steps)
    per_step = arguments.per_device_train_batch_size * accumulation
    steps = int(arguments.max_steps)
    keys = sum(n * (n + 1) / 2 for n in (s.ids.shape[0] for s in dataset.samples)) / tokens
    return Plan(
        parameters=sum(p.numel() for p in model.parameters()),
        trained={name: count for name, count in trained.items() if count},
        rows=rows,
        steps=steps,
        tokens_per_step=per_step * tokens / rows,
        epochs=steps * per_step / rows,
        macs_per_token=state_of(model).shape.dense_macs(keys),
        memory_bytes=_peak(device) + 8 * sum(trained.values()),  # Adam's two moments
        step_seconds=seconds * accumulation,
        seconds=seconds * accumulation * steps,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
