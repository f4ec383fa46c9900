"""The LM head for a few decoded positions: its weights are read once, at the memory's speed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gateskip import kernels
from gateskip.execution.stack import LAST

__all__ = ["head_forward"]

#: Positions up to which these kernels are faster than PyTorch's products. Of a few rows they take
#: more, so that a token's logits are the same bits alone and among others that are checked.
FEW = {torch.bfloat16: 8, torch.float32: 16}
ROWS, MOST = 6, 32


def head_forward(head: nn.Linear, input: Tensor) -> Tensor:
    """``forward`` of a gated model's LM head; same signature and result as ``nn.Linear``'s."""
    weight_VH = head.weight.detach()
    count = input.numel() // head.in_features
    most = 1  # of a prefill: several positions get PyTorch's products, as without gates
    if LAST.stacked:
        alone = input.dim() == 3 and input.shape[0] <= ROWS
        most = MOST if alone else FEW.get(input.dtype, 0)
    if (
        0 < count <= most
        and head.bias is None
        and input.dtype == weight_VH.dtype
        and kernels.supported(input)
        and kernels.supported(weight_VH)
    ):
        from gateskip.kernels.rows import matmul, matvec

        if count == 1:
            return matvec(weight_VH, input.view(-1)).view(*input.shape[:-1], -1)
        return matmul(weight_VH, input.view(count, -1)).view(*input.shape[:-1], -1)
    return nn.Linear.forward(head, input)
