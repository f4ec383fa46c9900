"""docs/evidence.md: gates beside what a user would do instead, at equal measured time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from evidence_text import NONE, estimate_text, markdown, percent, shown

from gateskip.evaluation.results import Summary
from gateskip.evaluation.runs import GATES, INSTEAD, METRICS

__all__ = ["at_speed", "section"]

#: Plain models that are faster: 8 bits, smaller, or with layers or branches removed.
ALTERNATIVES = (*INSTEAD, "shortgpt", "llm_drop", "gate_norm")
#: What is timed of an alternative, and the speed of gates that it is held against.
TIMES = (
    ("prefill", "prefill_speedup", "prefill_speedup"),
    ("decode", "decode_speedup", "decode_speedup"),
    ("decode, on our kernels", "kernel_decode_speedup", "decode_speedup"),
)
HEAD = (
    "8-bit weights (torchao) of the control, a smaller model tuned alike, and what static methods "
    "leave, against gates at the saving at which they are as fast (interpolated between savings). "
    "Speeds are over the dense model of Hugging Face on the same tokens. Plain models decode as "
    "Hugging Face does, and beside that on our kernels, which need no skipping."
)


def at_speed(points: Sequence[tuple[float, float, float]], speed: float) -> tuple[str, float]:
    """How gates are as fast as ``speed``: (in words, their figure there).

    Args:
        points: (saving, speed, figure) of gates. Without one that is as fast, the figure is of the
            fastest.
    """
    found = sorted(points)
    if found[0][1] >= speed:
        saving, own, figure = found[0]
        return f"faster at {percent(saving)} saved, {own:.2f}×", figure
    for (saving, slow, first), (more, fast, second) in itertools.pairwise(found):
        if slow < speed <= fast:
            part = (speed - slow) / (fast - slow)
            return (
                f"as fast at {percent(round(saving + part * (more - saving), 3))} saved",
                first + part * (second - first),
            )
    saving, own, figure = max(found, key=lambda point: point[1])
    return f"never as fast: {own:.2f}× at {percent(saving)} saved", figure


def section(found: Sequence[Summary]) -> list[str]:
    """A table of the alternatives that were timed; nothing where gates were not."""
    rows = []
    for metric in METRICS:
        gates = [s for s in found if s.method == GATES and not s.variant and s.of(metric)]
        for one in found:
            theirs = one.of(metric)
            if one.method not in ALTERNATIVES or one.variant or theirs is None:
                continue
            for phase, field, field_of_gates in TIMES:
                speed = one.mean_of(field)
                points = [
                    (s.saved_macs, own, over.mean)
                    for s in gates
                    if (own := s.mean_of(field_of_gates)) is not None
                    and (over := s.of(metric)) is not None
                ]
                if speed is None or not points:
                    continue
                how, figure = at_speed(points, speed)
                saved = one.realised_macs
                rows.append([
                    metric, f"`{one.method}`", NONE if saved is None else percent(saved), phase,
                    f"{speed:.2f}×", estimate_text(metric, theirs), shown(metric, figure), how,
                ])  # fmt: skip
    if not rows:
        return []
    columns = (
        "figure", "instead", "MACs saved", "phase", "speed", "its figure", "gates", "gates are",
    )  # fmt: skip
    return [
        "### What a user would do instead, at equal measured time", "", HEAD, "",
        *markdown(columns, rows),
    ]  # fmt: skip
