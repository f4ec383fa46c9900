"""How much every layer's own prediction counts, where models learn to leave early.

Shapes: N labelled tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gateskip.retrofit.head import LogitHead
from gateskip.training.config import GateSkipTrainingConfig
from gateskip.training.head_loss import head_loss

__all__ = ["exit_loss", "exit_weights", "layer_distance"]

ROTATION = 4  # a layer is asked in every so many steps
SCALE = 0.2  # of early layers against the last (LayerSkip's e_scale)


def exit_loss(
    head: LogitHead,
    states: Sequence[Tensor],
    target_N: Tensor,
    config: GateSkipTrainingConfig,
    step: int,
) -> tuple[Tensor, Tensor | None]:
    """Summed cross-entropy of the layers' predictions, and the summed distance between layers.

    Args:
        states: normalised outputs ``[N, H]`` of all layers. target_N: the labels.
        step: optimiser step; which layers are asked may depend on it.
    """
    weights = exit_weights(config.exit_loss, len(states), step, config.exit_layers)
    asked = [(h, w) for h, w in zip(states, weights, strict=True) if w]
    # At once, so that the head's gradient is kept once.
    total, _, _ = head_loss(
        head, torch.cat([h for h, _ in asked]), target_N.repeat(len(asked)),
        weight_N=torch.cat([h.new_full(h.shape[:1], w).float() for h, w in asked]),
    )  # fmt: skip
    if not config.exit_distill or not target_N.shape[0]:
        return total, None
    return total, layer_distance(states, config.exit_layers) * target_N.shape[0]


def exit_weights(kind: str, layers: int, step: int, shallow: int = 1) -> list[float]:
    """Weights of the layers' losses, first to last, summing to 1.

    Args:
        kind: ``"weighed"``: by depth (arXiv 2207.07061, eq. 6); ``"rotating"``: quadratic in depth,
            and only layers whose turn it is, beside the last (arXiv 2404.16710, eq. 5 to 7);
            ``"shallow"``: by depth, of the last and of the layer that is the shallow model's last.
        shallow: layers of that model.
    """
    if kind == "shallow":
        found = [float(n) if n in (shallow, layers) else 0.0 for n in range(1, layers + 1)]
    elif kind == "weighed":
        found = [float(layer + 1) for layer in range(layers)]
    else:
        found = [SCALE * layer * (layer + 1) / 2 for layer in range(layers)]
        found[-1] = layers - 1 + SCALE * (layers - 2) * (layers - 1) / 2
        turn = step % ROTATION
        found = [
            weight if layer == layers - 1 or layer % ROTATION == turn else 0.0
            for layer, weight in enumerate(found)
        ]
    total = sum(found)
    return [weight / total for weight in found]


def layer_distance(states: Sequence[Tensor], shallow: int) -> Tensor:
    """Mean squared distance between a shallow model's layers and deeper ones, mapped evenly
    (arXiv 2310.05424, eq. 3, ``unif``); the deeper ones get no gradient.

    Args:
        states: normalised outputs ``[N, H]`` of all layers. shallow: how many are the shallow ones.
    """
    layers = len(states)
    each = [
        nn.functional.mse_loss(
            states[i].float(), states[(i + 1) * layers // shallow - 1].detach().float()
        )
        for i in range(shallow)
    ]
    return torch.stack(each).mean()
