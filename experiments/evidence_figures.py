"""The figures of docs/evidence.md: accuracy and loss against net MACs saved, one file per bench."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evidence_text import order

from gateskip.evaluation.results import Summary
from gateskip.evaluation.runs import CONTROL, DENSE, METRICS
from gateskip.explain.pareto import STYLES
from gateskip.explain.plot import check_plotting, write_figure

__all__ = ["NAME", "drawn", "fingerprint", "points"]

NAME = "evidence_{}.svg"
LABELS = {"accuracy": "accuracy, %", "loss": "loss, nats per token"}
#: (saved %, mean, low, high) of one saving.
Point = tuple[float, float, float, float]


def points(found: Sequence[Summary], bench: str) -> dict[str, dict[str, list[Point]]]:
    """By metric and method, by saving; ablations are left out. Without interval, low = high.

    Rounded, since the last digits of sines differ between machines.
    """
    figures: dict[str, dict[str, list[Point]]] = {}
    for summary in found:
        if summary.bench != bench or summary.variant:
            continue
        realised = summary.mean_of("realised_macs")
        saved = summary.saved_macs if realised is None else realised
        for metric in METRICS:
            over = summary.of(metric)
            if over is None:
                continue
            scale = 100.0 if metric == "accuracy" else 1.0
            low, high = over.mean, over.mean
            if over.interval is not None:
                low, high = over.interval.low, over.interval.high
            mean, low, high = (round(scale * value, 6) for value in (over.mean, low, high))
            point = (round(100 * saved, 6), mean, low, high)
            figures.setdefault(metric, {}).setdefault(summary.method, []).append(point)
    return figures


def fingerprint(figures: Any) -> str:
    """Of what is drawn; it stands in the file, so that an old one is known whatever drew it."""
    return "data-" + hashlib.sha256(repr(figures).encode()).hexdigest()[:16]


def drawn(figures: dict[str, dict[str, list[Point]]], path: Path) -> None:
    """Write the figure of a bench: a panel for each metric that it has."""
    panels = [metric for metric in METRICS if metric in figures]
    figure = check_plotting()(figsize=(4.8 * len(panels) + 1.6, 4.4), layout="constrained")
    figure.set_gid(fingerprint(figures))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    methods = sorted({method for metric in panels for method in figures[metric]}, key=order)
    curves = [m for m in methods if m not in (CONTROL, DENSE)]
    for panel, metric in zip(axes, panels, strict=True):
        _panel(panel, figures[metric], curves, LABELS[metric])
    handles = {h.get_label(): h for panel in axes for h in panel.get_legend_handles_labels()[0]}
    figure.legend(
        handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=9
    )
    write_figure(figure, path)


def _panel(panel: Any, data: dict[str, list[Point]], curves: list[str], label: str) -> None:
    for name, style in ((DENSE, ":"), (CONTROL, "--")):
        for _, mean, low, high in data.get(name, ())[:1]:
            panel.axhline(
                mean, color="#888888", linestyle=style, linewidth=1.0, label=name, zorder=0
            )
            panel.axhspan(low, high, color="#888888", alpha=0.12, linewidth=0, zorder=0)
    for number, name in enumerate(curves):
        colour, marker, line = STYLES[number % len(STYLES)]
        own = sorted(data.get(name, ()))
        if not own:
            continue
        panel.plot(
            [point[0] for point in own], [point[1] for point in own], color=colour, marker=marker,
            linestyle=line, linewidth=1.2, markersize=5, label=name,
            markerfacecolor=colour if number < len(STYLES) else "white",
        )  # fmt: skip
        for saved, mean, low, high in own:
            if low < high:  # one seed has no interval, which is not one of no width
                bars = [[mean - low], [high - mean]]
                panel.errorbar(
                    [saved], [mean], yerr=bars, fmt="none", ecolor=colour, elinewidth=1.2, capsize=3
                )
    panel.set_xlabel("decoder MACs saved, % (net)")
    panel.set_ylabel(label)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.grid(axis="y", color="#eeeeee", linewidth=0.6)
    panel.set_axisbelow(True)
