"""docs/evidence.md: accuracy by set of questions and losses by text, where a bench has several."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from evidence_text import NONE, estimate_text, markdown, order, percent

from gateskip.evaluation.results import Run, Summary
from gateskip.evaluation.statistics import estimate

__all__ = ["section"]

#: Columns of losses and the fields that they are of.
LOSSES = {
    "loss on WikiText-2": "loss_wikitext2",
    "loss on answers, nothing skipped": "loss_full_budget",
}
ENDING = "_local"


def section(found: Sequence[Summary]) -> list[str]:
    """A table with a row for every method, variant and saving; nothing without sets."""
    names = sorted({name for s in found for run in s.runs for name in run.tasks})
    if not names:
        return []
    columns: dict[str, tuple[str, Callable[[Run], float | None]]] = {
        name.removesuffix(ENDING): ("accuracy", lambda run, name=name: run.tasks.get(name))  # type: ignore[misc]
        for name in names
    }
    for title, field in LOSSES.items():
        columns[title] = ("loss", lambda run, field=field: getattr(run, field))  # type: ignore[misc]
    rows = []
    for summary in sorted(found, key=lambda s: (order(s.method), s.variant, s.saved_macs)):
        if not any(run.tasks for run in summary.runs):
            continue
        label = f"`{summary.method}`" + (f" {summary.variant}" if summary.variant else "")
        row = [label, percent(summary.saved_macs)]
        for metric, value in columns.values():
            values = [v for v in map(value, summary.runs) if v is not None]
            row.append(estimate_text(metric, estimate(values)) if values else NONE)
        rows.append(row)
    return [
        "### By set of questions (accuracy, %) and by text (nats per token)", "",
        *markdown(["method", "saved", *columns], rows),
    ]  # fmt: skip
