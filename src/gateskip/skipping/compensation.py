"""What a skipped branch adds instead of its output (ours; the paper adds nothing).

Shapes: N tokens, H hidden, R rank. Unlike gates these weights follow the model's dtype: they add
to the stream as a branch does, and no decision depends on them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gateskip import kernels
from gateskip.retrofit.devices import device_of

__all__ = ["COMPENSATION_NAME", "Compensation"]

COMPENSATION_NAME = "skip_compensation"


class Compensation(nn.Module):
    """c(u) = B·(A·u) + c, or the constant c when there are no thin matrices."""

    def __init__(self, bias_H: Tensor, down_RH: Tensor | None = None, up_HR: Tensor | None = None):
        super().__init__()
        # Contiguous: the kernels read rows, and a solver's result is often transposed.
        self.bias = nn.Parameter(bias_H.contiguous())
        self.down = None if down_RH is None else nn.Parameter(down_RH.contiguous())
        self.up = None if up_HR is None else nn.Parameter(up_HR.contiguous())

    @property
    def constant(self) -> bool:
        """True for the kind ``"mean"``."""
        return self.down is None

    def forward(self, u_NH: Tensor) -> Tensor:
        """Replacement output, same shape and dtype as ``u``."""
        if self.down is None or self.up is None:
            return self.bias.to(u_NH.dtype).expand_as(u_NH)
        inner = nn.functional.linear(u_NH, self.down.to(u_NH.dtype))
        return nn.functional.linear(inner, self.up.to(u_NH.dtype), self.bias.to(u_NH.dtype))

    def add_at(self, out_NH: Tensor, u_MH: Tensor, index_M: Tensor) -> Tensor:
        """``out`` with c(u) added to rows ``index_M``, in place where no graph is recorded.

        Rows of ``u_MH`` beyond the index are ignored.
        """
        like = (self.bias, out_NH, u_MH)
        fused = kernels.row_kernels(out_NH)
        if fused is None or not all(
            kernels.row_kernels(t.detach()) is fused and t.dtype == out_NH.dtype for t in like
        ):
            added = self(u_MH)[: index_M.shape[0]]
            return out_NH.index_add_(0, index_M, added.to(out_NH.dtype))  # autocast gives another
        c_MH = None
        if self.down is not None and self.up is not None:
            c_MH = nn.functional.linear(nn.functional.linear(u_MH, self.down), self.up)
        fused.add_rows_(out_NH, c_MH, self.bias.detach(), index_M)
        return out_NH


def compensation_of(module: nn.Module) -> Compensation | None:
    """The compensation of a branch module, if it has one."""
    found = module._modules.get(COMPENSATION_NAME)
    return found if isinstance(found, Compensation) else None


def set_compensation(module: nn.Module, compensation: Compensation | None) -> None:
    """Put ``compensation`` on a branch module in the module's dtype and device, or remove it."""
    module._modules.pop(COMPENSATION_NAME, None)
    if compensation is not None:
        like = next(p for n, p in module.named_parameters() if not n.startswith("skip_"))
        dtype = like.dtype if like.dtype.is_floating_point else torch.float32
        module.add_module(COMPENSATION_NAME, compensation.to(device_of(module), dtype))
        compensation.train(module.training)
