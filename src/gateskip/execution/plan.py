"""Plans: what the kernels of a token read of a layer, and whether it is still so.

A *plan* holds everything that a branch reads. It is checked before every use: a weight that was
moved, a module that was wrapped or hooked, a gate that was trained makes a new one, or none where
the modules are no longer what the kernels stand in for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gateskip import kernels
from gateskip.execution.fused_mlp import is_silu
from gateskip.gates import Gate, version
from gateskip.retrofit.families import FamilySpec
from gateskip.retrofit.listeners import heard, listened
from gateskip.skipping.compensation import compensation_of
from gateskip.skipping.score import Norm, scaled_vector

__all__ = ["Plan", "Plans", "all_plans", "layer_plans"]


SURE = 100.0  # a gate's logit, whose sigmoid is 1 in float32


class _UnfitError(Exception):
    """The modules are not what the kernels stand in for."""


class Plan:
    """Addresses of one branch, and what must not have changed for them to hold."""

    def __init__(self, norm: nn.Module, module: nn.Module, gate: Gate, eps: float) -> None:
        self.members: list[tuple[dict[str, Any], str, Any]] = []
        self.tensors: list[tuple[Tensor, int]] = []
        self.versions: list[tuple[Tensor, int]] = []
        self.hooks: list[dict[Any, Any]] = []
        if not gate.decides_linearly():
            raise _UnfitError
        self.gate, self.generation = gate, gate.generation
        self.backend = self.current_backend()
        self.dtype = self._parameter(norm, "weight").dtype
        self._quiet(norm)
        self._quiet(module)
        hidden = int(self._parameter(norm, "weight").shape[0])
        score_w, score_b = scaled_vector(gate, Norm(norm, eps, "rms"))
        for t in (*gate.parameters(recurse=False), gate.score_scale, gate.score_shift, norm.weight):
            assert isinstance(t, Tensor)
            self.versions.append((t, version(t)))
            self.tensors.append((t, t.data_ptr()))
        self.norm, self.eps, self.score = self._parameter(norm, "weight"), eps, (score_w, score_b)
        self.factors, self.alike = _gate_matrices(gate)
        self.hidden = hidden
        self.inner = 0  # of an MLP
        self.scaling = 1.0  # of an attention
        self.sizes = (0, 0, 0)  # of an attention: query heads, key/value heads, head width
        comp = compensation_of(module)
        self.members.append((module._modules, "skip_compensation", comp))
        self.compensation: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if comp is not None:
            thin = comp.down is not None
            down, up = (self._parameter(comp, n) if thin else None for n in ("down", "up"))
            self.compensation = (down, up, self._parameter(comp, "bias"))
        self.weights: list[tuple[Tensor, Tensor | None]] = []
        self.norms: list[tuple[Tensor | None, float]] = []
        self.quantised: bool | None = None  # not known yet

    def current_backend(self) -> str:
        """Whose kernels this thread uses where the gate is."""
        return kernels.backend(self.gate.score_scale.device.type)

    def _parameter(self, module: nn.Module, name: str) -> Tensor:
        """A parameter, now watched; raises _UnfitError unless kernels can read it."""
        t = module._parameters.get(name)
        if t is None or not kernels.readable(t.detach()):
            raise _UnfitError
        if hasattr(self, "dtype") and t.dtype != self.dtype:
            raise _UnfitError
        self.members.append((module._parameters, name, t))
        self.tensors.append((t, t.data_ptr()))
        return t

    def _quiet(self, module: nn.Module) -> None:
        """Watch for hooks; who hooks or replaces a module's forward wants to see it called."""
        if listened(module):
            raise _UnfitError
        self.members.append((vars(module), "forward", None))
        self.hooks += [module._forward_hooks, module._forward_pre_hooks]

    def linear(self, parent: nn.Module, name: str) -> tuple[int, int, int]:
        """Addresses of a linear child's (weight, bias or 0, scales of 8-bit rows or 0).

        :attr:`weights` gets weight and bias.
        """
        child = parent._modules.get(name)
        if type(child) is not nn.Linear:
            raise _UnfitError
        self.members.append((parent._modules, name, child))
        self._quiet(child)
        bias = None if child.bias is None else self._parameter(child, "bias")
        weight, scale = self._weight(child)
        self.weights.append((weight, bias))
        return weight.data_ptr(), _address(bias), _address(scale)

    def _weight(self, child: nn.Linear) -> tuple[Tensor, Tensor | None]:
        """A weight as it lies in memory, and its rows' scales where it is of 8 bits (torchao)."""
        held = child._parameters["weight"]
        assert held is not None
        quantised = type(held).__name__ == "Int8Tensor"
        if self.quantised not in (None, quantised):
            raise _UnfitError
        self.quantised = quantised
        if not quantised:
            return self._parameter(child, "weight"), None
        parts = vars(held)
        data, scale, zero = (parts.get(name) for name in ("qdata", "scale", "zero_point"))
        fits = (
            self.backend == "numba" and kernels.readable(self.norm.detach())
            and parts.get("act_quant_kwargs") is None and parts.get("act_pre_scale") is None
            and isinstance(data, Tensor) and isinstance(scale, Tensor)
            and data.dtype == torch.int8 and data.is_contiguous() and data.device.type == "cpu"
            and scale.dtype == torch.float32 and scale.shape == (data.shape[0], 1)
            and scale.is_contiguous() and (zero is None or not bool(zero.any()))
        )  # fmt: skip
        if not fits:
            raise _UnfitError
        assert data is not None
        assert scale is not None
        self.members.append((child._parameters, "weight", held))
        for name, t in (("qdata", data), ("scale", scale)):
            self.members.append((parts, name, t))
            self.tensors.append((t, t.data_ptr()))
        return data, scale

    def holds(self) -> bool:
        """Whether every address is still right and nobody listens."""
        return (
            self.gate.generation == self.generation
            and self.backend == self.current_backend()
            and not any(map(heard, self.hooks))
            and all(place.get(name) is what for place, name, what in self.members)
            and all(t.data_ptr() == address for t, address in self.tensors)
            and all(version(t) == seen for t, seen in self.versions)
        )

    def arguments(self, tail: Sequence[int]) -> None:
        """Freeze the CPU kernels' template; the call fills in what changes."""
        if self.backend != "numba":
            return
        from gateskip.kernels.pool import TEAM

        a, b, c = self.factors
        down, up, shift = self.compensation
        head = [
            0, 0, self.score[0].data_ptr(), kernels.real(self.score[1]), kernels.real(self.eps), 0,
            self.norm.data_ptr(), 0, 0,
            _address(a), b.data_ptr(), c.data_ptr(), b.shape[-1],
            _address(down), _address(up), _address(shift), 0 if down is None else down.shape[0],
            self.hidden,
        ]  # fmt: skip
        self.template = np.array((*TEAM, *head, *tail), dtype=np.int64)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _gate_matrices(gate: Gate) -> tuple[tuple[Tensor | None, Tensor, Tensor], bool]:
    """((A or None, B, bias), whether B is one row for all channels)."""
    alike = gate.one_logit()
    if alike is not None:
        w_H, b = alike
        return (None, w_H, torch.full((1,), b, dtype=torch.float32, device=w_H.device)), True
    factors = gate.factors()
    if factors is None:
        raise _UnfitError
    a, b_matrix, bias = factors
    parts = [t.detach().contiguous() for t in (b_matrix, bias)]
    return (None if a is None else a.detach().contiguous(), *parts), False  # type: ignore[return-value]


