"""How much every layer's own prediction counts, where models learn to leave early.

Shapes: N labelled tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["exit_weights", "layer_distance"]

ROTATION = 4  # a layer is asked in every so many steps
SCALE = 0.2  # of early layers against the last (LayerSkip's e_scale)


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
        found[-1] += layers - 1
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
