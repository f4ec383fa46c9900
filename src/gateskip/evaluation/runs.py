"""Result files of experiments, read strictly.

A run is one JSON object in ``<results>/<bench>/``:

``bench``, ``method`` (a name such as ``gateskip``, ``control``, ``shortgpt``), ``seed``,
``saved_macs`` (share of decoder MACs that was to be saved), ``accuracy`` and ``loss`` (or null),
``seconds`` of training (or null), ``config`` (with ``variant`` where it is an ablation) and
``versions``; optionally ``realised_macs``, ``skip_rate``, ``questions``, ``prefill_speedup``,
``decode_speedup``, ``kernel_decode_speedup`` (of a plain model on our kernels), ``peak_memory_mb``,
``dense_accuracy``, ``accuracy_full_budget`` (of what was trained for the saving, with nothing
skipped), ``loss_full_budget`` (likewise), ``loss_wikitext2`` and
``realised_macs_wikitext2``, ``tasks`` (accuracy by name, of which
``accuracy`` is the mean), ``collapsed`` and ``curve``, a list of ``[step, loss]``. Other keys are
left alone.

A file with ``"trained": false`` and ``rows`` of ``gateskip eval`` holds one method at several
savings without training: its rows are runs of the bench ``<bench>_untrained``, the dense row once
for all files, which have to agree on it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gateskip.errors import DataError

__all__ = ["BENCHES", "CONTROL", "DENSE", "GATES", "INSTEAD", "METRICS", "Run", "read_runs"]

BENCHES: Final = ("lab", "smollm2")
UNTRAINED: Final = "_untrained"
GATES: Final = "gateskip"
#: Methods that compute everything; their saving is 0.
CONTROL, DENSE = "control", "dense"
#: What a user would do instead of skipping: 8-bit weights, a smaller model. They compute all of
#: what they are, and are held against gates at equal time, not at equal savings.
INSTEAD: Final = ("int8", "smaller")
#: The first is better the higher, the second the lower.
METRICS: Final = ("accuracy", "loss")
MOST = 1e-9  # rounding of what should be equal


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One run.

    Attributes:
        bench, method, seed: as in the file. variant: of an ablation, else empty.
        saved_macs: share of decoder MACs that was to be saved; realised_macs: that was, net.
        accuracy, loss: of the test, or None. seconds: of training, or None.
        collapsed: whether training is known to have failed. file: where it stands.
        Others: as in the module's head, None where a file has none.
    """

    bench: str
    method: str
    variant: str
    seed: int
    saved_macs: float
    accuracy: float | None
    loss: float | None
    seconds: float | None
    config: Mapping[str, Any]
    versions: Mapping[str, Any]
    file: str
    realised_macs: float | None = None
    skip_rate: float | None = None
    questions: int | None = None
    prefill_speedup: float | None = None
    decode_speedup: float | None = None
    kernel_decode_speedup: float | None = None
    peak_memory_mb: float | None = None
    dense_accuracy: float | None = None
    accuracy_full_budget: float | None = None
    loss_full_budget: float | None = None
    loss_wikitext2: float | None = None
    realised_macs_wikitext2: float | None = None
    collapsed: bool = False
    curve: tuple[tuple[float, float], ...] = ()
    tasks: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, float]:
        """What its seeds have in common."""
        return (self.bench, self.method, self.variant, self.saved_macs)


def read_runs(root: str | Path) -> list[Run]:
    """All runs in ``root/<bench>/*.json``, by file name; none where there is no such folder.

    Raises:
        DataError: a damaged file (its name and the field), two files of one run, or files of
            methods without training that disagree on the dense model.
    """
    runs: list[Run] = []
    dense: dict[tuple[str, str, float], Run] = {}
    for path in sorted(Path(root).glob("*/*.json")):
        for run in _read(path):
            if run.bench.endswith(UNTRAINED) and run.method == DENSE:
                key = (run.bench, run.method, run.saved_macs)
                first = dense.setdefault(key, run)
                if abs((first.loss or 0.0) - (run.loss or 0.0)) > MOST:
                    raise DataError(
                        f"{path}: rows: the dense model's loss is {run.loss}, but {first.loss} in "
                        f"{first.file}; both need the same model and text."
                    )
                if first is not run:
                    continue
            runs.append(run)
    known: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        other = known.setdefault((*run.key, run.seed), run)
        if other is not run:
            raise DataError(
                f"{run.file} and {other.file} are one run: {run.method!r} "
                f"{run.variant or 'without variant'}, seed {run.seed}, saved_macs "
                f"{run.saved_macs:g}; remove one, or name config.variant."
            )
    return runs


def _read(path: Path) -> list[Run]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: no readable JSON ({error}).") from error
    if not isinstance(data, dict):
        raise DataError(f"{path}: has to be one JSON object, not a {type(data).__name__}.")
    fields = _Fields(path, data)
    bench = fields.text("bench")
    if bench not in BENCHES:
        raise fields.wrong("bench", f"one of {', '.join(map(repr, BENCHES))}")
    if bench != path.parent.name:
        raise fields.wrong("bench", f"{path.parent.name!r}, as the file's folder")
    if data.get("trained") is False and "rows" in data:
        return _untrained(fields, bench)
    return [_run(fields, bench)]


