"""One token at batch 1 through a layer on the CPU kernels.

Shapes: H hidden, A query heads, K key/value heads, D head width, S cached keys.

A *plan* holds the addresses of everything that a branch reads. It is checked before every use: a
weight that was moved, a module that was wrapped or hooked, a gate that was trained makes a new one,
or none where the modules are no longer what the kernels stand in for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gateskip import kernels
from gateskip.config import BranchKey
from gateskip.execution.fused_mlp import is_silu
from gateskip.execution.inputs import CACHE_NAMES
from gateskip.gates import Gate
from gateskip.retrofit.families import FamilySpec
from gateskip.skipping.call import Call
from gateskip.skipping.compensation import compensation_of
from gateskip.skipping.score import Norm, scaled_vector

__all__ = ["NO", "YES", "additive", "layer_plans", "record", "takes_tokens", "token_layer"]

YES = torch.ones(1, 1, dtype=torch.bool)
NO = torch.zeros(1, 1, dtype=torch.bool)
NONE = torch.zeros(1, dtype=torch.int64)


class _UnfitError(Exception):
    """The modules are not what the kernels stand in for."""


class _Plan:
    """Addresses of one branch, and what must not have changed for them to hold."""

    def __init__(self, norm: nn.Module, module: nn.Module, gate: Gate, eps: float) -> None:
        self.members: list[tuple[dict[str, Any], str, Any]] = []
        self.tensors: list[tuple[Tensor, int]] = []
        self.versions: list[tuple[Tensor, int]] = []
        self.hooks: list[dict[Any, Any]] = []
        self.gate, self.generation = gate, gate.generation
        self.dtype = self._parameter(norm, "weight").dtype
        self._quiet(norm)
        self._quiet(module)
        hidden = int(self._parameter(norm, "weight").shape[0])
        score_w, score_b = scaled_vector(gate, Norm(norm, eps, "rms"))
        for t in (*gate.parameters(recurse=False), gate.score_scale, gate.score_shift, norm.weight):
            assert isinstance(t, Tensor)
            self.versions.append((t, t._version))
            self.tensors.append((t, t.data_ptr()))
        a, b, c, width, self.alike, keep_alive = _gate_matrices(gate, hidden)
        self.hidden = hidden
        self.inner = 0  # of an MLP
        self.sizes = (0, 0, 0)  # of an attention: query heads, key/value heads, head width
        comp = compensation_of(module)
        self.members.append((module._modules, "skip_compensation", comp))
        comp_a = comp_b = comp_c = rank = 0
        if comp is not None:
            comp_c = self._parameter(comp, "bias").data_ptr()
            if comp.down is not None:
                comp_a = self._parameter(comp, "down").data_ptr()
                comp_b = self._parameter(comp, "up").data_ptr()
                rank = comp.down.shape[0]
        self.head = [
            0, 0, score_w.data_ptr(), _real(score_b), _real(eps), 0,
            self._parameter(norm, "weight").data_ptr(), 0, 0,
            a, b, c, width, comp_a, comp_b, comp_c, rank, hidden,
        ]  # fmt: skip
        self.keep_alive: list[Any] = [score_w, *keep_alive]

    def _parameter(self, module: nn.Module, name: str) -> Tensor:
        """A parameter, now watched; raises _UnfitError unless kernels can read it."""
        t = module._parameters.get(name)
        if t is None or not kernels.supported(t.detach()):
            raise _UnfitError
        if hasattr(self, "dtype") and t.dtype != self.dtype:
            raise _UnfitError
        self.members.append((module._parameters, name, t))
        self.tensors.append((t, t.data_ptr()))
        return t

    def _quiet(self, module: nn.Module) -> None:
        """Watch for hooks; who hooks or replaces a module's forward wants to see it called."""
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            raise _UnfitError
        self.hooks += [module._forward_hooks, module._forward_pre_hooks]

    def linear(self, parent: nn.Module, name: str) -> tuple[int, int]:
        """(weight, bias or 0) addresses of a plain linear child."""
        child = parent._modules.get(name)
        if type(child) is not nn.Linear:
            raise _UnfitError
        self.members.append((parent._modules, name, child))
        self._quiet(child)
        bias = 0 if child.bias is None else self._parameter(child, "bias").data_ptr()
        return self._parameter(child, "weight").data_ptr(), bias

    def holds(self) -> bool:
        """Whether every address is still right and nobody listens."""
        return (
            self.gate.generation == self.generation
            and not any(self.hooks)
            and all(place.get(name) is what for place, name, what in self.members)
            and all(t.data_ptr() == address for t, address in self.tensors)
            and all(t._version == version for t, version in self.versions)
        )

    def arguments(self, tail: Sequence[int]) -> None:
        """Freeze the template; the call fills in what changes."""
        from gateskip.kernels.pool import TEAM

        self.template = np.array((*TEAM, *self.head, *tail), dtype=np.int64)


