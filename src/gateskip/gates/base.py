"""What all gates share: float32 for ever, the score constants, and the decision vector.

Shapes: N tokens (any leading dimensions), H hidden channels, G gate channels (H or 1).
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from gateskip.config import GateConfig

__all__ = ["Gate", "constant", "no_autocast", "normal", "version"]


def no_autocast(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Context in which float32 stays float32 on the device of ``t``."""
    if torch.is_autocast_enabled(t.device.type):
        return torch.autocast(t.device.type, enabled=False)
    return contextlib.nullcontext()


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    """Float32 draws from N(0, 1) on the CPU, whatever the default dtype and device are."""
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


def constant(size: int, value: float) -> Tensor:
    """A float32 vector on the CPU."""
    return torch.full((size,), value, dtype=torch.float32, device="cpu")


def version(t: Tensor) -> int:
    """Grows when a tensor is written to; inference tensors do not count, nor may they change."""
    return 0 if t.is_inference() else t._version


class Gate(nn.Module, ABC):
    r"""A gate g = σ(z(u)) on one branch.

    The *score* that ranks tokens is s = (mean(z) − c) / a with constants a, c per gate
    (``score_scale``, ``score_shift``; 1 and 0 until fitted), so for gates that are linear in u the
    decision is one dot product with the averaged rows of the weight.

    Ours versus the paper (arXiv 2510.13876, eq. 2): the paper ranks by mean(σ(z)). Near
    initialisation σ is flat, so we rank by the logit; ``importance="mean_gate"`` is the paper's.

    Weights and arithmetic are float32 whatever happens around them: at g ≈ 0.993 neighbouring
    bfloat16 values are 0.004 apart, and ranks would collapse into ties.
    """

    #: Whether all layers have one and the same gate for their attention, and one for their MLP.
    shared: ClassVar[bool] = False
    #: False lets the loss through the gate's input into the residual stream.
    detach_input: bool = True

    score_scale: Tensor
    score_shift: Tensor
    score_weight: nn.Parameter | None
    score_bias: nn.Parameter | None
    #: A learned threshold ``[]``, while training moves it.
    threshold: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("score_scale", torch.ones((), dtype=torch.float32))
        self.register_buffer("score_shift", torch.zeros((), dtype=torch.float32))
        self.score_weight = self.score_bias = self.threshold = None
        self._decision_cache: tuple[Any, Tensor, float] | None = None
        self._alike_cache: tuple[Any, tuple[Tensor, float] | None] | None = None
        self._linear_cache: tuple[Any, bool] | None = None
        self._affine_cache: tuple[Any, tuple[float, float]] | None = None
        #: Grows when anything derived from the weights may be out of date.
        self.generation = 0

    @classmethod
    @abstractmethod
    def build(cls, config: GateConfig, hidden: int, generator: torch.Generator) -> Self:
        """A fresh gate for branches of width ``hidden``."""

    @abstractmethod
    def logits(self, u_NH: Tensor) -> Tensor:
        """z of float32 inputs: float32 ``[..., G]``."""

    @abstractmethod
    def mean_logit_weights(self) -> tuple[Tensor, Tensor]:
        """(w [H], b []) with mean(z) = w·u + b, differentiable; of a gate that is linear."""

    def mean_logit(self, u_NH: Tensor) -> Tensor:
        """mean(z) of float32 inputs ``[...]``, for gates that need not be linear."""
        return self.logits(u_NH).mean(-1)

    def linear(self) -> bool:
        """Whether z is linear in u."""
        return True

    def decides_linearly(self) -> bool:
        """Whether the score is one dot product with u; cached until a weight changes."""
        if self.score_weight is not None or type(self).linear is Gate.linear:
            return True
        stamp = self._stamp()
        if self.training or self._linear_cache is None or self._linear_cache[0] != stamp:
            with torch.no_grad():
                self._linear_cache = (stamp, self.linear())
        return self._linear_cache[1]

    def _stamp(self) -> Any:
        return tuple((version(p), p.data_ptr()) for p in self.parameters(recurse=False))

    @abstractmethod
    def set_direction(self, w_H: Tensor, shift: float) -> None:
        """Write z = w·u + shift on every channel; other directions are set to contribute zero."""

    @abstractmethod
    def factors(self) -> tuple[Tensor | None, Tensor, Tensor] | None:
        """(A [R, H] or None, B [G, R or H], bias [G]) with z = B·(A·u) + bias; None where z is not
        linear in u."""

    @abstractmethod
    def channels_alike(self) -> bool:
        """Whether all channels have the same logit, as after a closed-form fit."""

    def one_logit(self) -> tuple[Tensor, float] | None:
        """(w [H], b) with z = w·u + b on every channel, or None; cached until a weight changes."""
        stamp = self._stamp()
        if self.training or self._alike_cache is None or self._alike_cache[0] != stamp:
            with torch.no_grad(), no_autocast(self.score_scale):
                found = None
                if self.channels_alike():
                    w_H, b = self.mean_logit_weights()
                    found = (w_H.contiguous(), float(b))
            self._alike_cache = (stamp, found)
        return self._alike_cache[1]

    def forward(self, u_NH: Tensor) -> Tensor:
        """Gate values g in (0, 1), float32 ``[..., G]``, or ``[..., 1]`` where all are equal."""
        with no_autocast(u_NH):
            if torch.is_grad_enabled() or torch.compiler.is_compiling():
                return torch.sigmoid(self.logits(u_NH.float()))
            alike = self.one_logit()
            if alike is None:
                return self.logits(u_NH.float()).sigmoid_()
            return torch.matmul(u_NH.float(), alike[0]).add_(alike[1]).sigmoid_()[..., None]

    def add_head(self, hidden: int) -> None:
        """A score of its own, s = w·u + b from zero, so that the gate's value may train freely."""
        self.score_weight = nn.Parameter(constant(hidden, 0.0))
        self.score_bias = nn.Parameter(constant(1, 0.0)[0])

    @torch.no_grad()
    def set_head(self, w_H: Tensor, b: float) -> None:
        """Write the score of a gate that has a head."""
        assert self.score_weight is not None
        assert self.score_bias is not None
        self.score_weight.copy_(w_H.to(self.score_weight))
        self.score_bias.fill_(b)

    def decision_weights(self) -> tuple[Tensor, Tensor]:
        """(w [H], b []) with score = w·u + b, differentiable."""
        if self.score_weight is not None and self.score_bias is not None:
            return self.score_weight, self.score_bias
        with no_autocast(self.score_scale):
            w_H, b = self.mean_logit_weights()
            return w_H / self.score_scale, (b - self.score_shift) / self.score_scale

    def score(self, u_NH: Tensor) -> Tensor:
        """Scores of inputs ``[..., H]`` of any float dtype, float32 ``[...]``, differentiable."""
        with no_autocast(u_NH):
            if self.decides_linearly():
                w_H, b = self.decision_weights()
                return u_NH.float() @ w_H + b
            return (self.mean_logit(u_NH.float()) - self.score_shift) / self.score_scale

    def score_affine(self) -> tuple[float, float] | None:
        """(a, b) with mean logit = a·score + b; None where the score is not made of it."""
        if self.score_weight is not None:
            return None
        parts = (self.score_scale, self.score_shift)
        stamp = tuple((version(t), t.data_ptr()) for t in parts)
        if self._affine_cache is None or self._affine_cache[0] != stamp:
            self._affine_cache = (stamp, (float(parts[0]), float(parts[1])))  # asks the device
        return self._affine_cache[1]

    def decision_vector(self) -> tuple[Tensor, float]:
        """Detached :meth:`decision_weights`, cached until a weight changes."""
        parts = [*self.parameters(recurse=False), self.score_scale, self.score_shift]
        stamp = tuple((version(p), p.data_ptr()) for p in parts)
        if self.training or self._decision_cache is None or self._decision_cache[0] != stamp:
            with torch.no_grad():
                w_H, b = self.decision_weights()
            self._decision_cache = (stamp, w_H.detach().contiguous(), float(b))
        return self._decision_cache[1], self._decision_cache[2]

    def train(self, mode: bool = True) -> Self:
        """As of every module. While training nothing derived from weights is cached: PyTorch's
        fused optimisers change weights without counting up their versions."""
        self._forget()
        return super().train(mode)

    def _forget(self) -> None:
        self._decision_cache = self._alike_cache = None
        self._linear_cache = self._affine_cache = None
        vars(self).pop("_scaled", None)
        self.generation += 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow device moves but never dtype changes."""
        self._forget()

        def moved(t: Tensor) -> Tensor:
            out = fn(t)
            return out if out.dtype == t.dtype else t.to(out.device)

        return super()._apply(moved, recurse)
