"""Join results of ``gateskip eval --json`` over seeds, and print means with 95 % intervals.

    python benchmarks/quality.py RESULT.json... --json FILE

Intervals are Student's t over seeds. Each loss is also divided by the control's mean loss on the
same data, the figure that decides: what skipping costs a model that was trained alike.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

#: Two-sided 95 % quantiles of Student's t for 1 to 9 degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: list[float]) -> float:
    """Half width of the 95 % interval of the mean; infinite for one value."""
    n = len(values)
    if n < 2:
        return math.inf
    return STUDENT[min(n - 2, len(STUDENT) - 1)] * statistics.stdev(values) / math.sqrt(n)


def joined(files: list[dict[str, Any]]) -> dict[str, Any]:
    """One object of all files: the dense rows once per data, all others."""
    rows: list[dict[str, Any]] = []
    for file in files:
        for row in file["rows"]:
            if row["arm"] != "dense" or not any(
                r["arm"] == "dense" and r["data"] == row["data"] for r in rows
            ):
                rows.append(row)
    commands = sorted({file["header"]["command"] for file in files})
    header = files[0]["header"] | {"command": "python benchmarks/quality.py", "of": commands}
    return {"header": header, "rows": rows}


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a table: data, arm, budget, MACs saved, loss with interval, ratio to the control."""
    groups: dict[tuple[str, str, float | None], list[dict[str, Any]]] = {}
    for row in rows:
        budget = row["compute"] if row["compute"] is not None else row["keep"]
        groups.setdefault((row["data"], row["arm"], budget), []).append(row)
    lines = [
        "| data | arm | compute | MACs saved | loss | of control |",
        "|---|---|---|---|---|---|",
    ]
    for (data, arm, budget), found in sorted(
        groups.items(), key=lambda g: (g[0][:2], -(g[0][2] or 9))
    ):
        control = [r["loss"] for r in rows if (r["data"], r["arm"]) == (data, "control")]
        losses = [r["loss"] for r in found]
        mean, half = statistics.mean(losses), interval(losses)
        spread = f" ± {half:.3f}" if math.isfinite(half) else ""
        ratio = f"{mean / statistics.mean(control):.3f}" if control else ""
        saved = statistics.mean(r["macs_saved"] for r in found)
        shown = "" if budget is None else f"{budget:g}"
        lines.append(f"| {data} | {arm} | {shown} | {saved:.1%} | {mean:.3f}{spread} | {ratio} |")
    return lines


def main() -> None:
    """Join, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = joined([json.loads(path.read_text(encoding="utf-8")) for path in args.results])
    print("\n".join(summary(result["rows"])))
    if args.json:
        temporary = args.json.with_name(f".{args.json.name}.tmp")
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, args.json)


if __name__ == "__main__":
    main()
