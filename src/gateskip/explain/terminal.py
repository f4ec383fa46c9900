"""Usage as text: every token shaded by its share of branches, and a table by layer."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gateskip.explain.kinds import KindReport
from gateskip.explain.usage import Usage

__all__ = ["print_kinds", "print_usage"]

SHADES = "░▒▓█"
COLOURS = ("blue", "cyan", "yellow", "red")
BAR_WIDTH = 20


def print_usage(usage: Usage, tokens: Sequence[str], console: Console) -> None:
    """Print the text with one shade per token, then skip rates by layer and branch kind.

    Args:
        usage: what :func:`gateskip.explain.usage.branch_usage` returned.
        tokens: the text's pieces, one per token.

    Raises:
        ConfigError: another number of tokens.
    """
    usage.check_tokens(tokens)
    console.print(_shaded(usage, tokens))
    low, high = _range(usage)
    legend = f"\n{SHADES[0]} {low:.0%} of the branches used, {SHADES[-1]} {high:.0%}\n"
    console.print(Text(legend, style="dim"))
    console.print(_by_layer(usage))
    kinds = ", ".join(f"{kind} {rate:.1%}" for kind, rate in usage.skip_by_kind.items())
    console.print(
        f"skipped {usage.skip_rate:.1%} of token×branch pairs ({kinds}); "
        f"decoder MACs saved, net: {usage.macs_saved:.1%}",
        highlight=False,
    )


def print_kinds(report: KindReport, console: Console) -> None:
    """Print skip rates by kind of token, and what the permutation test says of them."""
    table = Table(title="Skipped by kind of token", title_justify="left")
    for name in ("kind", "tokens", "skipped", "beside the rest, same place", "p (Holm)"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for row in report.rows:
        gap = "" if row.difference is None else f"{100 * row.difference:+.1f} points"
        p = "" if row.p_holm is None else f"{row.p_holm:.4f}"
        table.add_row(row.kind, f"{row.tokens:,}", f"{row.skip_rate:.1%}", gap, p)
    console.print(table)
    console.print(
        f"{report.tokens:,} tokens of {report.texts} texts, {report.skip_rate:.1%} of pairs "
        f"skipped; kinds explain {report.explained:.0%} of how tokens at one place differ",
        highlight=False,
    )


def _range(usage: Usage) -> tuple[float, float]:
    """Smallest and largest share of branches; the first token, always computed, is left out."""
    shares = usage.used_share[1:].tolist() or usage.used_share.tolist()
    return min(shares), max(shares)


def _shaded(usage: Usage, tokens: Sequence[str]) -> Text:
    low, high = _range(usage)
    text = Text()
    for token, share in zip(tokens, usage.used_share.tolist(), strict=True):
        place = 1.0 if high == low else (share - low) / (high - low)
        level = min(max(round(place * (len(SHADES) - 1)), 0), len(SHADES) - 1)
        text.append(SHADES[level] + token, style=COLOURS[level])
    return text


def _by_layer(usage: Usage) -> Table:
    table = Table(title="Skipped by layer", title_justify="left")
    table.add_column("layer", justify="right")
    for kind in usage.kinds:
        table.add_column(kind, justify="right")
    table.add_column("")
    by_branch = usage.skip_by_branch
    for layer, rate in usage.skip_by_layer.items():
        cells = [
            f"{by_branch[layer, kind]:.1%}" if (layer, kind) in by_branch else ""
            for kind in usage.kinds
        ]
        table.add_row(str(layer), *cells, SHADES[-1] * round(rate * BAR_WIDTH))
    return table
