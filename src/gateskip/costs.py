"""What a branch, a gate, a compensation, the LM head and attention scores cost.

Costs are functions of the architecture (:class:`ModelShape`) alone: multiply-accumulates (MACs)
per token, bytes of weights read per call, and parameters. Knows nothing of gates' values,
decisions or runs; the ledger multiplies these figures with what really happened.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from gateskip.config import BranchKey, GateConfig
from gateskip.errors import ConfigError

__all__ = [
    "BranchCost",
    "ModelShape",
    "branch_cost",
    "break_even_skip_rate",
    "gate_parameters",
    "net_share",
]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of a decoder.

    Attributes:
        layers: number of decoder layers.
        hidden: width H of the residual stream.
        heads: query heads. kv_heads: key and value heads. head_dim: width of one head.
        intermediate: inner width of the MLP.
        vocab: rows of the LM head.
        mlp_projections: matrices of one MLP (3 for gated MLPs, 2 otherwise).
        whole_qkv: keys and values of a skipped token cost its query, too: the projection is one.
        experts: in a mixture, experts_per_token of them work on a token, of inner width
            expert_intermediate; dense_layers have a plain MLP all the same.
        weight_bytes: bytes of one stored weight.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    mlp_projections: int = 3
    weight_bytes: int = 4
    whole_qkv: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    dense_layers: frozenset[int] = frozenset()

    @property
    def macs_q_o(self) -> int:
        """MACs per token of the query and output projections."""
        return 2 * self.hidden * self.heads * self.head_dim

    @property
    def macs_kv(self) -> int:
        """MACs per token of the key and value projections."""
        return 2 * self.hidden * self.kv_heads * self.head_dim

    @property
    def macs_skipped_kv(self) -> int:
        """MACs of keys and values of a token whose query is not wanted."""
        return self.macs_kv + (self.macs_q_o // 2 if self.whole_qkv else 0)

    @property
    def macs_per_key(self) -> int:
        """MACs of the attention scores and the weighted sum, per query token and visible key."""
        return 2 * self.heads * self.head_dim

    @property
    def macs_mlp(self) -> int:
        """MACs per token of one MLP."""
        return self.mlp_projections * self.hidden * self.intermediate

    def macs_mlp_of(self, layer: int) -> int:
        """MACs per token of the MLP of a layer, or of the experts that it uses and their router."""
        if not self.experts or layer in self.dense_layers:
            return self.macs_mlp
        expert = 3 * self.hidden * self.expert_intermediate
        return self.experts_per_token * expert + self.experts * self.hidden

    @property
    def macs_lm_head(self) -> int:
        """MACs per position whose logits are computed."""
        return self.hidden * self.vocab

    def dense_macs(self, keys: float) -> float:
        """Decoder MACs per token of the dense model when a token sees ``keys`` keys on average."""
        attention = self.macs_q_o + self.macs_kv + self.macs_per_key * keys
        return self.layers * attention + sum(self.macs_mlp_of(i) for i in range(self.layers))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BranchCost:
    """MACs per token, and weights read per call, of one branch.

    Attributes:
        gated: whether tokens can skip it.
        computed: projections of a kept token (attention scores apart).
        per_key: MACs per visible key of a kept token.
        kept_gate: gate value of a kept token.
        decision: score of any valid token.
        skipped: K/V projection and compensation of a skipped token.
        weights: numbers read when at least one token is kept (of experts: by one token).
        weights_kv: numbers read for K/V alone when tokens are skipped and none is kept.
        gate_weights: float32 numbers read for gate values.
        decision_weights: float32 numbers read for the decision.
        skipped_weights: float32 numbers read for the compensation.
    """

    gated: bool
    computed: int
    per_key: int
    kept_gate: int
    decision: int
    skipped: int
    weights: int
    weights_kv: int
    gate_weights: int
    decision_weights: int
    skipped_weights: int


def gate_macs(kind: str, hidden: int, rank: int, groups: int = 1) -> int:
    """MACs of one gate value (all channels) for one token."""
    by_kind = {
        "vector": hidden * hidden,
        "shared": hidden * hidden,
        "low_rank": 2 * hidden * rank,
        "mlp": 2 * hidden * max(rank, 2),
        "grouped": hidden * groups,
        "scalar": hidden,
        "unit": 0,
        "router": hidden,
        "bottleneck": (hidden + 1) * max(rank, 2),
    }
    if kind not in by_kind:
        raise ConfigError(f"kind={kind!r}: no cost is known for this gate kind.")
    return by_kind[kind]


def gate_parameters(kind: str, hidden: int, rank: int, groups: int = 1) -> int:
    """Parameters of one gate, bias included."""
    biases = {"scalar": 1, "grouped": groups, "unit": 0, "router": 1, "bottleneck": 1}
    return gate_macs(kind, hidden, rank, groups) + biases.get(kind, hidden)


def compensation_macs(kind: str, hidden: int, rank: int) -> int:
    """MACs of one token's compensation; a constant vector costs no products."""
    return 2 * hidden * rank if kind == "low_rank" else 0


