"""Attention whose backward pass is by blocks of matrix products.

Shapes: B rows, L queries, S keys, A query heads, K key heads, G = A / K, D head width.

In bfloat16 on a CPU, PyTorch's backward pass of attention takes twice as long as these products
with one fused pass between them (in float32 it does not). As in "eager" attention the scores are
rounded to bfloat16; here in the backward pass only. Without the kernels PyTorch's own is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from gateskip import kernels

__all__ = ["CausalAttention", "attend_causally", "takes_blocks"]

BLOCK = 128  # queries of a block
#: Queries and keys of a block are rounded up: every shape of a product costs a program.
QUERIES, KEYS = 32, 64


def takes_blocks(query: Tensor, dropout_p: float) -> bool:
    """Whether a graph is recorded that :func:`attend_causally` can serve."""
    if not query.requires_grad or query.dtype != torch.bfloat16 or dropout_p:
        return False
    with torch.no_grad():
        return kernels.supported(query.new_empty(0))


class CausalAttention(TorchFunctionMode):
    """Runs ``scaled_dot_product_attention`` calls over a whole square as causal, block by block.

    Only for masks that hide nothing else from any token that counts.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        def run() -> Tensor:
            return scaled_dot_product_attention(
                query, key, value, None, dropout_p, True, scale=scale, enable_gqa=enable_gqa
            )

        if not takes_blocks(query, dropout_p):
            return run()
        length = query.shape[2]
        last = torch.arange(length).expand(query.shape[0], -1)
        return attend_causally(query, key, value, last, scale, run)


def attend_causally(
    q_BALD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, last_BL: Tensor, scale: float | None,
    run: Callable[[], Tensor],
) -> Tensor:  # fmt: skip
    """``run()``, whose gradient is that of attention over the keys up to ``last_BL``.

    Args:
        last_BL: int64, the last key that each query sees; it sees all before it.
        scale: of the scores; None: D^−½. run: the forward pass, ``[B, A, L, D]``.
    """
    scale = q_BALD.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _Attention.apply(q_BALD, k_BKSD, v_BKSD, last_BL, scale, run)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, last_BL: Tensor, scale: float,
        run: Callable[[], Tensor],
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(q, k, v, last_BL)
        ctx.scale = scale
        return run()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> Any:
        from gateskip.kernels.attention import softmax_slope_

        q_BALD, k_BKSD, v_BKSD, last_BL = ctx.saved_tensors
        (batch, heads, length, width), kv_heads = q_BALD.shape, k_BKSD.shape[1]
        group, keys = heads // kv_heads, k_BKSD.shape[2]
        padded = -(-length // QUERIES) * QUERIES
        shape = (batch, kv_heads, padded, group, width)

        def grouped(t_BALD: Tensor) -> Tensor:
            """``[B·K, padded, G, D]``, so that a block of queries is a block of memory."""
            out = t_BALD.new_empty(shape)
            split = t_BALD.view(batch, kv_heads, group, length, width).transpose(2, 3)
            out[:, :, :length] = split
            out[:, :, length:] = 0
            return out.view(-1, padded, group, width)

        q, do = grouped(q_BALD), grouped(grads[0].to(q_BALD.dtype))
        k, v = (t.reshape(-1, keys, width) for t in (k_BKSD, v_BKSD))
        last = torch.nn.functional.pad(last_BL, (0, padded - length))
        furthest = last.amax(0)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(t.shape, dtype=torch.float32) for t in (k, v))
        for begin in range(0, padded, BLOCK):
            end = min(begin + BLOCK, padded)
            seen = min(-(-(int(furthest[begin:end].max()) + 1) // KEYS) * KEYS, keys)
            q_b, do_b = (t[:, begin:end].flatten(1, 2) for t in (q, do))
            k_b, v_b = k[:, :seen], v[:, :seen]
            p, ds = torch.bmm(q_b, k_b.mT), torch.bmm(do_b, v_b.mT)
            softmax_slope_(
                p, ds, last[:, begin:end], heads=group, kv_heads=kv_heads, scale=ctx.scale
            )
            dv[:, :seen] += torch.bmm(p.mT, do_b)
            dk[:, :seen] += torch.bmm(ds.mT, q_b)
            dq[:, begin:end] = torch.bmm(ds, k_b).view_as(dq[:, begin:end])
        dq_BALD = dq.view(shape)[:, :, :length].transpose(2, 3).reshape(q_BALD.shape)
        return (
            dq_BALD, dk.to(k.dtype).view_as(k_BKSD), dv.to(v.dtype).view_as(v_BKSD),
            None, None, None,
        )  # fmt: skip
