"""Sweeps: quality and speed over budgets, one measurement at a time, resumable; Pareto fronts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gateskip.config import Budget
from gateskip.data import text_windows
from gateskip.errors import BudgetError, OutputError
from gateskip.evaluation.bench import run_bench
from gateskip.evaluation.quality import Evaluation
from gateskip.skipping.latency import this_machine
from gateskip.skipping.state import state_of

__all__ = [
    "Journal",
    "SweepRow",
    "default_budgets",
    "file_hash",
    "fronts",
    "pareto_front",
    "sweep_gates",
]

DEFAULT = (0.95, 0.9, 0.85, 0.8, 0.75, 0.6, 0.5)
JOURNAL = "sweep.jsonl"
DENSE = "dense"


@dataclasses.dataclass(frozen=True, slots=True)
class SweepRow:
    """One budget of one gate set, or the dense model.

    Attributes:
        gates: name of the gate set; ``"dense"`` for the dense model of the first.
        budget: as text; empty for the dense model. keep, compute: shares realised.
        loss, perplexity, agreement: as in ``gateskip eval``. tokens: scored.
        prefill, decode: time as a share of the dense model's in the same run; None: not timed.
    """

    gates: str
    budget: str
    keep: float
    compute: float
    loss: float
    perplexity: float
    agreement: float
    tokens: int
    prefill: float | None = None
    decode: float | None = None


def default_budgets(floor: float) -> list[Budget]:
    """Shares of compute from 1 down to the floor of a calibration."""
    return [Budget(compute=1.0), *(Budget(compute=c) for c in DEFAULT if c >= floor)]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (cost, loss): whether no other is at least as good in both and better in one.

    Equal points are both on the front.
    """

    def beaten(a: tuple[float, float]) -> bool:
        return any(b[0] <= a[0] and b[1] <= a[1] and b != a for b in points)

    return [not beaten(point) for point in points]


def fronts(rows: Sequence[SweepRow]) -> dict[str, list[SweepRow]]:
    """Rows on the front of loss and each cost that was measured: compute, prefill, decode."""
    found = {}
    for cost in ("compute", "prefill", "decode"):
        values = [getattr(row, cost) for row in rows]
        if all(value is not None for value in values):
            points = [(float(value), row.loss) for value, row in zip(values, rows, strict=True)]
            on = pareto_front(points)
            found[cost] = [row for row, there in zip(rows, on, strict=True) if there]
    return found


def file_hash(*paths: Path) -> str:
    """Hash of files, or of all files of folders, by content."""
    found = hashlib.sha256()
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file():
                found.update(file.name.encode())
                found.update(file.read_bytes())
    return found.hexdigest()[:16]


