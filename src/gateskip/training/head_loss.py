"""Cross-entropy and distillation at the LM head, without all logits and without computing twice.

Shapes: N labelled positions, H hidden, V vocabulary.

Both losses have their gradient as soon as the logits are there, so it is taken in the forward pass
and the logits of a chunk are forgotten with it (as Liger Kernel does for cross-entropy, arXiv
2410.10989). With p = softmax(z) and the teacher's q: d/dz of (1 − d)·CE + d·KL(q ‖ p) is
p − (1 − d)·onehot − d·q.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["CHUNK", "head_loss"]

CHUNK = 256  # positions whose logits exist at once


def head_loss(
    head: nn.Module,
    hidden_NH: Tensor,
    target_N: Tensor,
    teacher_NH: Tensor | None = None,
    distill: float = 0.0,
    teacher_head: nn.Module | None = None,
    weight_N: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, Σ cross-entropy, Σ KL(teacher ‖ student)) over labelled positions, float32.

    Args:
        head: the LM head. hidden_NH, teacher_NH: its inputs, the teacher's without a graph.
        distill: d in total = (1 − d)·CE + d·KL, from 0 to 1; only the total has a graph.
        teacher_head: the teacher's, where it is another. weight_N: of positions, float32.
    """
    trained = [p for p in head.parameters() if p.requires_grad]
    taught = None if teacher_NH is None or not distill else (teacher_NH, teacher_head or head)
    found: tuple[Tensor, Tensor, Tensor] = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden_NH, head, target_N, taught, distill if taught else 0.0, weight_N, *trained
    )
    return found


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, head: nn.Module, target_N: Tensor,
        taught: tuple[Tensor, nn.Module] | None, d: float, weight_N: Tensor | None,
        *trained: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        sums = hidden_NH.new_zeros(2, dtype=torch.float32)
        wanted = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[6:])
        gradient_NH = torch.zeros_like(hidden_NH)
        gradients = [torch.zeros_like(p) for p in trained] if wanted else []
        for start in range(0, hidden_NH.shape[0], CHUNK):
            part = slice(start, start + CHUNK)
            with torch.set_grad_enabled(wanted):
                h = hidden_NH[part].detach().requires_grad_(wanted)
                logits = head(h)
            teacher = None if taught is None else taught[1](taught[0][part])
            w = None if weight_N is None else weight_N[part]
            slope, entropy, divergence = _slope(logits.detach(), target_N[part], teacher, d, w)
            sums += torch.stack((entropy, divergence))
            if wanted:
                of_h, *of_head = torch.autograd.grad(logits, [h, *trained], slope)
                gradient_NH[part] = of_h
                for total, more in zip(gradients, of_head, strict=True):
                    total += more
        ctx.save_for_backward(gradient_NH, *gradients)
        entropy, divergence = sums.unbind()
        ctx.mark_non_differentiable(entropy, divergence)
        return (1.0 - d) * entropy + d * divergence, entropy, divergence

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gradient_NH, *gradients = (t * grads[0].to(t.dtype) for t in ctx.saved_tensors)
        return gradient_NH, None, None, None, None, None, *gradients


def _slope(
    logits: Tensor, target_N: Tensor, teacher: Tensor | None, d: float, weight_N: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of the total by the logits, cross-entropy, divergence) of one chunk."""
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
    where = target_N[:, None]
    weight = 1.0 if weight_N is None else weight_N[:, None]
    entropy = -(log_p.gather(1, where) * weight).sum()
    divergence = torch.zeros_like(entropy)
    if teacher is None:
        slope = log_p.exp_()
    else:
        log_q = torch.log_softmax(teacher, -1, dtype=torch.float32)
        q = log_q.exp()
        divergence = (log_q.sub_(log_p).mul_(q) * weight).sum()
        slope = log_p.exp_().sub_(q, alpha=d)
    slope.scatter_add_(1, where, torch.full_like(slope[:, :1], d - 1.0))
    return (slope * weight).to(logits.dtype), entropy, divergence
