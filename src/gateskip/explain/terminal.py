"""Usage as text: every token shaded by its share of branches, and a table by layer."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gateskip.explain.usage import Usage

__all__ = ["print_usage"]

SHADES = " ░▒▓█"
COLOURS = ("grey35", "blue", "cyan", "yellow", "red")
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
    low, high = SHADES[1], SHADES[-1]
    console.print(
        Text(f"\n{low} few of the branches used   {high} all of them used\n", style="dim")
    )
    console.print(_by_layer(usage))
    kinds = ", ".join(f"{kind} {rate:.1%}" for kind, rate in usage.skip_by_kind.items())
    console.print(
        f"skipped {usage.skip_rate:.1%} of token×branch pairs ({kinds}); "
        f"decoder MACs saved, net: {usage.macs_saved:.1%}",
        highlight=False,
    )


def _shaded(usage: Usage, tokens: Sequence[str]) -> Text:
    text = Text()
    for token, share in zip(tokens, usage.used_share.tolist(), strict=True):
        level = min(int(share * len(SHADES)), len(SHADES) - 1)
        text.append(SHADES[level], style=COLOURS[level])
        text.append(token, style=COLOURS[level])
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
