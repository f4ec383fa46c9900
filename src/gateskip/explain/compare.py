"""A comparison of methods as a picture: loss against net MACs saved. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateskip.explain.pareto import STYLES
from gateskip.explain.plot import check_plotting, write_figure

if TYPE_CHECKING:
    from gateskip.evaluation.compare import CompareGroup

__all__ = ["plot_comparison"]

#: From this ratio of the highest to the lowest loss on, the axis is logarithmic.
WIDE = 3.0


def plot_comparison(groups: Sequence[CompareGroup], path: str | Path) -> None:
    """Write a PNG or SVG; intervals over seeds are bars, readable in grey.

    Args:
        groups: the dense model first, then methods. path: ends in .png or .svg.

    Raises:
        ConfigError: matplotlib is missing. OutputError: the file cannot be written.
    """
    figure = check_plotting()(figsize=(6.4, 4.6), layout="constrained")
    axes: Any = figure.subplots()
    dense, *others = groups
    axes.axhline(dense.loss.mean, color="#999999", linewidth=0.8, zorder=0, label="dense")
    for number, name in enumerate(dict.fromkeys(group.method for group in others)):
        colour, marker, line = STYLES[number % len(STYLES)]
        own = sorted((g for g in others if g.method == name), key=lambda g: g.macs_saved)
        axes.plot(
            [100 * g.macs_saved for g in own], [g.loss.mean for g in own], color=colour,
            marker=marker, linestyle=line, linewidth=1.2, markersize=5, label=name,
            markerfacecolor=colour if number < len(STYLES) else "white",
        )  # fmt: skip
        for group in own:
            if (interval := group.loss.interval) is not None:
                axes.errorbar(
                    [100 * group.macs_saved], [group.loss.mean], fmt="none", ecolor=colour,
                    yerr=interval.high - group.loss.mean, elinewidth=1.2, capsize=3,
                )  # fmt: skip
    losses = [group.loss.mean for group in groups]
    if max(losses) > WIDE * min(losses):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("decoder MACs saved, % (net)")
    axes.set_ylabel("loss, nats per token")
    axes.legend(frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color="#eeeeee", linewidth=0.6)
    axes.set_axisbelow(True)
    write_figure(figure, Path(path))
