"""What docs/evidence.md comes to: gates beside the best of the others, and the aims."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

from evidence_text import estimate_text, interval_text, markdown, percent, shown

from gateskip.evaluation.results import Comparison, Summary, comparisons
from gateskip.evaluation.runs import CONTROL, DENSE, GATES, METRICS

__all__ = ["section"]

#: Share of the control's accuracy that gates are to keep, by bench and saving.
AIMS = {("lab", 0.25): 0.97, ("lab", 0.5): 0.90}
#: In the order of their columns.
VERDICTS = ("better", "overlap", "worse", "unknown")
COLUMNS = (
    "bench", "saved", "figure", "gates", "control", "best of the others",
    "better than", "level with", "worse than", "one seed",
)  # fmt: skip


def section(found: Sequence[Summary], titles: Mapping[str, str]) -> list[str]:
    """The table and the aims; nothing without comparisons."""
    rows = []
    for bench in titles:
        for metric in METRICS:
            own = comparisons(found, bench, metric)
            for saved in sorted({one.gates.saved_macs for one in own}):
                at = [one for one in own if one.gates.saved_macs == saved]
                rows += _row(bench, metric, at)
    if not rows:
        return []
    lines = [
        "## In short", "",
        "Gates beside methods that skip. The last columns count them: better or worse with "
        "intervals apart, level where intervals overlap. The tables of each bench name them.", "",
    ]  # fmt: skip
    return [*lines, *markdown(COLUMNS, rows), *_aims(found)]


def _row(bench: str, metric: str, at: Sequence[Comparison]) -> list[list[str]]:
    """Gates at a saving; nothing where no method that skips is beside them."""
    others = [one for one in at if one.other.method not in (CONTROL, DENSE)]
    control = [one.other for one in at if one.other.method == CONTROL]
    if not others:
        return []
    best = (max if metric == METRICS[0] else min)(others, key=lambda one: _mean(one, metric))
    count = collections.Counter(one.verdict for one in others)
    return [[
        f"`{bench}`", percent(at[0].gates.saved_macs), metric,
        estimate_text(metric, at[0].gates.of(metric)),
        estimate_text(metric, control[0].of(metric) if control else None),
        f"`{best.other.method}` {estimate_text(metric, best.other.of(metric))}",
        *(str(count[verdict]) for verdict in VERDICTS),
    ]]  # fmt: skip


def _mean(one: Comparison, metric: str) -> float:
    over = one.other.of(metric)
    assert over is not None
    return over.mean


def _aims(found: Sequence[Summary]) -> list[str]:
    """Whether gates keep what they were to keep, by mean and by interval."""
    lines = []
    for (bench, saved), aim in AIMS.items():
        for summary in found:
            own = (summary.bench, summary.method, summary.variant, summary.saved_macs)
            kept = summary.accuracy_kept
            if own != (bench, GATES, "", saved) or kept is None:
                continue
            sure = kept.interval is not None and kept.interval.low >= aim
            how = "reached" if sure else "reached on average" if kept.mean >= aim else "missed"
            lines.append(
                f"- Aim in `{bench}`: {percent(aim)} of the control's accuracy where "
                f"{percent(saved)} is saved. {shown('accuracy', kept.mean)} % "
                f"{interval_text('accuracy', kept.interval)} is kept: {how}."
            )
    return [*lines, ""] if lines else []
