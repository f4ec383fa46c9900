r"""Scores: the scalar that ranks a token at a branch.

Shapes: B rows, T tokens, H hidden.

For an RMS-normalised input u = γ ⊙ h / rms(h) the mean-logit score is
s = (w ⊙ γ)·h / rms(h) + b: one dot product and one norm of the residual, so a skipped token's
normalised input need not exist. (After a layer norm it has to.) Masked and compacted execution
share this function, hence decide alike.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn

from gateskip import kernels
from gateskip.config import BranchKey
from gateskip.gates import Gate, no_autocast, version
from gateskip.retrofit.devices import comes_and_goes
from gateskip.retrofit.families import FamilySpec
from gateskip.retrofit.listeners import listened

__all__ = [
    "RAW",
    "Norm",
    "branch_score",
    "normed_at",
    "random_score",
    "scaled_vector",
    "single_score",
    "softmax_gap",
]

RESIDUAL_EPS = 1e-6


@dataclasses.dataclass(frozen=True, slots=True)
class Norm:
    """What a branch does to the residual that it reads.

    Attributes:
        module: the family's norm. None in post-norm families: the branch reads the residual as it
            is, and its gate the residual over its rms, whose scale grows with depth.
        eps: the norm's epsilon. kind: as in ``FamilySpec``, or ``"raw"`` for no norm at all.
    """

    module: nn.Module | None
    eps: float
    kind: str

    @classmethod
    def of(cls, layer: nn.Module, family: FamilySpec, kind: str) -> Norm:
        """The norm of a layer's attention or MLP."""
        name = family.attention_norm if kind == "attention" else family.mlp_norm
        if name is None:
            return cls(None, RESIDUAL_EPS, "rms")
        module = getattr(layer, name)
        return cls(module, float(getattr(module, family.norm_eps)), family.norm_kind)

    def __call__(self, h: Tensor) -> Tensor:
        """The gate's input, same shape and dtype as h."""
        if self.module is not None:
            out: Tensor = self.module(h)
            return out
        if self.kind == "raw":
            return h
        return nn.functional.rms_norm(h, h.shape[-1:], eps=self.eps)

    @property
    def scales(self) -> bool:
        """Whether it multiplies by a vector over the rms, so that a score is one dot product."""
        if self.module is not None and comes_and_goes(self.module):
            return False  # its weight may be read by itself only
        return self.kind not in ("layer", "raw")

    @property
    def hooked(self) -> bool:
        """Whether somebody listens to the module, or changes what it returns."""
        module = self.module
        return module is not None and listened(module)

    @property
    def fused(self) -> bool:
        """Whether the kernels compute the same: weight · round(h / rms)."""
        return self.kind == "rms" and self.module is not None and not self.hooked

    def scaled(self, w_H: Tensor) -> Tensor:
        """The vector w ⊙ γ, float32."""
        if self.module is None:
            return w_H
        weight = cast(Tensor, self.module.weight).detach().float()
        return w_H * (weight + 1.0 if self.kind == "rms_offset" else weight)

    def stamp(self) -> tuple[int, int]:
        """Changes with the norm's weight."""
        if self.module is None:
            return 0, 0
        weight = cast(Tensor, self.module.weight)
        return weight.data_ptr(), version(weight)


#: The gate's input is the residual as it is.
RAW = Norm(None, 0.0, "raw")


def branch_score(
    h_BTH: Tensor, norm: Norm, gate: Gate, importance: str
) -> tuple[Tensor, Tensor | None]:
    """(scores [B, T], 1 / rms(h) [B·T] where the kernels found it), float32.

    Gradients reach the gate only (its input is detached).

    Args:
        h_BTH: residual stream that the branch reads.
        norm: what the branch does to it.
        gate: the branch's gate.
        importance: ``"mean_logit"``, ``"head"`` or ``"mean_gate"``.
    """
    bent = not gate.decides_linearly()
    if importance == "mean_gate" or bent or not norm.scales:
        with torch.no_grad():
            u_BTH = norm(h_BTH)
        if importance == "mean_gate":
            return gate(u_BTH.detach()).mean(-1), None
        if bent:
            return gate.score(u_BTH.detach()), None
        w_H, b = gate.decision_weights() if uncached() else gate.decision_vector()
        with no_autocast(u_BTH):
            return torch.matmul(u_BTH.detach().float(), w_H) + b, None
    if uncached():
        w_H, b = gate.decision_weights()
        return _linear_score(h_BTH, norm.eps, norm.scaled(w_H), b), None
    vector_H, shift = scaled_vector(gate, norm)
    rows = kernels.row_kernels(h_BTH)
    if rows is None:
        return _linear_score(h_BTH, norm.eps, vector_H, shift), None
    flat = h_BTH.view(-1, h_BTH.shape[-1])
    score_N, inverse_N = rows.score_rows(flat, vector_H, shift, norm.eps)
    return score_N.view(h_BTH.shape[:-1]), inverse_N if norm.fused else None


