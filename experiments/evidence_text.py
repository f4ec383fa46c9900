"""Figures and tables of docs/evidence.md as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from gateskip.evaluation.results import Summary
from gateskip.evaluation.runs import CONTROL, DENSE, GATES
from gateskip.evaluation.statistics import Estimate, Interval, PairedDifference

__all__ = [
    "NONE",
    "Cell",
    "by_saving",
    "estimate_text",
    "gain_text",
    "interval_text",
    "markdown",
    "order",
    "p_text",
    "percent",
    "shown",
]

FIRST = (DENSE, CONTROL, GATES)
NONE = "–"
Cell = Callable[[Summary], str]


def percent(value: float) -> str:
    """A share, for the eye: 15 %, 12.5 %."""
    return f"{100 * value:.1f}".removesuffix(".0") + " %"


def shown(metric: str, value: float, sign: str = "") -> str:
    """Accuracies in percent, losses in nats; small ones with more digits."""
    if metric == "accuracy":
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign}.3f}" if abs(value) >= 0.1 else f"{value:{sign}.5f}"


def interval_text(metric: str, interval: Interval | None, sign: str = "") -> str:
    """``[low, high]``, or a dash."""
    if interval is None:
        return NONE
    low, high = (shown(metric, end, sign) for end in (interval.low, interval.high))
    return f"[{low}, {high}]"


def estimate_text(metric: str, over: Estimate | None) -> str:
    """Mean, interval and seeds."""
    if over is None:
        return NONE
    return f"{shown(metric, over.mean)} {interval_text(metric, over.interval)} ({over.n})"


def gain_text(metric: str, gain: PairedDifference | None) -> str:
    """Paired difference, interval and pairs."""
    if gain is None:
        return NONE
    spread = interval_text(metric, gain.interval, "+")
    return f"{shown(metric, gain.mean, '+')} {spread} ({gain.n})"


def p_text(p: float | None) -> str:
    """A p-value."""
    return NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table and an empty one."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def order(method: str) -> tuple[int, str]:
    """Full compute first, then gates, then the others by name."""
    return (FIRST.index(method) if method in FIRST else len(FIRST), method)


def by_saving(found: Sequence[Summary], cell: Cell) -> list[str]:
    """A table of methods by savings; nothing where every cell is empty."""
    savings = sorted({s.saved_macs for s in found})
    at = {(s.method, s.saved_macs): cell(s) for s in found}
    methods = sorted({s.method for s in found if at[s.method, s.saved_macs] != NONE}, key=order)
    if not methods:
        return []
    rows = [[f"`{m}`", *(at.get((m, saving), "") for saving in savings)] for m in methods]
    return markdown(["method", *map(percent, savings)], rows)