def _mlp_plan(layer: nn.Module, family: FamilySpec) -> Plan | None:
    mlp = getattr(layer, family.mlp)
    if not family.fused_mlp or family.mlp_norm is None or not is_silu(mlp):
        return None
    norm = getattr(layer, family.mlp_norm)
    try:
        plan = Plan(norm, mlp, mlp.skip_gate, float(getattr(norm, family.norm_eps)))
        (wg, bg, sg), (wu, bu, su), (wd, bd, sd) = (
            plan.linear(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")
        )
        plan._quiet(mlp.act_fn)
        if bg or bu or bd:
            raise _UnfitError
    except _UnfitError:
        return None
    inner = mlp.gate_proj.weight.shape[0]
    plan.members.append((mlp._modules, "act_fn", mlp.act_fn))
    plan.arguments([int(plan.alike), wg, wu, wd, inner, 0, sg, su, sd])
    plan.inner = inner
    return plan


def _attention_plans(layer: nn.Module, family: FamilySpec) -> tuple[Plan, Plan] | None:
    attention = getattr(layer, family.attention)
    if not family.fused_attention or family.attention_norm is None:
        return None
    if attention.config._attn_implementation != "sdpa":
        return None
    norm = getattr(layer, family.attention_norm)
    eps = float(getattr(norm, family.norm_eps))
    gate = attention.skip_gate
    try:
        project = Plan(norm, attention, gate, eps)
        weights = [project.linear(attention, f"{name}_proj") for name in "qkv"]
        norms, norm_eps = [], 0.0
        for name in (family.q_norm, family.k_norm):
            child = None if name is None else getattr(attention, name)
            if child is None:
                norms.append(0)
                project.norms.append((None, 0.0))
                continue
            project._quiet(child)
            weight = project._parameter(child, "weight")
            norms.append(weight.data_ptr())
            norm_eps = float(getattr(child, family.norm_eps))
            project.norms.append((weight, norm_eps))
        attend = Plan(norm, attention, gate, eps)
        wo, bo, so = attend.linear(attention, "o_proj")
    except _UnfitError:
        return None
    width = attention.head_dim
    if width > project.hidden:  # the scratch of a head
        return None
    heads, kv = (getattr(attention, f"{n}_proj").weight.shape[0] // width for n in "qk")
    flat = [address for weight, bias, _ in weights for address in (weight, bias)]
    scales = [scale for _, _, scale in weights]
    project.arguments([
        *flat, heads, kv, width, 0, 0, *norms, kernels.real(norm_eps), 0, 0, 0, width, *scales,
    ])  # fmt: skip
    attend.arguments([
        int(attend.alike), 0, 0, 0, 0, heads, heads // kv, width, 0, 0, 0, 0,
        kernels.real(attention.scaling), 0, 0, 0, wo, bo, so,
    ])  # fmt: skip
    attend.members.append((vars(attention), "scaling", attention.scaling))
    project.sizes, attend.scaling = (heads, kv, width), float(attention.scaling)
    return project, attend


def layer_plans(layer: nn.Module, family: FamilySpec) -> tuple[Plan, Plan, Plan] | None:
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


def _once(named: Iterable[tuple[Any, Any]]) -> list[Any]:
    return list(dict(named).values())


class Plans:
    """The plans of all layers of a decoder, projections, attention and MLP of each.

    Attributes:
        triples: of every layer. dtype, sizes, inner, quantised: alike in all of them.
        backend: whose kernels.
        template: the CPU kernels' arguments, int64 ``[L, 3, columns]``.
        thresholds: a call's, and what a backend made of them. extra: a backend's own.
    """

    def __init__(self, triples: list[tuple[Plan, Plan, Plan]]) -> None:
        self.triples = triples
        project, _, mlp = triples[0]
        self.dtype, self.sizes, self.inner = project.dtype, project.sizes, mlp.inner
        self.backend, self.quantised = project.backend, bool(project.quantised)
        self.thresholds: tuple[Any, Any] = (None, None)
        self.extra: Any = None
        plans = [plan for triple in triples for plan in triple]
        # Checked for every token, so each thing once, and in plain loops.
        self._ungated: Any = None
        self._gates = _once((id(p.gate), (p.gate, p.generation)) for p in plans)
        self._hooks = _once((id(hooks), hooks) for p in plans for hooks in p.hooks)
        self._members = _once(((id(m[0]), m[1]), m) for p in plans for m in p.members)
        self._tensors = _once((id(pair[0]), pair) for p in plans for pair in p.tensors)
        self._versions = _once((id(pair[0]), pair) for p in plans for pair in p.versions)
        if self.backend != "numba":
            return
        columns = max(len(plan.template) for plan in plans)
        self.template = np.zeros((len(triples), 3, columns), dtype=np.int64)
        for cells, plan in zip(self.template.reshape(-1, columns), plans, strict=True):
            cells[: len(plan.template)] = plan.template

    def ungated(self) -> Any:
        """The template with gates that are 1 for every token and channel."""
        if self._ungated is None:
            hidden = self.triples[0][0].hidden
            zeros, much = torch.zeros(hidden), torch.full((1,), SURE)
            found = self.template.copy()
            for row in (1, 2):  # attention's output, MLP
                found[:, row, 12:16] = 0, zeros.data_ptr(), much.data_ptr(), hidden
                found[:, row, 21] = 1
            self._ungated = (found, zeros, much)
        return self._ungated[0]

    def __deepcopy__(self, memo: Any) -> None:
        """A copied model makes its own."""

    def holds(self) -> bool:
        """Whether every address is still right and nobody listens."""
        for gate, generation in self._gates:
            if gate.generation != generation:
                return False
        for hooks in self._hooks:
            if heard(hooks):
                return False
        for place, name, what in self._members:
            if place.get(name) is not what:
                return False
        for t, address in self._tensors:
            if t.data_ptr() != address:
                return False
        for t, seen in self._versions:
            if version(t) != seen:
                return False
        return True


def all_plans(layers: list[nn.Module], family: FamilySpec) -> Plans | None:
    """Plans of all layers, the same object while they hold; None where any has none or differs."""
    owner = vars(layers[0])
    known: Plans | None = owner.get("_gateskip_stack")
    if (
        known is not None
        and len(known.triples) == len(layers)
        and known.backend == known.triples[0][0].current_backend()
        and known.holds()
    ):
        return known
    owner.pop("_gateskip_stack", None)
    triples = []
    for layer in layers:
        found = layer_plans(layer, family)
        if found is None:
            return None
        triples.append(found)
    plans = Plans(triples)
    if any(p[0].sizes != plans.sizes or p[2].inner != plans.inner for p in triples):
        return None
    if any(plan.quantised != plans.quantised for triple in triples for plan in triple):
        return None
    owner["_gateskip_stack"] = plans
    return plans
