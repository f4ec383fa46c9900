"""Models of another size in docs/evidence.md: a bench of their own each, and a table of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from evidence_text import Cell, markdown, order, percent

from gateskip.evaluation.results import Summary
from gateskip.evaluation.runs import Run

__all__ = ["apart", "bench_of", "table"]


def bench_of(bench: str, size: str) -> str:
    """The name of the bench of models of a size."""
    return f"{bench}_{size}"


def apart(runs: Sequence[Run]) -> list[Run]:
    """All runs, those of another size as runs of that size's bench.

    A size is part of a run's variant in the files, so that no two of them are one run.
    """
    found = []
    for run in runs:
        size = str(run.config.get("size", ""))
        if size:
            variant = run.variant.removesuffix(size).removesuffix("_")
            run = dataclasses.replace(run, bench=bench_of(run.bench, size), variant=variant)
        found.append(run)
    return found


def table(found: Sequence[Summary], bench: str, cell: Cell) -> list[str]:
    """What was made with several sizes, side by side; nothing where there is one size only."""
    main = [s for s in found if not s.variant]
    sizes = sorted({s.bench for s in main if s.bench.startswith(bench_of(bench, ""))})
    at = {(s.bench, s.method, s.saved_macs): s for s in main}
    alike = {(s.method, s.saved_macs) for s in main if s.bench in sizes}
    rows = []
    for method, saved in sorted(alike, key=lambda key: (key[1], order(key[0]))):
        cells = [at.get((name, method, saved)) for name in (bench, *sizes)]
        rows.append([
            percent(saved), f"`{method}`", *("" if s is None else cell(s) for s in cells),
        ])  # fmt: skip
    if not rows:
        return []
    names = [name.removeprefix(bench_of(bench, "")) for name in sizes]
    columns = ["saved", "method", "as above", *names]
    return ["### Sizes of the model: accuracy, %", "", *markdown(columns, rows)]
