"""The card of what a training made: what it is, how it was made, and what to do with it."""

from __future__ import annotations

import os
from pathlib import Path

from gateskip.config import GateConfig
from gateskip.training.config import GateSkipTrainingConfig

__all__ = ["write_card"]

MARK = "Trained with gateskip (arXiv 2510.13876)"
TEXT = """---
library_name: gateskip
base_model: {base}
---

# Gates for {base}

Trained with gateskip (arXiv 2510.13876): tokens skip attention and MLP branches that they need
less, under a budget chosen at run time, down to `compute={floor:.2f}`.

```python
import gateskip

model = gateskip.load("{folder}", base="{base}")
gateskip.set_budget(model, compute={budget:.2f})
```

| | |
|---|---|
| arm | {arm} |
| command | `{command}` |
| gates | {kind}, {gates} |
| compensation | {compensation} |
| backbone | {backbone} |
| budgets in training | {unit} {start:g} to {end:g}, {schedule} |
| steps, seed | {steps}, {seed} |
| last training loss | {loss:.3f} |
| duration | {minutes:.0f} minutes |
| gateskip | {version} |

Data, licences, held-out figures and limits are for whoever publishes this to add.
"""


def write_card(
    folder: Path,
    *,
    base: str,
    command: str,
    gate: GateConfig,
    options: GateSkipTrainingConfig,
    arm: str,
    steps: int,
    seed: int,
    loss: float,
    seconds: float,
    floor: float,
) -> None:
    """Write ``README.md`` into ``folder``, unless somebody wrote another."""
    from gateskip import __version__

    target = folder / "README.md"
    if target.exists() and MARK not in target.read_text(encoding="utf-8"):
        return
    backbone = {
        "frozen": "frozen",
        "lora": f"LoRA of rank {options.lora_rank}, merged when loaded",
        "full": "trained in full, saved beside",
    }[options.backbone]
    rank = f" of rank {gate.compensation_rank}" if gate.compensation == "low_rank" else ""
    text = TEXT.format(
        base=Path(base).name if Path(base).is_absolute() else base, budget=max(0.85, floor + 0.01),
        folder=folder.name, floor=floor, arm=arm, command=command,
        kind=gate.kind, gates="trained" if options.train_gates else "as fitted",
        compensation=f"{gate.compensation}{rank}"
        + (", trained" if options.train_compensation else ""),
        backbone=backbone, unit=options.budget_unit, start=options.budget_start,
        end=options.budget_end, schedule=options.schedule, steps=steps, seed=seed, loss=loss,
        minutes=seconds / 60, version=__version__,
    )  # fmt: skip
    temporary = folder / ".README.md.tmp"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, target)
