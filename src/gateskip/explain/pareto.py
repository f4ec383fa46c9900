"""A sweep as a picture: loss against compute, and against measured time; PNG and SVG.

Readable in grey: gate sets differ by marker and line style, not by colour alone. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateskip.explain.plot import check_plotting, write_figure

if TYPE_CHECKING:
    from gateskip.evaluation.sweep import SweepRow

__all__ = ["plot_sweep"]

STYLES = (
    ("#1f4e79", "o", "-"), ("#b3541e", "s", "--"), ("#5b8c5a", "^", "-."), ("#7a4b94", "D", ":"),
    ("#444444", "v", (0, (5, 1))), ("#a08a20", "P", (0, (1, 1))),
)  # fmt: skip
AXES = (
    ("compute", "decoder MACs spent, % of dense (net)"),
    ("prefill", "prefill time, % of dense"),
    ("decode", "decode time, % of dense"),
)


def plot_sweep(
    rows: Sequence[SweepRow], front: Mapping[str, Sequence[SweepRow]], folder: str | Path
) -> list[Path]:
    """Write ``sweep.png`` and ``sweep.svg``: a panel for every cost that was measured.

    Args:
        rows: the dense one first. front: by cost the rows that nothing beats; their markers are
            filled.

    Raises:
        ConfigError: matplotlib is missing. OutputError: a file cannot be written.
    """
    figure_class = check_plotting()
    panels = [(name, label) for name, label in AXES if getattr(rows[-1], name) is not None]
    figure = figure_class(figsize=(4.6 * len(panels) + 0.8, 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(row.gates for row in rows if row.budget))
    dense = next((row for row in rows if not row.budget), None)
    for panel, (cost, label) in zip(axes, panels, strict=True):
        _panel(panel, rows, front.get(cost, ()), names, dense, cost, label)
    axes[0].set_ylabel("loss, nats per token")
    if len(names) > 1:
        axes[0].legend(frameon=False, fontsize=9)
    found = []
    for suffix in ("png", "svg"):
        path = Path(folder) / f"sweep.{suffix}"
        write_figure(figure, path)
        found.append(path)
    return found


def _panel(
    panel: Any,
    rows: Sequence[SweepRow],
    front: Sequence[SweepRow],
    names: Sequence[str],
    dense: SweepRow | None,
    cost: str,
    label: str,
) -> None:
    if dense is not None:
        panel.axhline(dense.loss, color="#999999", linewidth=0.8, zorder=0)
        panel.annotate(
            "dense", (0.0, dense.loss), xycoords=("axes fraction", "data"), xytext=(4, 3),
            textcoords="offset points", ha="left", fontsize=8, color="#666666",
        )  # fmt: skip
    for number, name in enumerate(names):
        colour, marker, line = STYLES[number % len(STYLES)]
        own = [(row, row in front) for row in rows if row.gates == name and row.budget]
        points = [(100 * getattr(row, cost), row.loss) for row, _ in own]
        panel.plot(*zip(*points, strict=True), color=colour, linestyle=line, linewidth=1.2)
        for (row, on), (x, y) in zip(own, points, strict=True):
            panel.plot(
                x, y, marker=marker, color=colour, markersize=6, linestyle="none",
                markerfacecolor=colour if on else "white",
                label=name if row is own[0][0] else None,
            )  # fmt: skip
            if cost == "compute":
                above = number % 2 == 0  # labels of two sets would cover each other
                panel.annotate(
                    row.budget.partition("=")[2], (x, y), xytext=(6, 4) if above else (-6, -10),
                    textcoords="offset points", ha="left" if above else "right", fontsize=7,
                    color=colour,
                )  # fmt: skip
    panel.set_xlabel(label)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.grid(axis="y", color="#eeeeee", linewidth=0.6)
    panel.set_axisbelow(True)
