"""The training curves of docs/evidence.md: loss by step, one panel for each saving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evidence_figures import fingerprint
from evidence_text import order, percent

from gateskip.evaluation.results import Summary
from gateskip.explain.plot import check_plotting, write_figure

__all__ = ["NAME", "Curves", "curves", "drawn"]

NAME = "evidence_curves_{}.svg"
#: By saving (in words) and method: (step, mean loss over seeds).
Curves = dict[str, dict[str, list[tuple[float, float]]]]


def curves(found: Sequence[Summary], bench: str) -> Curves:
    """Mean training loss by step, main forms only; of steps that every seed has logged."""
    out: Curves = {}
    for summary in sorted(found, key=lambda s: (s.saved_macs, order(s.method))):
        if summary.bench != bench or summary.variant:
            continue
        each = [dict(run.curve) for run in summary.runs if run.curve]
        steps = sorted(set.intersection(*map(set, each))) if each else []
        if steps:
            mean = [(s, round(sum(c[s] for c in each) / len(each), 6)) for s in steps]
            out.setdefault(percent(summary.saved_macs), {})[summary.method] = mean
    return out


def drawn(data: Curves, path: Path) -> None:
    """Write the figure."""
    figure = check_plotting()(figsize=(4.4 * len(data) + 1.6, 4.0), layout="constrained")
    figure.set_gid(fingerprint(data))
    panels = figure.subplots(1, len(data), squeeze=False, sharey=True)[0]
    from matplotlib import colormaps  # an extra, checked above

    colours = colormaps["tab20"]
    methods = sorted({method for own in data.values() for method in own}, key=order)
    for panel, (saved, own) in zip(panels, data.items(), strict=True):
        for number, method in enumerate(methods):
            if method in own:
                steps, losses = zip(*own[method], strict=True)
                colour = colours(number % colours.N)
                panel.plot(steps, losses, color=colour, linewidth=1.4, label=method)
        panel.set_yscale("log")
        panel.set_title(f"{saved} saved", fontsize=10)
        panel.set_xlabel("step")
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[0].set_ylabel("training loss, nats per token")
    handles = {h.get_label(): h for panel in panels for h in panel.get_legend_handles_labels()[0]}
    figure.legend(
        handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=9
    )
    write_figure(figure, path)
