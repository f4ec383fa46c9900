"""The gated MLP of Llama-like families with its activation and product in one pass.

Shapes: M rows, H hidden.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from gateskip import kernels
from gateskip.retrofit.families import FamilySpec
from gateskip.retrofit.listeners import listened

__all__ = ["is_silu", "own_mlp", "run_mlp"]


def run_mlp(mlp: Any, family: FamilySpec, u_MH: Tensor) -> Tensor:
    """The MLP's output; by its own forward wherever that may differ from down(silu(gate) ⊙ up)."""
    if not (family.fused_mlp and kernels.supported(u_MH) and is_silu(mlp)):
        return own_mlp(mlp, u_MH)
    gate, up = mlp.gate_proj(u_MH), mlp.up_proj(u_MH)
    if not (kernels.supported(gate) and kernels.supported(up) and gate.dtype == up.dtype):
        return mlp.down_proj(mlp.act_fn(gate) * up)
    from gateskip.kernels.rows import swiglu_

    return mlp.down_proj(swiglu_(gate, up))


def own_mlp(mlp: Any, u: Tensor) -> Tensor:
    """The output of the module itself for ``[M, H]`` or ``[B, T, H]``.

    Mixtures of experts want rows of a batch, and may return their routing beside.
    """
    out = mlp(u if u.dim() == 3 else u[None])
    out = out[0] if isinstance(out, tuple) else out
    result: Tensor = out.view_as(u)
    return result


def is_silu(mlp: nn.Module) -> bool:
    """Whether the activation is SiLU, and nobody hooks or replaces the module's forward."""
    act = type(mlp.act_fn).__name__
    if act not in ("SiLU", "SiLUActivation"):
        return False
    return not listened(mlp) and not listened(cast(nn.Module, mlp.act_fn))
