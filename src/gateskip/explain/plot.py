"""Usage as a picture: tokens by layers, attention and MLP apart, and skip rates by layer.

Needs matplotlib (``pip install gateskip[explain]``), which is imported when a plot is drawn. Uses
figure objects only, so neither a display nor pyplot's global state is touched.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gateskip.errors import ConfigError, OutputError
from gateskip.explain.usage import Usage

__all__ = ["check_plotting", "plot_usage", "write_figure"]

TOKENS_PER_STRIP = 120
LABEL_LENGTH = 14
COMPUTED, SKIPPED = "#1f4e79", "#e8e8e8"
INCHES_PER_TOKEN, INCHES_PER_LAYER = 0.15, 0.11


def plot_usage(usage: Usage, tokens: Sequence[str], path: str | Path) -> None:
    """Write a PNG: who was computed where, wrapped after 120 tokens, then skip rates by layer.

    Args:
        usage: what :func:`gateskip.explain.usage.branch_usage` returned.
        tokens: the text's pieces, one per token. path: file to write; an old one is replaced.

    Raises:
        ConfigError: matplotlib is missing, or another number of tokens.
        OutputError: the file cannot be written; nothing is left behind then.
    """
    usage.check_tokens(tokens)
    figure = _draw(usage, _labels(tokens))
    write_figure(figure, Path(path))


def check_plotting() -> Any:
    """Matplotlib's figure class. Raises ConfigError, with the remedy, where it is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "plots need matplotlib, which is not installed; run: pip install gateskip[explain]"
        ) from error
    return Figure


def _labels(tokens: Sequence[str]) -> list[str]:
    """Short, printable labels with only those characters that the font can draw."""
    check_plotting()
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    # The font must be looked up once and used below, else a warning per missing character.
    known = set(FT2Font(font_manager.findfont("DejaVu Sans")).get_charmap())
    labels = []
    for token in tokens:
        shown = token.replace("\n", "↵").replace("\t", "→").replace(" ", "·")
        shown = "".join(c if c.isprintable() and ord(c) in known else "□" for c in shown)
        labels.append(shown if len(shown) <= LABEL_LENGTH else shown[: LABEL_LENGTH - 1] + "…")
    return labels


def _draw(usage: Usage, labels: Sequence[str]) -> Any:
    figure_class = check_plotting()
    total = len(labels)
    width = min(total, TOKENS_PER_STRIP)
    starts = range(0, total, TOKENS_PER_STRIP)
    layers, kinds = len(usage.layers), usage.kinds
    panel = max(1.0, layers * INCHES_PER_LAYER)
    rows = len(starts) * len(kinds) + 1
    height = (len(starts) * len(kinds) * panel) + len(starts) * 1.4 + 2.8
    figure = figure_class(
        figsize=(max(7.0, width * INCHES_PER_TOKEN + 1.5), height), layout="constrained"
    )
    grid = figure.add_gridspec(rows, 1, height_ratios=[panel] * (rows - 1) + [1.6])
    figure.suptitle(
        f"{usage.skip_rate:.1%} of token×branch pairs skipped, "
        f"{usage.macs_saved:.1%} of decoder MACs saved (net); dark: computed, light: skipped"
    )
    for strip, start in enumerate(starts):
        for row, kind in enumerate(kinds):
            axes = figure.add_subplot(grid[strip * len(kinds) + row])
            last = row == len(kinds) - 1
            _panel(axes, usage, kind, labels, start, width, last)
    _bars(figure.add_subplot(grid[rows - 1]), usage)
    return figure


def _panel(
    axes: Any, usage: Usage, kind: str, labels: Sequence[str], start: int, width: int, last: bool
) -> None:
    """One branch kind of one strip; every strip is ``width`` tokens wide, so cells are alike."""
    from matplotlib.colors import ListedColormap

    shown = usage.of_kind(kind)[:, start : start + width]
    axes.imshow(
        shown.int().numpy(), aspect="auto", interpolation="nearest", origin="lower",
        cmap=ListedColormap([SKIPPED, COMPUTED]), vmin=0, vmax=1,
    )  # fmt: skip
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylabel(f"{'MLP' if kind == 'mlp' else kind}\nlayer")
    numbers = [layer for layer, found in usage.branches if found == kind]
    step = max(1, len(numbers) // 8)
    axes.set_yticks(range(0, len(numbers), step), [str(n) for n in numbers[::step]], fontsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if not last:
        axes.set_xticks([])
        return
    axes.set_xticks(
        range(shown.shape[1]), labels[start : start + width], rotation=90, fontsize=7,
        family="DejaVu Sans",
    )  # fmt: skip
    for label in axes.get_xticklabels():
        label.set_parse_math(False)


def _bars(axes: Any, usage: Usage) -> None:
    by_branch, kinds = usage.skip_by_branch, usage.kinds
    thickness = 0.8 / len(kinds)
    for number, (kind, colour) in enumerate(zip(kinds, ("#d98c2b", "#5b8c5a"), strict=False)):
        layers = [layer for layer, found in usage.branches if found == kind]
        axes.bar(
            [layer + (number - (len(kinds) - 1) / 2) * thickness for layer in layers],
            [100 * by_branch[layer, kind] for layer in layers],
            width=thickness, color=colour, label="MLP" if kind == "mlp" else kind,
        )  # fmt: skip
    axes.set_xlabel("layer")
    axes.set_ylabel("skipped, %")
    axes.set_ylim(0, 100)
    axes.margins(x=0.01)
    axes.legend(fontsize=8, loc="upper left", ncols=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def write_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG or, where the name ends so, SVG with text as text; whole or not at all.

    Raises:
        OutputError: the file cannot be written; an old one stays as it was.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    # Opened plainly, so that the file gets the usual permissions, not mkstemp's private ones.
    temporary = path.with_name(f".{path.name}-{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            if path.suffix == ".svg":
                with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gateskip"}):
                    FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})
            else:
                FigureCanvasAgg(figure).print_png(stream, metadata={"Software": "gateskip"})
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OutputError(f"path={str(path)!r} could not be written: {error}.") from error
