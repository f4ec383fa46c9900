"""Gate-Norm (arXiv 2512.20636): attentions whose queries and keys couple least are removed.

Data-free: only weights are looked at. Our reading of the criterion: the mean over query heads h of
‖W_q,hᵀ W_k,g(h)‖_F with g(h) the key head that h shares. It does not change when queries grow by c
and keys shrink by it.

Shapes: A query heads, K key heads, D head width, H hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gateskip.data import Sample
from gateskip.errors import UnsupportedError
from gateskip.methods.static import Group, Static
from gateskip.retrofit.attach import branch_module, layers_of
from gateskip.skipping.state import GateSkipState

__all__ = ["GateNorm", "coupling"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateNorm(Static):
    """Attentions only, least coupled first."""

    paper: ClassVar[str] = "arXiv 2512.20636"

    def order(
        self, model: nn.Module, state: GateSkipState, samples: list[Sample]
    ) -> Sequence[Group]:
        shape = state.shape
        found = {}
        for index, layer in enumerate(layers_of(model, state.family)):
            attention: Any = branch_module(layer, state.family, "attention")
            if not all(
                isinstance(getattr(attention, name, None), nn.Linear)
                for name in ("q_proj", "k_proj")
            ):
                raise UnsupportedError(
                    "method 'gate_norm' reads q_proj and k_proj, plain linear layers; "
                    f"{type(attention).__name__} has none."
                )
            weights = (attention.q_proj.weight, attention.k_proj.weight)
            found[index] = coupling(*weights, shape.heads, shape.kv_heads)
        return [((layer, "attention"),) for layer in sorted(found, key=lambda i: found[i])]


@torch.no_grad()
def coupling(q_EH: Tensor, k_EH: Tensor, heads: int, kv_heads: int) -> float:
    """Mean over heads of ‖W_qᵀ W_k‖_F, from Gram matrices: ‖·‖² = ⟨W_q W_qᵀ, W_k W_kᵀ⟩."""
    q_ADH = q_EH.double().unflatten(0, (heads, -1))
    k_KDH = k_EH.double().unflatten(0, (kv_heads, -1))
    q_ADD, k_KDD = q_ADH @ q_ADH.mT, k_KDH @ k_KDH.mT
    squares_A = (q_ADD * k_KDD.repeat_interleave(heads // kv_heads, 0)).sum((-1, -2))
    return float(squares_A.clamp(min=0).sqrt().mean())
