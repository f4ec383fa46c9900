"""One new token of every row through all layers on a GPU: Triton kernels, replayed as a graph.

Shapes: L layers, B rows, H hidden, A query heads, K key/value heads, D head width, C room for keys.

A step reads what changes (the stream, rotary tables, thresholds, mask, length) from tensors of its
own, so that its kernels can be captured once and replayed for every further token. Nothing is read
back: decisions are copied only for a trace.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from gateskip.config import BRANCH_KINDS
from gateskip.execution.memory import Memory
from gateskip.execution.plan import Plan, Plans
from gateskip.skipping.call import Call
from gateskip.skipping.policy import OFF

__all__ = ["run_on_gpu"]

STEPS = 8  # graphs that a model keeps
ROWS = 16  # tokens of a product on matrix units
#: Weight rows of a program, columns at a time, and warps; for one row (True) and for several.
TILE, BLOCK, WARPS = {True: 4, False: 32}, {True: 1024, False: 256}, {True: 4, False: 4}
PROGRAMS = 528  # that decide at a branch: four for each of a large GPU's processors
KEYS, VALUES = object(), object()  # stand for a layer's cache
LOCK = threading.Lock()  # a step's tensors belong to one token at a time


def run_on_gpu(
    plans: Plans, call: Call, h_B1H: Tensor, kwargs: Any, memory: Memory
) -> Tensor | None:
    """The last layer's output, or None where there are more rows than the kernels take."""
    if call.batch > ROWS:
        return None
    cos, sin = (t.to(h_B1H.dtype) for t in kwargs["position_embeddings"])
    mask = kwargs.get("attention_mask")
    stream = torch.cuda.current_stream(h_B1H.device).cuda_stream if h_B1H.is_cuda else 0
    key = (
        memory.addresses.tobytes(), memory.room, memory.strides, call.batch, cos.shape[0],
        mask is not None, stream, torch.is_inference_mode_enabled(),
    )  # fmt: skip
    with LOCK:
        steps = plans.extra = plans.extra or {}
        step: _Step | None = steps.pop(key, None)
        if step is None:
            while len(steps) >= STEPS:
                del steps[next(iter(steps))]
            step = _Step(plans, h_B1H, memory, tables=cos.shape[0], masked=mask is not None)
        steps[key] = step
        step.x.copy_(h_B1H[:, 0])
        step.cos.copy_(cos[:, 0])
        step.sin.copy_(sin[:, 0])
        step.length.fill_(memory.length)
        step.set_thresholds(call)
        if mask is not None:
            assert step.mask is not None
            _additive(mask[:, 0, -1], step.mask, memory.length + 1)
        step.run(memory)
        out = step.x.clone()[:, None]
        flags = step.flags.clone() if call.recorder is not None else None
    memory.advance()
    if flags is not None:
        for i in range(len(plans.triples)):
            for j, kind in enumerate(BRANCH_KINDS):
                if call.thresholds is not None:
                    call.keep[i, kind] = flags[i, j, :, None].bool()
                call.computed[i, kind] = flags[i, j].long()
    return out


def _additive(mask: Tensor, out: Tensor, keys: int) -> None:
    """Write a mask of the keys so far as float32 addends."""
    mask = mask[:, :keys]
    if mask.dtype == torch.bool:
        least = torch.finfo(torch.float32).min
        out[:, :keys] = torch.zeros(
            mask.shape, dtype=torch.float32, device=out.device
        ).masked_fill_(~mask, least)
    else:
        out[:, :keys] = mask


