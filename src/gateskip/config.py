"""What a user can choose: small frozen dataclasses, checked when built, with JSON round trips.

Knows nothing of torch or of models.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any, Final, Literal, Self

from gateskip.errors import BudgetError, ConfigError

__all__ = ["ALLOCATIONS", "BRANCH_KINDS", "SCHEMA_VERSION", "BranchKey", "Budget", "GateConfig"]

SCHEMA_VERSION: Final = 1
"""Version of everything written to JSON; a reader refuses a newer one."""

BRANCH_KINDS: Final = ("attention", "mlp")
ALLOCATIONS: Final = ("global", "uniform", "searched")
KV_SOURCES: Final = ("project", "previous", "none")
GATE_INPUTS: Final = ("normalised", "raw")
#: Gates that weigh a whole layer.
ROUTERS: Final = ("router", "bottleneck")
PLACEMENTS: Final = ("after", "before", "layer")
DECISIONS: Final = ("branch", "layer")
IMPORTANCES: Final = ("mean_logit", "mean_gate", "head", "random", "rule")
#: Scores that are one dot product with the branch's input.
LINEAR_IMPORTANCES: Final = ("mean_logit", "head")
COMPENSATIONS: Final = ("none", "mean", "low_rank")

BranchKey = tuple[int, str]
"""``(layer, kind)`` with kind ``"attention"`` or ``"mlp"``."""


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError with a suggestion unless ``value`` is one of ``allowed``."""
    if value in allowed:
        return
    close = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}.{hint}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """How a model's branches are gated.

    Attributes:
        kind: gate kind, a name in the gate registry (``"low_rank"``, ``"vector"``, ``"scalar"``,
            ``"grouped"``, ``"mlp"``, ``"shared"``; ``"unit"`` is no gate, ``"router"`` that of
            Mixture-of-Depths, ``"bottleneck"`` that of FlexiDepth).
        rank: inner width of ``low_rank`` and ``mlp`` gates.
        groups: values of a ``grouped`` gate; None takes as many as the model has attention heads.
        branches: which branch kinds get gates.
        layer_step: gates in every ``layer_step``-th layer only; 2 is every second one, from the
            second on.
        gate_input: ``"normalised"``: a gate reads what its branch reads; ``"raw"``: the residual.
        detach_input: whether the gate's input takes no gradient.
        placement: where the gate acts: ``"after"`` the branch, on what it adds to the residual, or
            ``"before"`` it, on its normalised input; ``"layer"``: a layer's attention gate acts on
            all that the layer adds, and its MLP has none (with ``decision="layer"``); what stands
            in for a layer that is skipped is weighed by 1 − g.
        decision: ``"branch"``: every branch decides for itself; ``"layer"``: a layer's MLP is
            skipped by the tokens that skip its attention.
        protected_first: so many tokens at the beginning of each sequence are never skipped.
        protected_ids: token ids that are never skipped.
        importance: what a token's score is made of: the gate's mean logit, the paper's mean
            gate value, a linear map of its own beside the gate (``"head"``), nothing at all
            (``"random"``, the null that a policy has to beat), or a method of
            ``gateskip.methods`` (``"rule"``).
        kv_source: where a skipped token's keys and values come from: ``"project"``: its own
            residual; ``"previous"``: the layer before (the paper's); ``"none"``: nowhere, and no
            later token sees it in that layer (Mixture-of-Depths).
        compensation: what a skipped branch adds instead of its output.
        compensation_rank: rank of ``low_rank`` compensation.
        init_bias: initial gate bias b; σ(5) = 0.9933, so a gated model starts as the dense one.
        init_std: standard deviation of the initial gate weights.
        seed: seed of the initial gate weights.
    """

    kind: str = "low_rank"
    rank: int = 16
    groups: int | None = None
    branches: tuple[str, ...] = BRANCH_KINDS
    layer_step: int = 1
    gate_input: Literal["normalised", "raw"] = "normalised"
    detach_input: bool = True
    placement: Literal["after", "before", "layer"] = "after"
    decision: Literal["branch", "layer"] = "branch"
    protected_first: int = 1
    protected_ids: tuple[int, ...] = ()
    importance: Literal["mean_logit", "mean_gate", "head", "random", "rule"] = "mean_logit"
    kv_source: Literal["project", "previous", "none"] = "project"
    compensation: Literal["none", "mean", "low_rank"] = "low_rank"
    compensation_rank: int = 32
    init_bias: float = 5.0
    init_std: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("importance", self.importance, IMPORTANCES)
        one_of("kv_source", self.kv_source, KV_SOURCES)
        one_of("compensation", self.compensation, COMPENSATIONS)
        one_of("gate_input", self.gate_input, GATE_INPUTS)
        one_of("placement", self.placement, PLACEMENTS)
        one_of("decision", self.decision, DECISIONS)
        for name in ("rank", "compensation_rank", "groups", "layer_step", "protected_first"):
            value = getattr(self, name)
            if name == "groups" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r} must be an integer of at least 1.")
        object.__setattr__(self, "protected_ids", tuple(self.protected_ids))
        for token in self.protected_ids:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise ConfigError(f"protected_ids: {token!r} is no token id.")
        if not self.branches:
            raise ConfigError("branches=() gates nothing; name 'attention', 'mlp' or both.")
        for kind in self.branches:
            one_of("branches", kind, BRANCH_KINDS)
        object.__setattr__(self, "branches", tuple(k for k in BRANCH_KINDS if k in self.branches))
        if self.decision == "layer" and self.branches != BRANCH_KINDS:
            raise ConfigError(
                f"decision='layer' decides MLPs by their attention; branches={self.branches!r} "
                "must be both."
            )
        whole = (self.placement, self.decision) == ("layer", "layer")
        router = self.kind in ROUTERS
        if (router or self.placement == "layer") and not (whole and router):
            raise ConfigError(
                f"kind={self.kind!r}, placement={self.placement!r}: a router weighs whole layers, "
                f"and nothing else does; set kind= to one of {', '.join(map(repr, ROUTERS))}, "
                "placement='layer' and decision='layer'."
            )
        if self.kind == "router" and self.compensation != "none":
            raise ConfigError(
                f"compensation={self.compensation!r}: who skips a layer with kind='router' stays "
                "as it is; set compensation='none'."
            )
        if not (math.isfinite(self.init_std) and self.init_std >= 0):
            raise ConfigError(f"init_std={self.init_std!r} must be a finite number of at least 0.")
        if not math.isfinite(self.init_bias):
            raise ConfigError(f"init_bias={self.init_bias!r} must be finite.")

    def kind_of(self, branch: str) -> str:
        """The gate kind of attentions or of MLPs."""
        return "unit" if self.placement == "layer" and branch == "mlp" else self.kind

    def gates(self, key: BranchKey) -> bool:
        """Whether a branch has a gate."""
        return key[1] in self.branches and (key[0] + 1) % self.layer_step == 0

    @property
    def fusible(self) -> bool:
        """Whether every branch is what the kernels compute: h + g(u) ⊙ f(u) with its own decision,
        u the normalised residual."""
        return (
            self.branches == BRANCH_KINDS
            and self.layer_step == 1
            and self.gate_input == "normalised"
            and self.placement == "after"
            and self.decision == "branch"
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary of all fields."""
        lists = {"branches": list(self.branches), "protected_ids": list(self.protected_ids)}
        return dataclasses.asdict(self) | lists

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Rebuild from :meth:`to_json`; ConfigError names an unknown key."""
        known = tuple(field.name for field in dataclasses.fields(cls))
        for key in data:
            one_of("GateConfig key", key, known)
        return cls(**(data | {"branches": tuple(data.get("branches", BRANCH_KINDS))}))


BUDGET_UNITS = ("keep", "compute", "latency")


@dataclasses.dataclass(frozen=True, slots=True)
class Budget:
    """How much may be spent: exactly one of ``keep``, ``compute`` and ``latency``; 1.0 skips
    nothing.

    Attributes:
        keep: share of token×branch pairs computed, in (0, 1].
        compute: share of the dense decoder's MACs spent, net of gates, in (0, 1].
        latency: share of the dense model's time on this machine, in (0, 1], by what
            ``gateskip.measure_latency`` found.
        workload: (prompt tokens, new tokens) of the requests that ``compute`` or ``latency`` is
            about: ``(512, 0)`` is prefill alone, ``(0, 128)`` decoding alone. None: the calibration
            text's lengths, and for latency the lengths that were measured.
    """

    keep: float | None = None
    compute: float | None = None
    latency: float | None = None
    workload: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        given = [name for name in BUDGET_UNITS if getattr(self, name) is not None]
        if len(given) != 1:
            told = ", ".join(f"{name}={getattr(self, name)!r}" for name in given or BUDGET_UNITS)
            raise BudgetError(f"{told}: give exactly one of {', '.join(BUDGET_UNITS)}.")
        (name,) = given
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0.0 < value <= 1.0:
            raise BudgetError(f"{name}={value!r} must be a number in (0, 1]; 1.0 skips nothing.")
        object.__setattr__(self, name, float(value))
        if self.workload is not None:
            object.__setattr__(self, "workload", _workload(self.workload, name))

    @property
    def unit(self) -> str:
        """Which of the three was given."""
        return next(name for name in BUDGET_UNITS if getattr(self, name) is not None)

    @property
    def value(self) -> float:
        """The number that was given."""
        found: float = getattr(self, self.unit)
        return found

    @property
    def full(self) -> bool:
        """True when nothing may be skipped."""
        return self.value == 1.0

    def to_json(self) -> dict[str, Any]:
        """``{"keep": k}``, ``{"compute": c, "workload": [512, 128]}`` and the like."""
        workload = {} if self.workload is None else {"workload": list(self.workload)}
        return {self.unit: self.value} | workload

    @classmethod
    def by(cls, unit: str, value: float) -> Budget:
        """A budget in a unit given by name."""
        given: dict[str, Any] = {unit: value}
        return cls(**given)

    @classmethod
    def of(cls, value: Any) -> Budget | RowBudgets | None:
        """Accept a budget, ``{"keep": k}``, ``{"compute": c}``, ``{"latency": t}`` or None.

        A list, a tuple or a 1-D tensor in the place of the number is one budget for each row.
        """
        if value is None or isinstance(value, Budget | RowBudgets):
            return value
        if not isinstance(value, dict) or set(value) - {*BUDGET_UNITS, "workload"}:
            raise BudgetError(f"budget={value!r} must look like {{'keep': 0.75}} or a Budget.")
        given = {name: numbers for name, numbers in value.items() if numbers is not None}
        workload = {"workload": given.pop("workload")} if "workload" in given else {}
        if len(given) == 1:
            ((name, numbers),) = given.items()
            if hasattr(numbers, "tolist"):  # a tensor or an array
                numbers = numbers.tolist()
            if isinstance(numbers, list | tuple):
                return RowBudgets(tuple(cls(**{name: number}, **workload) for number in numbers))
            return cls(**{name: numbers}, **workload)
        return cls(**value)

    def __str__(self) -> str:
        workload = "" if self.workload is None else " of {} + {} tokens".format(*self.workload)
        return f"{self.unit}={self.value:g}{workload}"


def _workload(given: Any, unit: str) -> tuple[int, int]:
    if unit == "keep":
        raise BudgetError(f"workload={given!r} says nothing of keep=; leave it out.")
    whole = isinstance(given, list | tuple) and all(type(n) is int and n >= 0 for n in given)
    if not whole or len(given) != 2 or not any(given):
        raise BudgetError(
            f"workload={given!r} must be two numbers of tokens, (prompt, new), such as (512, 128)."
        )
    return given[0], given[1]


@dataclasses.dataclass(frozen=True, slots=True)
class RowBudgets:
    """A budget for every row of a batch, in order; all of one unit.

    ``generate`` keeps them with their rows when it expands them for beams and return sequences.
    """

    rows: tuple[Budget, ...]

    def __post_init__(self) -> None:
        if not self.rows:
            raise BudgetError("budget has no rows; give one number for every row of the batch.")

    @property
    def full(self) -> bool:
        """True when nothing may be skipped in any row."""
        return all(row.full for row in self.rows)

    def __str__(self) -> str:
        return ", ".join(map(str, self.rows))
