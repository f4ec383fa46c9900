"""A causal language model's loss from its decoder's states: cross-entropy, distillation, exits.

Shapes: B rows, T tokens, N labelled positions, H hidden.

Logits are made by chunks, see ``head_loss``; the Trainer's own loss makes all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gateskip.execution.api import dense
from gateskip.retrofit.attach import head_of
from gateskip.retrofit.head import LogitHead
from gateskip.retrofit.lora import without_lora
from gateskip.skipping.state import state_of
from gateskip.training import backbone
from gateskip.training.config import GateSkipTrainingConfig
from gateskip.training.exit_loss import exit_loss
from gateskip.training.head_loss import head_loss
from gateskip.training.objective import labelled

__all__ = ["CausalLoss"]


class CausalLoss:
    """The loss of a gated model's batch, under whatever budget is in force.

    Args:
        model: the gated model, before training.
        skips: False: the arm that computes everything.
        note: told a figure's name and value.

    Attributes:
        teacher: a copy of the model before training, or None where the model itself tells.
    """

    def __init__(
        self,
        model: Any,
        config: GateSkipTrainingConfig,
        *,
        skips: bool,
        note: Callable[[str, Any], None],
    ) -> None:
        self._model, self._config, self._skips, self._note = model, config, skips, note
        self._teaches = config.distill > 0.0
        copied = self._teaches and config.backbone == "full" and config.teacher == "before"
        self.teacher = backbone.dense_copy(model) if copied else None

    def __call__(self, inputs: dict[str, Any], items: Any, step: int) -> Tensor:
        """The loss of a batch, divided by ``items`` (None: its labelled positions).

        Args:
            inputs: ``input_ids`` and ``labels`` ``[B, T]``, ``attention_mask``, as the Trainer's.
            step: optimiser step; which exits are asked may depend on it.
        """
        labels_BT = inputs["labels"]
        given = {name: value for name, value in inputs.items() if name != "labels"}
        chosen_BT = labelled(labels_BT)
        target_N = labels_BT[:, 1:][chosen_BT]
        n = target_N.shape[0] if items is None else items
        if self._config.exit_loss != "none":
            return self._exits(given, chosen_BT, target_N, n, step)
        head = self._head(self._model)
        states_BTH = self._decoder(self._model)(**given, use_cache=False).last_hidden_state
        teacher_NH = self.taught(given)[:, :-1][chosen_BT] if self._teaches else None
        total, entropy, divergence = head_loss(
            head, states_BTH[:, :-1][chosen_BT], target_N, teacher_NH, self._config.distill,
            head if self.teacher is None else self._head(self.teacher),
        )  # fmt: skip
        self._note("cross_entropy", entropy / n)
        if self._teaches:
            self._note("distillation", divergence / n)
        return total / n

    def _exits(
        self, given: dict[str, Any], chosen_BT: Tensor, target_N: Tensor, n: Any, step: int
    ) -> Tensor:
        """The loss of every layer's own prediction."""
        decoder = self._decoder(self._model)
        norm = getattr(decoder, state_of(self._model).family.final_norm)
        out = decoder(**given, use_cache=False, output_hidden_states=True)
        states = [norm(h[:, :-1][chosen_BT]) for h in out.hidden_states[1:-1]]
        states.append(out.last_hidden_state[:, :-1][chosen_BT])
        total, distance = exit_loss(self._head(self._model), states, target_N, self._config, step)
        if distance is not None:
            self._note("exit_distillation", distance / n)
            total = total + self._config.exit_distill * distance
        self._note("exit_loss", total / n)
        return total / n

    @torch.no_grad()
    def taught(self, given: dict[str, Any]) -> Tensor:
        """Hidden states of the teacher: no gates, no skipping, ``[B, T, H]``."""
        if self.teacher is not None:
            return self._decoder(self.teacher)(**given, use_cache=False).last_hidden_state
        with contextlib.ExitStack() as stack:
            if self._skips:
                stack.enter_context(dense(self._model))
            if self._config.teacher == "before":
                stack.enter_context(without_lora(self._model))
            return self._decoder(self._model)(**given, use_cache=False).last_hidden_state

    def _decoder(self, model: Any) -> Any:
        return model.get_submodule(state_of(self._model).family.decoder)

    def _head(self, model: Any) -> LogitHead:
        head = head_of(model)
        assert head is not None
        return LogitHead(head, state_of(self._model).family, model.config)