class _Step:
    """The kernels of one token for one place of the cache, and the tensors that they share."""

    def __init__(
        self, plans: Plans, h_B1H: Tensor, memory: Memory, *, tables: int, masked: bool
    ) -> None:
        batch, hidden = h_B1H.shape[0], h_B1H.shape[2]
        layers = len(plans.triples)
        heads, kv_heads, width = plans.sizes
        self.plans, self.batch = plans, batch
        self.strides = memory.strides
        make, device = h_B1H.new_empty, h_B1H.device
        self.x = make(batch, hidden)
        self.cos, self.sin = make(tables, width), make(tables, width)
        self.mask = make(batch, memory.room, dtype=torch.float32) if masked else None
        self.length = torch.zeros(1, dtype=torch.int32, device=device)
        self.flags = torch.zeros(layers, 2, batch, dtype=torch.int32, device=device)
        self.thresholds = torch.zeros(layers, 2, batch, dtype=torch.float32, device=device)
        self.source: Any = self  # of the thresholds
        self.q = make(batch, heads * width)
        self.kv = make(batch, 2, kv_heads * width)
        self.act = make(batch, plans.inner)
        self.attended = make(batch, heads * width)
        self.splits = _splits(batch * kv_heads, memory.room)
        shape = (batch, heads, self.splits)
        self.partial = make(*shape, width, dtype=torch.float32)
        self.sums = make(*shape, 2, dtype=torch.float32)
        self.launches = [self._layer(i, *triple, hidden) for i, triple in enumerate(plans.triples)]
        self.graph: Any = None
        self.warm = False

    def set_thresholds(self, call: Call) -> None:
        """Thresholds of the call ``[L, 2, B]``; protected rows are kept."""
        if call.protected_BT is None and self.source is call.thresholds:
            return
        if call.thresholds is None:
            self.thresholds.fill_(float("-inf"))
        else:
            rows = [
                [torch.as_tensor(call.thresholds[i, kind], dtype=torch.float32).expand(self.batch)
                 for kind in BRANCH_KINDS]
                for i in range(len(self.plans.triples))
            ]  # fmt: skip
            self.thresholds.copy_(torch.stack([torch.stack(pair) for pair in rows]))
        self.source = call.thresholds
        if call.protected_BT is not None:
            protected = call.protected_BT[None, None, :, 0] & (self.thresholds < OFF)
            self.thresholds.masked_fill_(protected, float("-inf"))
            self.source = self

    def run(self, memory: Memory) -> None:
        """All kernels; the second time on a GPU they are captured, from then on replayed.

        The graph knows the cache's addresses but does not keep it alive.
        """
        if self.graph is not None:
            self.graph.replay()
        elif self.warm and self.x.is_cuda:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._launch(memory)
            self.graph = graph
            graph.replay()
        else:
            self._launch(memory)
            self.warm = True

    def _launch(self, memory: Memory) -> None:
        for layer, launches in zip(memory.held, self.launches, strict=True):
            for kernel, grid, arguments, constants in launches:
                given = (
                    layer.keys if a is KEYS else layer.values if a is VALUES else a
                    for a in arguments
                )  # fmt: skip
                kernel[grid](*given, **constants)

    def _layer(self, i: int, project: Plan, attend: Plan, mlp: Plan, hidden: int) -> list[Any]:
        from gateskip.kernels import gpu

        heads, kv_heads, width = self.plans.sizes
        batch, inner, scaling = self.batch, self.plans.inner, attend.scaling
        few = batch == 1
        common = {"H": hidden, "B": batch, "BP": 1 if few else 16}
        tiles = common | {"BN": TILE[few], "num_warps": WARPS[few]}
        by_hidden = {"BK": _block(hidden, few)}
        (wq, bq), (wk, bk), (wv, bv) = project.weights
        wo, bo = attend.weights[0]
        (wg, _), (wu, _), (wd, _) = mlp.weights
        (q_norm, _), (k_norm, norm_eps) = project.norms
        launches: list[Any] = []
        arguments: tuple[Any, ...]
        for kind, plan in enumerate((project, mlp)):
            gate = _Gate(plan, batch, hidden, self.x)
            flags, tau = self.flags[i, kind], self.thresholds[i, kind]
            head = (self.x, plan.norm, plan.score[0], plan.score[1], plan.eps, tau, 1, flags)
            first = gate.constants | tiles | by_hidden
            blocks = gate.blocks
            last = gate.constants | gate.last | tiles
            if kind == 0:
                q_rows, kv_rows = heads * width, kv_heads * width
                blocks += _blocks(q_rows, tiles) + 2 * _blocks(kv_rows, tiles)
                arguments = (*head, wq, bq, wk, bk, wv, bv, self.q, self.kv, *gate.first)
                rows = {"NQ": q_rows, "NK": kv_rows}
                rows["BLOCKS"] = blocks
                launches.append((gpu.project, (min(blocks, PROGRAMS),), arguments, first | rows))
                arguments = (
                    self.q, self.kv, flags, self.cos, self.sin,
                    width if self.cos.shape[0] > 1 else 0, q_norm, k_norm, norm_eps,
                    KEYS, VALUES, *self.strides, self.length, self.mask,
                    0 if self.mask is None else self.mask.stride(0),
                    self.partial, self.sums, scaling,
                )  # fmt: skip
                constants = {
                    "A": heads, "K": kv_heads, "D": width, "DP": max(_power(width), 16),
                    "GP": max(_power(heads // kv_heads), 16), "SPLITS": self.splits, "BS": 64,
                    "num_warps": 4,
                }  # fmt: skip
                grid = (batch * kv_heads, self.splits)
                launches.append((gpu.attend, grid, arguments, constants))
                arguments = (flags, self.partial, self.sums, self.attended)
                constants = {"A": heads, "D": width, "DP": _power(width), "SPLITS": self.splits}
                launches.append((gpu.gather, (batch * heads,), arguments, constants))
                arguments = (self.x, flags, self.attended, wo, bo, *gate.second)
                sizes = {"I": heads * width, "BK": _block(heads * width, few)}
                launches.append((gpu.join, (_blocks(hidden, tiles),), arguments, last | sizes))
            else:
                blocks += _blocks(inner, tiles)
                arguments = (*head, wg, wu, self.act, *gate.first)
                rows = {"BLOCKS": blocks, "I": inner}
                launches.append((gpu.mlp, (min(blocks, PROGRAMS),), arguments, first | rows))
                arguments = (self.x, flags, self.act, wd, None, *gate.second)
                sizes = {"I": inner, "BK": _block(inner, few)}
                launches.append((gpu.join, (_blocks(hidden, tiles),), arguments, last | sizes))
        return launches


class _Gate:
    """What a gate and a compensation add to the arguments of a branch's two products."""

    def __init__(self, plan: Plan, batch: int, hidden: int, like: Tensor) -> None:
        from gateskip.kernels.gpu import ALIKE, FULL, LOW_RANK

        a, b, c = plan.factors
        kind = ALIKE if plan.alike else FULL if a is None else LOW_RANK
        width = 1 if kind == ALIKE else hidden if a is None else a.shape[0]
        down, up, shift = plan.compensation
        rank = 0 if down is None else down.shape[0]
        inner = like.new_empty(batch, width, dtype=torch.float32)
        comp = like.new_empty(batch, max(rank, 1))
        first = b if kind == ALIKE else a
        z = float(c) if kind == ALIKE else 0.0
        self.first = (first, z, down, inner, comp)
        self.second = (None if kind == ALIKE else b, c, up, shift, inner, comp)
        self.constants = {"GATE": kind, "R": width, "C": rank}
        few = batch == 1
        self.last = {"RK": _block(width, few), "CK": _block(max(rank, 1), few)}
        self.blocks = -(-width // 16) + -(-rank // 16)


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _block(n: int, few: bool) -> int:
    """Columns of a product at a time."""
    return min(max(_power(n), 16), BLOCK[few])


def _blocks(rows: int, tiles: dict[str, int]) -> int:
    return -(-rows // tiles["BN"])


def _splits(programs: int, room: int) -> int:
    """Shares of the cached keys: enough programs to fill a GPU, each with keys enough to pay."""
    splits = 1
    while splits < 16 and programs * splits < 132 and room // splits > 256:
        splits *= 2
    return splits
