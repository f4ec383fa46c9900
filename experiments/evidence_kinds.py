"""Which tokens skip: the section of docs/evidence.md on kinds of token, from ``kinds_*.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evidence_text import NONE, markdown, p_text

__all__ = ["section"]

INTRODUCTION = (
    "Skip rates of token×branch pairs by kind of token, and beside them how far the kind is from "
    "all other tokens of its text at the same place, in points, with the p-value of a permutation "
    "test (texts of one length change their kinds, place by place; Holm's correction over kinds). "
    "In the last column tokens have the kinds of another text: what is found there is chance. What "
    "stands at one place in every text, such as a chat template, has nothing beside it there and "
    "so says nothing."
)


def section(results: Path) -> list[str]:
    """Lines of all files in a folder, none where there is no file."""
    lines: list[str] = []
    for path in sorted(results.glob("kinds_*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = found["rows"]
        header = found["header"]
        lines += [f"## Which tokens skip: {header['gates']}, {header['data']}", "", INTRODUCTION]
        lines += ["", *_told(rows)]
        by = {(row["method"], row["compute"]): row for row in rows}
        kinds = list(dict.fromkeys(one["kind"] for row in rows for one in row["rows"]))
        names = [f"{m}, {100 * (1 - c):.0f} % saved" for m, c in by]
        table = [[kind, *(_cell(row, kind) for row in by.values())] for kind in kinds]
        lines += markdown(["kind", *names], table)
        lines += _by_layer(rows, kinds)
    return lines


def _told(rows: list[dict[str, Any]]) -> list[str]:
    shares = ", ".join(
        f"{100 * row['explained']:.0f} % ({row['method']}, {100 * (1 - row['compute']):.0f} %)"
        for row in rows
    )
    first = rows[0]
    return [
        f"{first['tokens']:,} tokens of {first['texts']} texts. Kinds explain so much of how skip "
        f"rates of tokens differ within a text and at one place: {shares}.",
        "",
    ]


def _cell(row: dict[str, Any], kind: str) -> str:
    one = next((one for one in row["rows"] if one["kind"] == kind), None)
    if one is None:
        return NONE
    rate = f"{100 * one['skip_rate']:.1f} %"
    if one["difference"] is None:
        return rate
    return f"{rate}, {100 * one['difference']:+.1f} (p {p_text(one['p_holm'])})"


def _by_layer(rows: list[dict[str, Any]], kinds: list[str]) -> list[str]:
    """Rates by layer at the middle budget of gates."""
    gates = [row for row in rows if row["method"] == "gateskip"]
    row = gates[len(gates) // 2]
    by = {one["kind"]: one["by_layer"] for one in row["rows"]}
    shown = [kind for kind in kinds if kind in by and kind != "beginning"]
    layers = sorted(by[shown[0]], key=int)
    table = [[layer, *(f"{100 * by[kind][layer]:.0f}" for kind in shown)] for layer in layers]
    title = f"Skip rates by layer, %, gates at {100 * (1 - row['compute']):.0f} % saved"
    return [f"### {title}", "", *markdown(["layer", *shown], table)]
