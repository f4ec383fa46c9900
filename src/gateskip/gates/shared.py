"""The shared gate (an ablation of arXiv 2510.13876): one vector gate for the attention of all
layers, and one for their MLPs."""

from __future__ import annotations

from gateskip.gates.vector import VectorGate

__all__ = ["SharedGate"]


class SharedGate(VectorGate):
    """A vector gate; ``attach`` gives the same one to every layer."""

    shared = True
