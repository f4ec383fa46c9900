"""The card beside gates: what they are, how they were made, and what to do with them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from gateskip.config import GateConfig
from gateskip.errors import CheckpointError
from gateskip.retrofit.checkpoint import read_checkpoint
from gateskip.skipping.policy import ThresholdTable

__all__ = ["MARK", "card_of", "gate_rows", "write_card"]

MARK = "by gateskip (arXiv 2510.13876)"
TEXT = """---
library_name: gateskip
base_model: {base}
pipeline_tag: text-generation
tags:
- gateskip
- conditional-computation
---

# Gates for {base}

Made {mark}: tokens skip attention and MLP branches that they need less, under a budget that is
chosen at run time{reach}.

```python
import gateskip

model = gateskip.load("{folder}", base="{base}")
{use}```

| | |
|---|---|
{rows}

{policy}Licences, held-out figures and limits are for whoever publishes this to add.
"""


def gate_rows(gate: GateConfig) -> dict[str, str]:
    """What a config says about gates, for the card's table."""
    rank = f" of rank {gate.rank}" if gate.kind in ("low_rank", "mlp") else ""
    thin = f" of rank {gate.compensation_rank}" if gate.compensation == "low_rank" else ""
    return {
        "gates": f"{gate.kind}{rank} on {' and '.join(gate.branches)}, ranked by {gate.importance}",
        "keys and values of skipped tokens": gate.kv_source,
        "compensation": f"{gate.compensation}{thin}",
    }


def write_card(
    folder: Path, *, base: str, rows: Mapping[str, str], table: ThresholdTable | None
) -> None:
    """Write ``README.md`` into ``folder``, unless somebody wrote another.

    Args:
        base: name or folder of the base model; of a folder the last part is shown.
        rows: how it was made. table: its thresholds, whose budgets are listed.
    """
    from gateskip import __version__

    target = folder / "README.md"
    if target.exists() and MARK not in target.read_text(encoding="utf-8"):
        return
    use, reach, policy = "", "", ""
    if table is not None:
        floor = table.floor("compute")
        reach = f", down to `compute={floor:.2f}`"
        use = f"gateskip.set_budget(model, compute={max(0.85, min(floor + 0.01, 1.0)):.2f})\n"
        points = zip(table.compute, table.keep, strict=True)
        lines = "".join(f"| {c:.3f} | {k:.3f} |\n" for c, k in points)
        policy = (
            f"Thresholds ({table.allocation}, found on {table.tokens:,} tokens) at these shares of "
            "decoder MACs and of token×branch pairs, and between them:\n\n| compute | keep |\n"
            f"|---|---|\n{lines}\n"
        )
    shown = {**rows, "gateskip": __version__}
    text = TEXT.format(
        base=Path(base).name if Path(base).is_absolute() else base, mark=MARK, reach=reach,
        folder=folder.name, use=use, policy=policy,
        rows="\n".join(f"| {name} | {value} |" for name, value in shown.items()),
    )  # fmt: skip
    temporary = folder / ".README.md.tmp"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, target)


def card_of(folder: Path) -> None:
    """A card of what a checkpoint folder itself says. Raises CheckpointError."""
    config, _ = read_checkpoint(folder)
    try:
        gate, policy = GateConfig.from_json(config["gate"]), config.get("policy")
        base = str(config["base"].get("name_or_path") or "the base model")
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} lacks {error}; save again.") from error
    table = None if policy is None else ThresholdTable.from_json(policy)
    write_card(folder, base=base, rows=gate_rows(gate), table=table)