class Journal:
    """What a sweep has measured: a line of JSON for each measurement, in its folder.

    The first line says what is measured; a folder of other settings is refused. A line that was
    torn by an interrupt is measured again.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        self.path = folder / JOURNAL
        self.settings = json.loads(json.dumps(settings))
        self.lines: list[dict[str, Any]] = []
        if self.path.is_file() and not overwrite:
            self._read()
        elif folder.is_dir() and any(folder.iterdir()) and not overwrite:
            raise OutputError(
                f"--out {str(folder)!r} is not empty and no sweep's; choose another or pass "
                "--overwrite."
            )
        folder.mkdir(parents=True, exist_ok=True)
        whole = [{"settings": self.settings}, *self.lines]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in whole))

    def _read(self) -> None:
        found = []
        for line in self.path.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break
        if not found:
            return
        before = found[0].get("settings", {})
        changed = sorted(
            key for key in {*before, *self.settings} if before.get(key) != self.settings.get(key)
        )
        if changed:
            raise OutputError(
                f"--out {str(self.path.parent)!r} has a sweep of other {', '.join(changed)}; "
                "choose another folder or pass --overwrite."
            )
        self.lines = found[1:]

    def get(self, kind: str, gates: str, budget: str, machine: str | None = None) -> Any:
        """What was measured, or None."""
        key = {"kind": kind, "gates": gates, "budget": budget, "machine": machine}
        return next(
            (line["value"] for line in self.lines if {k: line[k] for k in key} == key), None
        )

    def put(
        self, kind: str, gates: str, budget: str, value: Any, machine: str | None = None
    ) -> None:
        """Append a measurement."""
        line = {
            "kind": kind, "gates": gates, "budget": budget, "machine": machine, "value": value,
        }  # fmt: skip
        self.lines.append(line)
        with self.path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def sweep_gates(
    model: nn.Module,
    texts: Sequence[Any],
    tokenizer: Any,
    name: str,
    journal: Journal,
    *,
    budgets: Sequence[Budget] | None = None,
    reference: nn.Module | None = None,
    max_tokens: int | None = None,
    max_length: int = 512,
    speed: bool = True,
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    repeats: int = 3,
    say: Callable[[str], None] = lambda text: None,
    advance: Callable[[], None] = lambda: None,
) -> list[SweepRow]:
    """Rows of one gate set, the dense model first; what the journal has is not measured again.

    Args:
        model: a calibrated gated model. budgets: None takes eight shares of compute, as far down as
            the calibration reaches. reference: as in ``evaluate``. say: told what is left out or
            measured again. advance: called after every budget.
    """
    state = state_of(model)
    if state.policy is None:
        raise BudgetError(f"{name} has no thresholds; run gateskip calibrate first.")
    reached = []
    for wanted in budgets or default_budgets(state.policy.floor("compute")):
        try:
            state.resolve(wanted)
        except BudgetError as error:
            say(f"{name}: {error} Left out.")
        else:
            reached.append(wanted)
    ids = None
    if speed:
        ids = text_windows(texts, tokenizer, (1, prompt_tokens + new_tokens), repeats)
    run = Evaluation(
        model, texts, tokenizer, reference=reference, max_tokens=max_tokens, max_length=max_length
    )
    qualities = []
    for budget in (None, *reached):
        label = "" if budget is None else str(budget)
        quality = journal.get("quality", name, label)
        if quality is None:
            found = run.dense() if budget is None else run.at(budget)
            quality = dataclasses.asdict(found)
            journal.put("quality", name, label, quality)
        qualities.append((label, quality))
        advance()
    times: dict[str, Any] = {}
    if ids is not None:
        times = _times(model, ids, reached, name, journal, new_tokens, repeats)
        advance()
    return [_row(name, label, quality, times.get(label, {})) for label, quality in qualities]


def _row(name: str, label: str, quality: Mapping[str, Any], times: Mapping[str, float]) -> SweepRow:
    return SweepRow(
        gates=name if label else DENSE,
        budget=label,
        keep=1.0 - quality["skip_rate"],
        compute=1.0 - quality["macs_saved"],
        loss=quality["loss"],
        perplexity=quality["perplexity"],
        agreement=quality["agreement"],
        tokens=quality["tokens"],
        prefill=times.get("prefill"),
        decode=times.get("decode"),
    )


def _times(
    model: nn.Module,
    ids: Tensor,
    budgets: Sequence[Budget],
    name: str,
    journal: Journal,
    new_tokens: int,
    repeats: int,
) -> dict[str, dict[str, float]]:
    """By budget: prefill and decode time as shares of the dense model's, on this machine."""
    machine = f"{this_machine()}, {next(model.parameters()).dtype}"
    label = "; ".join(map(str, budgets))
    known: dict[str, dict[str, float]] | None = journal.get("speed", name, label, machine)
    if known is not None:
        return known
    result = run_bench(
        model, ids.to(next(model.parameters()).device), budgets=budgets, new_tokens=new_tokens,
        repeats=repeats, compiled=False, masked=False,
    )  # fmt: skip
    known = {"": {"prefill": 1.0, "decode": 1.0}}
    for budget in budgets:
        # Everything kept is timed once, whatever the unit it was asked in.
        unit, value = ("keep", 1.0) if budget.full else (budget.unit, budget.value)
        for row in result["rows"]:
            if row["arm"] == "gated_compacted" and row[unit] == value:
                times = known.setdefault(str(budget), {})
                times[row["phase"]] = 1.0 / row["speedup_vs_dense"]
    journal.put("speed", name, label, known, machine)
    return known
