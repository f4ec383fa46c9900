"""LoRA layers whose small products stay in the stream's dtype, with their backward written out.

PEFT's layer converts input and result to the adapter's float32 and back, element-wise passes that
take longer on a CPU than the layer's matrix product. Here the float32 factors are rounded to the
stream's dtype, as autocast does, and are added within a product. Shapes: M rows, I input and O
output features, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

__all__ = ["LoraLinear", "speed_up"]


class LoraLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA layer; takes the short way where it computes the same sum."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's."""
        found = None if args or kwargs else self._simple(x)
        if found is None:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        base = self.base_layer
        down_RI, up_OR, scale = found
        result = _LoraProduct.apply(x, base.weight, base.bias, down_RI, up_OR, scale)  # type: ignore[no-untyped-call]
        return result

    def _simple(self, x: Tensor) -> tuple[Tensor, Tensor, float] | None:
        """(down, up, scale) of the one active adapter without dropout or a variant."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1:
            return None
        (name,) = active
        base = self.base_layer
        plain = (
            type(base) is nn.Linear
            and not base.weight.requires_grad
            and base.weight.dtype == x.dtype
            and not base._forward_hooks
            and not base._forward_pre_hooks
            and name not in self.lora_variant
            and self.lora_B[name].bias is None
            and isinstance(self.lora_dropout[name], nn.Identity)
            and not torch.is_autocast_enabled(x.device.type)
        )
        if not plain:
            return None
        return self.lora_A[name].weight, self.lora_B[name].weight, float(self.scaling[name])


def speed_up(model: nn.Module) -> None:
    """Let PEFT's linear layers in ``model`` compute as :class:`LoraLinear`, in place.

    They stay PEFT's in everything else: names, states, merging, adapters to switch.
    """
    for module in model.modules():
        if type(module) is Linear and not module.fan_in_fan_out:
            module.__class__ = LoraLinear


class _LoraProduct(torch.autograd.Function):
    """y = W·x + bias + scale · up·(down·x)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, down_RI: Tensor,
        up_OR: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        x_MI = x.reshape(-1, x.shape[-1])
        down, up = down_RI.to(x.dtype), (up_OR * scale).to(x.dtype)
        inner_MR = x_MI @ down.t()
        y_MO = nn.functional.linear(x_MI, weight_OI, bias_O)
        y_MO.addmm_(inner_MR, up.t())
        ctx.save_for_backward(x_MI, weight_OI, inner_MR, down, up)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (down_RI.dtype, up_OR.dtype)
        return y_MO.view(*x.shape[:-1], y_MO.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x_MI, weight_OI, inner_MR, down, up = ctx.saved_tensors
        dy_MO = grads[0].reshape(-1, grads[0].shape[-1])
        dinner_MR = dy_MO @ up
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy_MO @ weight_OI).addmm_(dinner_MR, down).view(ctx.shape)
        ddown = dup = None
        if ctx.needs_input_grad[3]:
            ddown = (dinner_MR.t() @ x_MI).to(ctx.dtypes[0])
        if ctx.needs_input_grad[4]:
            dup = (dy_MO.t() @ inner_MR).to(ctx.dtypes[1]) * ctx.scale
        dbias = dy_MO.sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, dbias, ddown, dup, None
