"""The LM head for one position: a matrix-vector product at the memory's speed."""

from __future__ import annotations

from torch import Tensor, nn

from gateskip import kernels

__all__ = ["head_forward"]


def head_forward(head: nn.Linear, input: Tensor) -> Tensor:
    """``forward`` of a gated model's LM head; same signature and result as ``nn.Linear``'s."""
    weight_VH = head.weight.detach()
    if (
        input.numel() == head.in_features
        and head.bias is None
        and input.dtype == weight_VH.dtype
        and kernels.supported(input)
        and kernels.supported(weight_VH)
    ):
        from gateskip.kernels.rows import matvec

        return matvec(weight_VH, input.view(-1)).view(*input.shape[:-1], -1)
    return nn.Linear.forward(head, input)