def uncached() -> bool:
    """Whether vectors are derived from weights anew: they have a gradient, or a graph asks."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def scaled_vector(gate: Gate, norm: Norm) -> tuple[Tensor, float]:
    """(decision vector times the norm's weight [H] float32, decision bias), cached."""
    w_H, b = gate.decision_vector()
    stamp = (w_H.data_ptr(), *norm.stamp())
    cached = vars(gate).get("_scaled")
    if gate.training or cached is None or cached[0] != stamp:
        # The decision vector is kept alive here, so its address cannot be given to another.
        cached = (stamp, norm.scaled(w_H).contiguous(), w_H)
        vars(gate)["_scaled"] = cached
    return cached[1], b


def normed_at(
    h_NH: Tensor, norm: Norm, inverse_N: Tensor | None, index_M: Tensor | None, rows: int
) -> Tensor:
    """The branch's input u = norm(h) at rows ``index_M`` (None: all), ``[rows, H]``.

    Args:
        inverse_N: 1 / rms(h) from :func:`branch_score`, saves reading the rows twice.
        rows: at least M; rows from M on are zero.
    """
    fused = kernels.row_kernels(h_NH) if inverse_N is not None and norm.fused else None
    if fused is not None:
        assert inverse_N is not None
        weight = cast(Any, norm.module).weight.detach()
        if kernels.row_kernels(weight) is fused and weight.dtype == h_NH.dtype:
            u: Tensor = fused.norm_rows(h_NH, inverse_N, weight, index_M, rows)
            return u
    u_MH = norm(h_NH if index_M is None else h_NH.index_select(0, index_M))
    more = rows - u_MH.shape[0]
    return nn.functional.pad(u_MH, (0, 0, 0, more)) if more else u_MH


def softmax_gap(logits_NV: Tensor) -> Tensor:
    """Gap between the two largest probabilities, float32 ``[N]``: how sure a prediction is (CALM,
    arXiv 2207.07061, section 3.4)."""
    top_N2 = logits_NV.float().softmax(-1).topk(2).values
    return top_N2[:, 0] - top_N2[:, 1]


def random_score(place_BT: Tensor, key: BranchKey, seed: int) -> Tensor:
    """A score in [0, 1) that knows nothing of the token: a hash of its place and the branch.

    The same in prefill and decoding, alone or in a batch, so it is a null in every execution.

    Args:
        place_BT: the token's place among the valid ones of its sequence, int64 ``[B, T]``.
    """
    salt = (seed * 2 + (key[1] == "mlp")) * 1_000_003 + key[0] * 7_919
    x = (place_BT + salt) & 0x7FFFFFFF
    for factor in (0x45D9F3B, 0x119DE1F3):  # multiply-xorshift rounds on 31 bits
        x = ((x ^ (x >> 16)) * factor) & 0x7FFFFFFF
    x = x ^ (x >> 16)
    return (x & 0xFFFFFF).float() / float(1 << 24)


def _linear_score(h_BTH: Tensor, eps: float, scaled_H: Tensor, b: Tensor | float) -> Tensor:
    with no_autocast(h_BTH):
        h = h_BTH.detach().float()
        rms = torch.linalg.vector_norm(h, dim=-1).square_().div_(h.shape[-1]).add_(eps).rsqrt_()
        return torch.matmul(h, scaled_H) * rms + b


def single_score(h_H: Tensor, w_H: Tensor, b: float, eps: float) -> float:
    """The mean-logit score of one token, as a float (CPU decoding at batch 1).

    Args:
        h_H: residual of the token, ``[H]``.
        w_H: decision vector times the norm's weight, float32.
        b: decision bias.
        eps: the norm's epsilon.
    """
    with no_autocast(h_H):
        h = h_H.float()
        square, product = float(torch.dot(h, h)), float(torch.dot(h, w_H))
    return product / (square / h.shape[0] + eps) ** 0.5 + b
