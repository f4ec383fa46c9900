"""Early exits: a token that is sure of the next one skips all deeper layers.

Shapes: B rows, T new tokens, N tokens that are asked, H hidden, V vocabulary, L layers.

The score of a layer is the negative of the highest confidence so far, so once below a threshold it
stays there, and one threshold for all layers is an exit rule. A token that has left keeps its
residual, from which deeper layers project its keys and values: the state copying of CALM. Whoever
is still there is asked before a layer; those calls of the LM head are in the ledger.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from gateskip.config import BranchKey, one_of
from gateskip.costs import ModelShape
from gateskip.errors import UnsupportedError
from gateskip.retrofit.attach import decoder_of, find_family, head_of, inner_model
from gateskip.retrofit.families import FamilySpec
from gateskip.retrofit.head import LogitHead
from gateskip.skipping.call import Call
from gateskip.skipping.rule import Rule
from gateskip.skipping.score import softmax_gap

__all__ = ["GRID", "MEASURES", "ExitRule"]

MEASURES = ("softmax", "state", "probe")
#: The score before anybody was asked, and its negative that of who has left: beyond what a
#: confidence can be, and near enough to interpolate towards.
UNSURE = 2.0
NEVER = -1  # stands for None in a tensor
#: Shares of pairs kept that thresholds of exits are found for.
GRID = (0.95, 0.9, 0.84, 0.77, 0.7, 0.6, 0.5, 0.4)
CHUNK = 512  # tokens whose logits exist at once
SHARE = 0.9  # of a threshold that does not decay


class ExitRule(Rule):
    """CALM's confidences (arXiv 2207.07061, sections 3.2 and 3.4).

    ``"softmax"``: the gap between the two most likely tokens; ``"state"``: cosine of a token's
    states before and after a layer; ``"probe"``: a logistic regression on its normalised state.
    A token at place t leaves where its confidence is at least 0.9 λ + 0.1 · e^(−decay · t / N).

    Args:
        measure: one of the three. decay, horizon: decay and N, of the threshold over places.
        first: the first layer that may be skipped. last: the last one before which tokens are
            asked; None asks before all that follow.
        probes: of ``"probe"``, float32 ``[L, H + 1]``, bias last.
    """

    name: ClassVar[str] = "exit"
    causal: ClassVar[bool] = True
    nested: ClassVar[bool] = True

    def __init__(
        self,
        measure: str = "softmax",
        *,
        decay: float = 4.0,
        horizon: int = 256,
        first: int = 1,
        last: int | None = None,
        probes: Tensor | None = None,
    ) -> None:
        one_of("measure", measure, MEASURES)
        self.measure, self.decay, self.horizon, self.first = measure, decay, horizon, first
        self.last = last
        self.probes = probes
        self.norm: nn.Module | None = None
        self.head: nn.Module | None = None

    def bind(self, model: nn.Module) -> None:
        """Take the norm and the head that confidences are asked of."""
        inner = inner_model(model)
        family = find_family(inner.config)
        head = head_of(model)
        assert head is not None
        self.norm = final_norm(model, family)
        self.head = LogitHead(head, family, inner.config)

    def macs(self, key: BranchKey, shape: ModelShape) -> int:
        """MACs of asking one token before a layer."""
        if key[1] != "attention" or not self._asks(key[0]):
            return 0
        each = {"softmax": shape.macs_lm_head, "state": 3 * shape.hidden, "probe": shape.hidden}
        return each[self.measure]

    def tensors(self) -> Mapping[str, Tensor]:
        numbers = torch.tensor(
            [
                MEASURES.index(self.measure),
                self.decay,
                self.horizon,
                self.first,
                NEVER if self.last is None else self.last,
            ],
            dtype=torch.float64,
        )
        found = {"settings": numbers}
        return found if self.probes is None else found | {"probes": self.probes}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        measure, decay, horizon, first, *more = tensors["settings"].tolist()
        last = more[0] if more else NEVER
        return cls(
            MEASURES[int(measure)], decay=decay, horizon=int(horizon), first=int(first),
            last=None if last == NEVER else int(last), probes=tensors.get("probes"),
        )  # fmt: skip

    def _asks(self, layer: int) -> bool:
        """Whether tokens are asked before a layer."""
        return layer >= self.first and (self.last is None or layer <= self.last)

    def score(self, key: BranchKey, h_BTH: Tensor, call: Call) -> Tensor:
        layer = key[0]
        before_BT, h_before = call.memory.get("exit", (None, None))
        if before_BT is None:
            before_BT = torch.full(h_BTH.shape[:2], UNSURE, device=h_BTH.device)
        score_BT = before_BT
        if self._asks(layer):
            there_BT = call.keep.get((layer - 1, "attention"))
            there_BT = call.everyone() if there_BT is None else there_BT & call.everyone()
            there_N = there_BT.flatten().nonzero()[:, 0]
            call.asked[key] = there_BT.sum(1)
            sure_N = self._confidence(layer, h_BTH, h_before, there_N)
            fall_N = (-self.decay * call.visible_keys().flatten()[there_N] / self.horizon).exp()
            found_N = (sure_N - (1.0 - SHARE) * fall_N) / SHARE
            flat = torch.full_like(before_BT, -UNSURE).flatten()
            flat[there_N] = torch.minimum(before_BT.flatten()[there_N], -found_N)
            score_BT = flat.view_as(before_BT)
        call.memory["exit"] = (score_BT, h_BTH if self.measure == "state" else None)
        return score_BT

    def _confidence(
        self, layer: int, h_BTH: Tensor, before_BTH: Tensor | None, there_N: Tensor
    ) -> Tensor:
        """In [0, 1] (a cosine may be below), float32 ``[N]``."""
        if self.norm is None or self.head is None:
            raise UnsupportedError("the exit rule does not know its model; call rule.bind(model).")
        h_NH = h_BTH.flatten(0, 1).index_select(0, there_N)
        if self.measure == "state":
            assert before_BTH is not None
            then_NH = before_BTH.flatten(0, 1).index_select(0, there_N)
            return nn.functional.cosine_similarity(then_NH.float(), h_NH.float(), dim=-1)
        u_NH = self.norm(h_NH)
        if self.measure == "probe":
            assert self.probes is not None
            probe_H = self.probes[layer].to(h_NH.device)
            return torch.sigmoid(u_NH.float() @ probe_H[:-1] + probe_H[-1])
        gaps = [u_NH.new_zeros(0, dtype=torch.float32)]
        for part in u_NH.split(CHUNK):
            gaps.append(softmax_gap(self.head(part)))
        return torch.cat(gaps)


def final_norm(model: nn.Module, family: FamilySpec) -> nn.Module:
    """The norm before the LM head."""
    found: Any = getattr(decoder_of(model, family), family.final_norm)
    return found