def _run(fields: _Fields, bench: str) -> Run:
    curve = fields.data.get("curve") or []
    pairs = isinstance(curve, list) and all(
        isinstance(p, list) and len(p) == 2 and all(_is_number(x) for x in p) for p in curve
    )
    if not pairs:
        raise fields.wrong("curve", "a list of [step, loss]")
    config = fields.mapping("config")
    variant = config.get("variant") or ""
    if not isinstance(variant, str):
        raise DataError(f"{fields.path}: config.variant={variant!r} must be a text.")
    collapsed = fields.data.get("collapsed", False)
    if not isinstance(collapsed, bool):
        raise fields.wrong("collapsed", "true or false")
    questions = fields.data.get("questions")
    tasks = fields.data.get("tasks") or {}
    if not isinstance(tasks, dict) or not all(_is_share(v) for v in tasks.values()):
        raise fields.wrong("tasks", "accuracies by name")
    return Run(
        bench=bench, method=fields.text("method"), variant=variant,
        seed=fields.whole("seed", 0), saved_macs=round(fields.number("saved_macs", 0.0, 1.0), 6),
        accuracy=fields.optional("accuracy", 0.0, 1.0, needed=True),
        loss=fields.optional("loss", 0.0, needed=True),
        seconds=fields.optional("seconds", 0.0, needed=True), config=config,
        versions=fields.mapping("versions"), file=fields.path.name,
        realised_macs=fields.optional("realised_macs", -math.inf, 1.0),
        skip_rate=fields.optional("skip_rate", 0.0, 1.0),
        questions=None if questions is None else fields.whole("questions", 1),
        prefill_speedup=fields.optional("prefill_speedup", 0.0),
        decode_speedup=fields.optional("decode_speedup", 0.0),
        kernel_decode_speedup=fields.optional("kernel_decode_speedup", 0.0),
        peak_memory_mb=fields.optional("peak_memory_mb", 0.0),
        dense_accuracy=fields.optional("dense_accuracy", 0.0, 1.0),
        accuracy_full_budget=fields.optional("accuracy_full_budget", 0.0, 1.0),
        loss_full_budget=fields.optional("loss_full_budget", 0.0),
        loss_wikitext2=fields.optional("loss_wikitext2", 0.0),
        realised_macs_wikitext2=fields.optional("realised_macs_wikitext2", -math.inf, 1.0),
        tasks=tasks, collapsed=collapsed,
        curve=tuple((float(step), float(loss)) for step, loss in curve),
    )  # fmt: skip


def _untrained(fields: _Fields, bench: str) -> list[Run]:
    method, seed = fields.text("method"), fields.whole("seed", 0)
    config, versions = fields.mapping("config"), fields.mapping("versions")
    rows = fields.data["rows"]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise fields.wrong("rows", "a list of objects")
    found = []
    for index, row in enumerate(rows):
        own = _Fields(fields.path, row, f"rows[{index}].")
        is_dense = own.text("arm") == DENSE
        saved = 0.0 if is_dense else 1.0 - own.number("compute", 0.0, 1.0)
        run = Run(
            bench=bench + UNTRAINED, method=DENSE if is_dense else method, variant="",
            seed=seed, saved_macs=round(saved, 6), accuracy=None, loss=own.number("loss", 0.0),
            seconds=None, config=config, versions=versions, file=fields.path.name,
            realised_macs=own.number("macs_saved", -math.inf, 1.0),
            skip_rate=own.number("skip_rate", 0.0, 1.0),
        )  # fmt: skip
        found.append(run)
    return found


class _Fields:
    """Typed access to an object; every complaint names file and field."""

    def __init__(self, path: Path, data: Mapping[str, Any], prefix: str = "") -> None:
        self.path, self.data, self.prefix = path, data, prefix

    def wrong(self, name: str, wanted: str) -> DataError:
        given = repr(self.data[name]) if name in self.data else "missing"
        return DataError(f"{self.path}: {self.prefix}{name} is {given}; it must be {wanted}.")

    def text(self, name: str) -> str:
        value = self.data.get(name)
        if not isinstance(value, str) or not value:
            raise self.wrong(name, "a text")
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self.data.get(name)
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return value

    def whole(self, name: str, least: int) -> int:
        value = self.data.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.wrong(name, f"a whole number of at least {least}")
        return value

    def number(self, name: str, least: float, most: float = math.inf) -> float:
        value: Any = self.data.get(name)
        if not _is_number(value) or not least <= value <= most:
            bounds = f" from {least:g}" if math.isfinite(least) else ""
            bounds += f" to {most:g}" if math.isfinite(most) else ""
            raise self.wrong(name, f"a finite number{bounds}")
        return float(value)

    def optional(
        self, name: str, least: float, most: float = math.inf, *, needed: bool = False
    ) -> float | None:
        """The number, or None for null; a missing one is wrong where the field is ``needed``."""
        if needed and name not in self.data:
            raise self.wrong(name, "a number or null")
        return None if self.data.get(name) is None else self.number(name, least, most)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0.0 <= value <= 1.0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
