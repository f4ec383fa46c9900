"""``control_risk``: the cheapest budget that keeps a bound on quality with a stated confidence.

Learn-then-Test (Angelopoulos et al., arXiv 2110.01052): every budget is a hypothesis "the risk is
above its limit", tested on texts that are independent draws of what the model will be used for.
Budgets are tested from the dearest down and the first that is not rejected ends it, so the chance
of choosing any budget above the limit is at most 1 − confidence, without a correction for their
number (fixed-sequence testing).

Shapes: N texts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress
from torch import nn

from gateskip.calibration.answers import LAST_NUMBER, answers_right, questions
from gateskip.calibration.p_values import betting_p_value, smallest_sample
from gateskip.calibration.per_text import per_text
from gateskip.config import Budget
from gateskip.data import encode
from gateskip.errors import BudgetError, ConfigError, DataError
from gateskip.skipping.state import GateSkipState, state_of

__all__ = ["RiskReport", "RiskRow", "control_risk", "fixed_sequence"]

Floats = NDArray[np.float64]
#: An increase of a text's mean loss beyond so many nats per token counts as so many.
CAP = 0.5
MOST_BUDGETS = 12


@dataclasses.dataclass(frozen=True, slots=True)
class RiskRow:
    """One tested budget.

    Attributes:
        budget: as text. compute: share of MACs that it spends by the calibration. risk: measured.
        p_value: of "the risk is above the limit". accepted: whether that was rejected.
    """

    budget: str
    compute: float | None
    risk: float
    p_value: float
    accepted: bool


@dataclasses.dataclass(frozen=True, slots=True)
class RiskReport:
    """What was chosen.

    Attributes:
        budget: the cheapest accepted one; everything kept where none was.
        criterion: ``"loss_increase"``, ``"disagreement"`` or ``"accuracy_drop"``. limit: of the
            risk: a share of the dense loss, of tokens, or of answers. confidence: of the bound.
        texts: number of texts. rows: tested budgets, in order.
    """

    budget: Budget
    criterion: str
    limit: float
    confidence: float
    texts: int
    rows: tuple[RiskRow, ...]

    @property
    def met(self) -> bool:
        """Whether any budget below 1 meets the bound."""
        return not self.budget.full


def control_risk(
    model: nn.Module,
    data: Any,
    tokenizer: Any = None,
    *,
    max_loss_increase: float | None = None,
    min_agreement: float | None = None,
    max_accuracy_drop: float | None = None,
    confidence: float = 0.95,
    budgets: Sequence[Budget] | None = None,
    reference: nn.Module | None = None,
    max_length: int = 512,
    max_new_tokens: int = 256,
    answer: str = LAST_NUMBER,
    progress: bool = False,
) -> RiskReport:
    """Find the cheapest budget whose loss of quality is below a bound, and make it the default.

    With probability at least ``confidence`` over the texts, the mean risk of the chosen budget on
    texts of the same kind is at most the limit. The texts must be independent of each other and of
    those that thresholds were calibrated on.

    Args:
        model: a calibrated gated model. data: texts (see ``gateskip.data``), one draw each.
        max_loss_increase: bound on the mean loss of a text as a share of the dense model's: 0.02
            allows 2 % more. An increase of more than 0.5 nats per token in one text counts as 0.5.
        min_agreement: bound on the mean share of tokens whose likeliest token is the dense one's.
        max_accuracy_drop: bound on the share of answers that the dense model gets right and the
            gated one does not, less the converse; needs rows with prompt and completion.
        confidence: in (0, 1). budgets: tested in this order; None takes up to 12 grid points of the
            calibration, dearest first.
        reference: the dense model, where training changed ``model``'s backbone.
        max_new_tokens, answer: of generated answers; the last match of the expression counts.

    Raises:
        ConfigError: not exactly one bound, one out of range, or no ``reference``.
        BudgetError: not calibrated. DataError: too few texts, which says how many are needed.
    """
    state = state_of(model)
    name, limit = _criterion(max_loss_increase, min_agreement, max_accuracy_drop)
    if not 0.0 < confidence < 1.0:
        raise ConfigError(f"confidence={confidence!r} must be in (0, 1), such as 0.95.")
    if reference is None and (state.tuned or state.backbone_trained):
        raise ConfigError(
            "training changed this model's backbone, so it is not the dense model any more; pass "
            "that one as reference=."
        )
    tested = _budgets(state, budgets)
    alpha = 1.0 - confidence
    plain = model if reference is None else reference
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("Controlling risk", total=None)

        def advance() -> None:
            bar.advance(task)

        draws: Callable[[Budget], tuple[Floats, float]]
        if name == "accuracy_drop":
            asked = questions(list(data), tokenizer, answer)
            upper = 1.0 - limit
            _enough(len(asked), limit, upper, alpha)

            def right(runner: nn.Module, budget: Budget | None) -> Floats:
                return answers_right(
                    runner, asked, tokenizer, answer, budget, max_new_tokens=max_new_tokens,
                    advance=advance,
                )  # fmt: skip

            expected = right(plain, None)

            def draws(budget: Budget) -> tuple[Floats, float]:
                drop = expected - right(model, budget)
                return drop - limit, float(drop.mean())

            count = len(asked)
        else:
            samples = [s for s in encode(data, tokenizer, max_length) if bool(s.scored[1:].any())]
            count = len(samples)
            upper = CAP if name == "loss_increase" else 1.0 - limit
            if name == "disagreement":
                _enough(count, limit, upper, alpha)
            whole = per_text(plain, samples, None, advance=advance)
            if name == "loss_increase":
                _enough(count, limit * float(whole.loss.mean()), upper, alpha)

            def draws(budget: Budget) -> tuple[Floats, float]:
                found = per_text(model, samples, budget, advance=advance)
                if name == "loss_increase":
                    more = np.minimum(found.loss - whole.loss, CAP)
                    return more - limit * whole.loss, float(more.mean() / whole.loss.mean())
                differ = 1.0 - found.agreement(whole)
                return differ - limit, float(differ.mean())

        rows, chosen = fixed_sequence(tested, draws, upper, alpha, state)
    state.default_budget = chosen
    return RiskReport(chosen, name, limit, confidence, count, tuple(rows))


def fixed_sequence(
    budgets: Sequence[Budget],
    draws: Callable[[Budget], tuple[Floats, float]],
    upper: float,
    alpha: float,
    state: GateSkipState | None = None,
) -> tuple[list[RiskRow], Budget]:
    """(tested rows, last accepted budget); everything kept where the first is not accepted.

    Args:
        draws: (X ``[N]`` with E[X] ≥ 0 where the risk is above its limit, measured risk).
    """
    rows, chosen = [], Budget(compute=1.0)
    for budget in budgets:
        x_N, risk = draws(budget)
        p = betting_p_value(x_N, upper)
        accepted = p <= alpha
        rows.append(RiskRow(str(budget), _compute(state, budget), risk, p, accepted))
        if not accepted:
            break
        chosen = budget
    return rows, chosen


def _compute(state: GateSkipState | None, budget: Budget) -> float | None:
    """Share of MACs that a budget spends by the table; None where the table does not say."""
    policy = None if state is None else state.policy
    if policy is None or budget.unit == "latency":
        return None
    if budget.unit == "compute":
        return budget.value
    return policy.compute_at(budget.value)


def _criterion(
    loss: float | None, agreement: float | None, drop: float | None
) -> tuple[str, float]:
    given = {
        "max_loss_increase": loss, "min_agreement": agreement, "max_accuracy_drop": drop,
    }  # fmt: skip
    asked = {name: value for name, value in given.items() if value is not None}
    if len(asked) != 1:
        raise ConfigError(f"give exactly one of {', '.join(given)}; {len(asked)} were given.")
    ((name, value),) = asked.items()
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0.0 < value < 1.0:
        raise ConfigError(f"{name}={value!r} must be in (0, 1), such as 0.02.")
    if name == "min_agreement":
        return "disagreement", 1.0 - float(value)
    return name.removeprefix("max_"), float(value)


def _budgets(state: GateSkipState, budgets: Sequence[Budget] | None) -> list[Budget]:
    if state.policy is None:
        raise BudgetError("risk needs thresholds: call gateskip.calibrate(model, data) first.")
    if budgets is not None:
        chosen = [budget for budget in budgets if not budget.full]
    else:
        grid = [c for c in state.policy.compute if c < 1.0]
        step = max(1, -(-len(grid) // MOST_BUDGETS))
        chosen = [Budget(compute=c) for c in grid[step - 1 :: step]]
    if not chosen:
        raise BudgetError("budgets: none below 1 to test.")
    for budget in chosen:
        state.resolve(budget)
    return chosen


def _enough(texts: int, limit: float, upper: float, alpha: float) -> None:
    needed = smallest_sample(limit, upper, alpha)
    if texts < needed:
        raise DataError(
            f"data has {texts} texts; at this limit and confidence nothing can be accepted with "
            f"fewer than {needed}, and usually several times as many are needed. Give more texts, "
            "a looser limit or a lower confidence."
        )
