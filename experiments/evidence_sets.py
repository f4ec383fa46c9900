"""docs/evidence.md: accuracy by set of questions and losses by text, where a bench has several."""

from __future__ import annotations

from collections.abc import Sequence

from evidence_text import NONE, estimate_text, markdown, order, percent

from gateskip.evaluation.results import Summary
from gateskip.evaluation.runs import Run
from gateskip.evaluation.statistics import estimate

__all__ = ["section"]

#: Columns beside the sets: (metric of its figures, field).
BESIDE = {
    "loss on answers, nothing skipped": ("loss", "loss_full_budget"),
    "loss on WikiText-2": ("loss", "loss_wikitext2"),
    "saved of WikiText-2, %": ("accuracy", "realised_macs_wikitext2"),
}
ENDING = "_local"


def _value(run: Run, column: str) -> float | None:
    if column not in BESIDE:
        return run.tasks.get(column)
    value: float | None = getattr(run, BESIDE[column][1])
    return value


def section(found: Sequence[Summary]) -> list[str]:
    """A table with a row for every method, variant and saving; nothing without sets."""
    names = sorted({name for s in found for run in s.runs for name in run.tasks})
    if not names:
        return []
    rows = []
    for summary in sorted(found, key=lambda s: (order(s.method), s.variant, s.saved_macs)):
        if not any(run.tasks for run in summary.runs):
            continue
        label = f"`{summary.method}`" + (f" {summary.variant}" if summary.variant else "")
        row = [label, percent(summary.saved_macs)]
        for column in (*names, *BESIDE):
            metric = BESIDE[column][0] if column in BESIDE else "accuracy"
            values = [v for run in summary.runs if (v := _value(run, column)) is not None]
            row.append(estimate_text(metric, estimate(values)) if values else NONE)
        rows.append(row)
    shown = [name.removesuffix(ENDING) for name in names]
    return [
        "### By set of questions (accuracy, %) and by text (nats per token)", "",
        *markdown(["method", "to save", *shown, *BESIDE], rows),
    ]  # fmt: skip
