"""Gates: small float32 modules that say how much a branch matters to a token.

Each kind is one file. Knows nothing of models, budgets or decisions.
"""

from gateskip.gates.base import Gate, no_autocast, version
from gateskip.registry import Registry

__all__ = ["GATES", "Gate", "no_autocast", "version"]

GATES: Registry[type[Gate]] = Registry("gate kind", "gateskip.gates")
_BUILT_IN = {
    "bottleneck": "BottleneckGate",
    "grouped": "GroupedGate",
    "low_rank": "LowRankGate",
    "mlp": "MlpGate",
    "router": "RouterGate",
    "scalar": "ScalarGate",
    "shared": "SharedGate",
    "unit": "UnitGate",
    "vector": "VectorGate",
}
for _kind, _attribute in _BUILT_IN.items():
    GATES.register(_kind, f"gateskip.gates.{_kind}:{_attribute}")
