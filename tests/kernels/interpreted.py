"""The GPU kernels in Triton's interpreter, against torch operations.

A program of its own, since Triton reads the mode once: ``test_gpu.py`` runs it.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import numpy as np
import torch
import triton.language as tl
from transformers import StaticCache
from triton.runtime import interpreter

import gateskip
from gateskip import kernels
from gateskip.execution import gpu_stack
from gateskip.skipping.state import override, state_of
from models import gated, medians, padded, random_ids, with_table

STEPS, START = 2, 8
ran: list[bool] = []
real = gpu_stack.run_on_gpu


def noted(*args: Any) -> Any:
    """``run_on_gpu``, and note whether it ran."""
    out = real(*args)
    ran.append(out is not None)
    return out


gpu_stack.run_on_gpu = noted


def widened(handle: Any) -> Any:
    """bfloat16 as float32: the interpreter's products take its bits for integers."""
    if handle.dtype.scalar.is_bf16():
        data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)
    return handle


def product(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """``create_dot`` of operands that numpy can multiply."""
    return create_dot(self, widened(a), widened(b), *rest)


create_dot = interpreter.InterpreterBuilder.create_dot
interpreter.InterpreterBuilder.create_dot = product


@torch.no_grad()
def fed(model: Any, ids: Any, cache: Any, mask: Any = None) -> Any:
    """Logits of the tokens after the first, one by one through a cache."""
    first = None if mask is None else mask[:, :START]
    cache = model(ids[:, :START], attention_mask=first, cache=cache, use_cache=True).cache
    out = []
    for i in range(START, START + STEPS):
        seen = None if mask is None else mask[:, : i + 1]
        step = model(ids[:, i : i + 1], attention_mask=seen, cache=cache, use_cache=True)
        out.append(step.logits)
    return torch.cat(out, 1)


def check(
    name: str, model: Any, batch: int, *, mask: Any = None, static: bool = False,
    thresholds: Any = None, tolerance: float = 1e-4,
) -> None:  # fmt: skip
    """Triton's logits, decisions and ledger against torch's."""
    ids = random_ids(batch, START + STEPS)
    found = []
    for backend in ("torch", "triton"):
        ran.clear()
        cache = StaticCache(model.config, max_cache_len=20) if static else None
        with (
            kernels.using(backend),
            override(state_of(model), thresholds=thresholds),
            gateskip.trace(model) as trace,
        ):
            logits = fed(model, ids, cache, mask=mask)
        assert ran == [True] * STEPS * (backend == "triton"), (name, ran)
        found.append((logits, trace))
    (a, first), (b, second) = found
    for key, masks in first.keep.items():
        assert all(map(torch.equal, masks, second.keep[key])), (name, key)
    assert first.ledger.macs_spent == second.ledger.macs_spent, name
    torch.testing.assert_close(b, a, atol=tolerance, rtol=tolerance)
    print("same:", name, f"skip rate {second.ledger.skip_rate:.2f}", flush=True)


def check_rows(dtype: torch.dtype) -> None:
    """The row kernels against torch operations."""
    from gateskip.kernels import gpu_rows

    def normal(*shape: int, seed: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def same(found: torch.Tensor, expected: torch.Tensor) -> None:
        step = 2**-6 if dtype == torch.bfloat16 else 1e-5  # the interpreter cuts off, twice
        torch.testing.assert_close(found.float(), expected.float(), atol=step, rtol=step)

    n, hidden, some = 7, 50, torch.tensor([0, 2, 5])
    h, w, gamma = normal(n, hidden, seed=0) * 5, normal(hidden, seed=1).float(), normal(50, seed=2)
    score, inverse = gpu_rows.score_rows(h, w, 0.3, 1e-5)
    expected = torch.rsqrt(h.float().square().mean(-1) + 1e-5)
    torch.testing.assert_close(inverse, expected, atol=0, rtol=1e-5)
    torch.testing.assert_close(score, h.float() @ w * expected + 0.3, atol=1e-4, rtol=1e-4)
    u = gpu_rows.norm_rows(h, inverse, gamma, some, 5)
    same(u[:3], (gamma * (h.float() * expected[:, None]).to(dtype))[some])
    assert not u[3:].any()
    o, z = normal(3, hidden, seed=3), normal(3, hidden, seed=4).float()
    gates = {
        "logits_MH": (z, z), "one": ((u[:3], w, 0.1), (u[:3].float() @ w + 0.1)[:, None]),
        "scored": ((score, 0.5, 0.1), (score[some] * 0.5 + 0.1)[:, None]),
    }  # fmt: skip
    for name, (given, logits) in gates.items():
        out = h.clone()
        gpu_rows.join_rows(out, h, o, some, **{name: given})  # type: ignore[arg-type]
        want = h.float()
        want[some] += logits.sigmoid() * o.float()
        same(out, want.to(dtype))
    bias = normal(hidden, seed=5)
    for c in (None, normal(3, hidden, seed=6)):
        out, want = h.clone(), h.float()
        gpu_rows.add_rows_(out, c, bias, some)
        want[some] += bias.float() + (0 if c is None else c.float())
        same(out, want.to(dtype))
    print("same:", "rows", dtype, flush=True)


def main() -> None:
    """All combinations, or with ``--all`` every pair of them."""
    kinds = (("low_rank", "low_rank"), ("scalar", "mean"), ("vector", "none"))
    families = ("llama", "mistral", "qwen2", "qwen3")
    cases = [(f, kind, (1, 3)) for f in families for kind in kinds]
    if "--all" not in sys.argv:
        cases = [
            ("llama", kinds[0], (1, 3)), ("mistral", kinds[0], (1,)),
            ("qwen2", kinds[1], (3,)), ("qwen3", kinds[2], (1,)), ("qwen3", kinds[2], (3,)),
        ]  # fmt: skip
    for family, (kind, compensation), batches in cases:
        model = gated(family, compensation=compensation, kind=kind)
        middle = medians(model)
        for batch in batches:
            check(f"{family} {kind} {batch}", model, batch, thresholds=middle)
    model = gated("llama", compensation="low_rank")
    middle = medians(model)
    check("keeps all", model, 2)
    check("static cache", model, 2, thresholds=middle, static=True)
    mask = padded(3, START + STEPS, "left")[1]
    check("left padding", model, 3, thresholds=middle, mask=mask)
    with gateskip.budget(with_table(model), keep=[0.3, 0.9]):
        check("row budgets", model, 2)
    check_rows(torch.float32)
    check_rows(torch.bfloat16)
    # Far from every score, so that rounding decides nothing.
    free = {key: 1e9 if key[0] % 2 else -1e9 for key in middle}
    model = gated("llama", compensation="low_rank", dtype=torch.bfloat16)
    check("bfloat16", model, 2, thresholds=free, tolerance=0.1)


if __name__ == "__main__":
    sys.exit(main())
