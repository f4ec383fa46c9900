"""How much every layer's own prediction counts, where models learn to leave early."""

from __future__ import annotations

__all__ = ["exit_weights"]

ROTATION = 4  # a layer is asked in every so many steps
SCALE = 0.2  # of early layers against the last (LayerSkip's e_scale)


def exit_weights(kind: str, layers: int, step: int) -> list[float]:
    """Weights of the layers' losses, first to last, summing to 1.

    Args:
        kind: ``"weighed"``: by depth (arXiv 2207.07061, eq. 6); ``"rotating"``: quadratic in depth,
            and only layers whose turn it is, beside the last (arXiv 2404.16710, eq. 5 to 7).
    """
    if kind == "weighed":
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