# Positions in a template that change with every call.
H, OUT, THRESHOLD, KEPT, SCRATCH = 3, 4, 8, 10, 11


def _real(value: float) -> int:
    from gateskip.kernels.rows import real

    return real(value)


def _gate_matrices(gate: Gate, hidden: int) -> tuple[int, int, int, int, bool, list[Tensor]]:
    """(A or 0, B, bias, columns of B, one row for all channels, tensors to keep alive)."""
    alike = gate.one_logit()
    if alike is not None:
        w_H, b = alike
        bias = torch.full((1,), b)
        return 0, w_H.data_ptr(), bias.data_ptr(), hidden, True, [w_H, bias]
    a, b_matrix, bias = gate.factors()
    parts = [t.detach().contiguous() for t in (a, b_matrix, bias) if t is not None]
    first = 0 if a is None else parts[0].data_ptr()
    return first, parts[-2].data_ptr(), parts[-1].data_ptr(), b_matrix.shape[1], False, parts


def _mlp_plan(layer: nn.Module, family: FamilySpec) -> _Plan | None:
    mlp = getattr(layer, family.mlp)
    if not family.fused_mlp or family.mlp_norm is None or not is_silu(mlp):
        return None
    norm = getattr(layer, family.mlp_norm)
    try:
        plan = _Plan(norm, mlp, mlp.skip_gate, float(getattr(norm, family.norm_eps)))
        (wg, bg), (wu, bu), (wd, bd) = (
            plan.linear(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")
        )
        if bg or bu or bd:
            raise _UnfitError
    except _UnfitError:
        return None
    inner = mlp.gate_proj.weight.shape[0]
    plan.arguments([int(plan.alike), wg, wu, wd, inner, 0, 0, 0, 0])
    plan.inner = inner
    return plan


def _attention_plans(layer: nn.Module, family: FamilySpec) -> tuple[_Plan, _Plan] | None:
    attention = getattr(layer, family.attention)
    if not family.fused_attention or family.attention_norm is None:
        return None
    if attention.config._attn_implementation != "sdpa":
        return None
    norm = getattr(layer, family.attention_norm)
    eps = float(getattr(norm, family.norm_eps))
    gate = attention.skip_gate
    try:
        project = _Plan(norm, attention, gate, eps)
        weights = [project.linear(attention, f"{name}_proj") for name in "qkv"]
        norms, norm_eps = [], 0.0
        for name in (family.q_norm, family.k_norm):
            child = None if name is None else getattr(attention, name)
            if child is None:
                norms.append(0)
                continue
            project._quiet(child)
            norms.append(project._parameter(child, "weight").data_ptr())
            norm_eps = float(getattr(child, family.norm_eps))
        attend = _Plan(norm, attention, gate, eps)
        wo, bo = attend.linear(attention, "o_proj")
    except _UnfitError:
        return None
    width = attention.head_dim
    if width > project.hidden:  # the scratch of a head
        return None
    heads, kv = (getattr(attention, f"{n}_proj").weight.shape[0] // width for n in "qk")
    flat = [address for pair in weights for address in pair]
    project.arguments(
        [*flat, heads, kv, width, 0, 0, *norms, _real(norm_eps), 0, 0, 0, width, 0, 0, 0]
    )
    attend.arguments([
        int(attend.alike), 0, 0, 0, 0, heads, heads // kv, width, 0, 0, 0, 0,
        _real(attention.scaling), 0, 0, 0, wo, bo, 0,
    ])  # fmt: skip
    project.sizes = (heads, kv, width)
    return project, attend


def layer_plans(layer: nn.Module, family: FamilySpec) -> tuple[_Plan, _Plan, _Plan] | None:
    """Addresses for projections, attention and MLP; the same object while all of them hold."""
    known = vars(layer).get("_gateskip_plans")
    if known is not None and all(plan.holds() for plan in known):
        return known
    vars(layer).pop("_gateskip_plans", None)
    both, mlp = _attention_plans(layer, family), _mlp_plan(layer, family)
    if both is None or mlp is None:
        return None
    found = vars(layer)["_gateskip_plans"] = (*both, mlp)
    return found


def takes_tokens(call: Call, layer: nn.Module, h_11H: Tensor) -> bool:
    """Whether the call decides and computes as the kernels do."""
    config = call.state.config
    return (
        call.forced is None
        and call.scores is None
        and config.kv_source == "project"
        and config.importance == "mean_logit"
        and tuple(config.branches) == ("attention", "mlp")
        and not layer.training
        and kernels.supported(h_11H)
    )


def token_layer(
    layer: nn.Module, call: Call, index: int, h_11H: Tensor, kwargs: dict[str, Any]
) -> Tensor | None:
    """The layer's output for one token, or None where the kernels cannot stand in.

    Decisions are those of the reference; keys and values reach the cache as always.
    """
    if not takes_tokens(call, layer, h_11H) or (index, "attention") in call.keep:
        return None
    plans = layer_plans(layer, call.state.family)
    if plans is None or plans[0].dtype != h_11H.dtype:
        return None
    project, attend, mlp = plans
    h = _attention(call, index, h_11H, kwargs, project, attend)
    return _mlp(call, index, h, mlp)


def _start(plan: _Plan, call: Call, key: Any, h: Tensor) -> tuple[Any, Tensor, Any, Tensor]:
    """(arguments, out, kept flag, scratch) of one call."""
    from gateskip.kernels.pool import Ints

    free = call.thresholds is None or call.protected_BT is not None
    threshold = -math.inf if free else call.thresholds[key]  # type: ignore[index]
    out = torch.empty_like(h)
    flag = np.zeros(1, dtype=np.int64)
    scratch = torch.empty(3 * plan.hidden * max(torch.get_num_threads(), 1))
    arguments: Ints = plan.template.copy()
    arguments[H], arguments[OUT] = h.data_ptr(), out.data_ptr()
    arguments[THRESHOLD] = _real(threshold)
    arguments[KEPT], arguments[SCRATCH] = flag.ctypes.data, scratch.data_ptr()
    return arguments, out, flag, scratch


def _attention(
    call: Call,
    index: int,
    h: Tensor,
    kwargs: dict[str, Any],
    project: _Plan,
    attend: _Plan,
) -> Tensor:
    from gateskip.kernels.token import ATTEND, PROJECT

    key = (index, "attention")
    heads, kv, width = project.sizes
    arguments, out, flag, scratch = _start(project, call, key, h)
    cos, sin = (t.to(h.dtype).contiguous() for t in kwargs["position_embeddings"])
    q = torch.empty(heads * width)
    k, v = h.new_empty(2, 1, kv, 1, width).unbind()
    arguments[30], arguments[31] = cos.data_ptr(), sin.data_ptr()
    arguments[35], arguments[36], arguments[37] = q.data_ptr(), k.data_ptr(), v.data_ptr()
    PROJECT(h.dtype, arguments, work=heads + 2 * kv)
    kept = bool(flag[0])
    cache = next((kwargs[n] for n in CACHE_NAMES if kwargs.get(n) is not None), None)
    if cache is not None:
        k, v = cache.update(k, v, index)
    record(call, key, kept)
    if not kept:
        return out
    keys = k.shape[2]
    mask = kwargs.get("attention_mask")
    if mask is not None:
        mask = additive(mask[0, 0, -1])
    if k.stride(3) != 1 or v.stride(3) != 1:
        k, v = k.contiguous(), v.contiguous()
    more = torch.empty(heads * (keys + width))
    again = attend.template.copy()
    again[H], again[OUT] = h.data_ptr(), out.data_ptr()
    again[KEPT], again[SCRATCH] = flag.ctypes.data, scratch.data_ptr()
    again[22:26] = q.data_ptr(), k.data_ptr(), v.data_ptr(), keys
    again[29:33] = k.stride(1), k.stride(2), v.stride(1), v.stride(2)
    again[34] = 0 if mask is None else mask.data_ptr()
    again[35], again[36] = more.data_ptr(), more.data_ptr() + 4 * heads * keys
    ATTEND(h.dtype, again, work=heads)
    return out


def additive(mask: Tensor) -> Tensor:
    """A mask as float32 addends."""
    if mask.dtype == torch.bool:
        blank = torch.zeros(mask.shape)
        return blank.masked_fill_(~mask, torch.finfo(torch.float32).min)
    return mask.float().contiguous()


def _mlp(call: Call, index: int, h: Tensor, plan: _Plan) -> Tensor:
    from gateskip.kernels.token import MLP

    key = (index, "mlp")
    inner = plan.inner
    arguments, out, flag, _scratch = _start(plan, call, key, h)
    act = torch.empty(2 * inner)
    arguments[26] = act.data_ptr()
    MLP(h.dtype, arguments, work=inner)
    kept = bool(flag[0])
    record(call, key, kept)
    return out


def record(call: Call, key: BranchKey, kept: bool) -> None:
    """Note a decision as the reference does."""
    if call.thresholds is not None:
        call.keep[key] = YES if kept else NO
    if not kept:
        call.computed[key] = NONE