def branch_cost(
    shape: ModelShape, config: GateConfig, key: BranchKey, *, alike: bool = False
) -> BranchCost:
    """Cost of one branch of a gated model; a branch without a gate costs only what is computed.

    Args:
        alike: all channels of a gate have one logit, as after a closed-form fit, so that its value
            is one dot product whatever its kind.
    """
    attention = key[1] == "attention"
    gated = config.gates(key)
    computed = shape.macs_q_o + shape.macs_kv if attention else shape.macs_mlp_of(key[0])
    kind = config.kind_of(key[1])
    kind = "scalar" if alike and kind != "unit" else kind
    groups = config.groups or shape.heads
    gate = gate_macs(kind, shape.hidden, config.rank, groups) if gated else 0
    # The paper's importance needs the whole gate for every token; the mean logit one dot product,
    # or the first layer of a gate that is not linear.
    asked = {"mean_gate": gate, "random": 0, "rule": 0}.get(config.importance, shape.hidden)
    decision = asked if gated else 0
    if kind == "mlp" and config.importance == "mean_logit":
        decision = gate // 2 + max(config.rank, 2) if gated else 0
    if kind == "bottleneck" and config.importance == "mean_logit":
        decision = gate
    if config.decision == "layer" and not attention:
        decision = 0
    comp = compensation_macs(config.compensation, shape.hidden, config.compensation_rank)
    kv = shape.macs_skipped_kv if attention and config.kv_source == "project" else 0
    before = gate if kv and config.placement == "before" else 0  # keys and values are of g ⊙ u
    return BranchCost(
        gated=gated,
        computed=computed,
        per_key=shape.macs_per_key if attention else 0,
        kept_gate=gate,
        decision=decision,
        skipped=(kv + comp + before) if gated else 0,
        weights=computed,
        weights_kv=kv if gated else 0,
        gate_weights=gate + (shape.hidden if gated and kind != "unit" else 0),
        decision_weights=decision,
        skipped_weights=comp if gated else 0,
    )


def saved_macs(cost: BranchCost, keys: float) -> float:
    """Net MACs that one skip saves; the decision is paid either way."""
    return cost.computed + cost.per_key * keys + cost.kept_gate - cost.skipped


def net_share(
    costs: Mapping[BranchKey, BranchCost], shares: Mapping[BranchKey, float], keys: float
) -> float:
    """Share of dense decoder MACs spent, net, when gated branches keep ``shares`` of the tokens.

    Args:
        shares: of gated branches only; the others compute everything. keys: visible keys a token.
    """
    dense = spent = 0.0
    for key, cost in costs.items():
        whole = cost.computed + cost.per_key * keys
        keep = shares.get(key, 1.0)
        dense += whole
        spent += cost.decision + keep * (whole + cost.kept_gate) + (1.0 - keep) * cost.skipped
    return spent / dense


def break_even_skip_rate(shape: ModelShape, config: GateConfig, keys: float) -> float:
    """Skip rate (equal for all branches) from which on gates save more MACs than they cost."""
    kinds = ("attention", "mlp")
    costs = [branch_cost(shape, config, (i, kind)) for i in range(shape.layers) for kind in kinds]
    added = sum(c.kept_gate + c.decision for c in costs)
    saved = sum(saved_macs(c, keys) for c in costs if c.gated)
    return added / saved if saved > 0 else float("inf")
