"""Figures that were published about GateSkip, for ``evidence.py`` to set ours beside.

Of "What Layers When" (arXiv 2510.13876) and, where said, of its authors' public repository.
Accuracies are percent; a rate is the share of token×branch pairs skipped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from evidence_text import NONE, estimate_text, markdown, percent

from gateskip.evaluation.results import Summary
from gateskip.evaluation.runs import GATES

__all__ = ["section"]

RATES = (0.0, 0.15, 0.25)
#: The bench whose accuracies stand beside the published ones.
BENCH = "lab"


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """Accuracy over generative tasks. at: by rate; method: our name, or the published one."""

    method: str
    model: str
    at: dict[float, float]
    note: str = ""


#: Llama-3.2-1B as it comes, neither gated nor tuned.
UNGATED_1B = 30.97
ACCURACIES = (
    Row("gateskip", "Llama-3.2-1B", {0.0: 26.8, 0.15: 23.2, 0.25: 19.8}),
    Row(
        "gateskip", "Llama-3.2-1B", {0.0: 23.53, 0.15: 22.14, 0.25: 17.67},
        "another table of the same paper",
    ),
    Row("gateskip", "Llama-3.2-3B", {0.0: 45.0, 0.15: 43.3, 0.25: 42.1}),
    Row("gateskip", "Llama-3.1-8B", {0.0: 57.3, 0.15: 55.0, 0.25: 53.6}),
    Row("gateskip", "Gemma-2-2B", {0.0: 38.0, 0.15: 36.1, 0.25: 34.8}),
    Row("random", "Llama-3.2-1B", {0.15: 1.67}),
    Row("mixture_of_depths", "Llama-3.2-1B", {0.0: 20.83, 0.15: 3.96}),
    Row("calm", "Llama-3.2-1B", {0.15: 3.43}, "the same at every rate"),
    Row("free", "Llama-3.2-1B", {0.15: 11.57}, "the same at every rate"),
    Row("layerskip", "Llama-3.2-1B", {0.15: 10.65}, "the same at every rate"),
)  # fmt: skip
#: (what was changed, our name of such a variant, accuracy at 15 %), Llama-3.2-1B. Our main form has
#: scalar gates, theirs vector gates.
ABLATIONS = (
    ("vector gate", "vector", 23.2), ("scalar gate", "", 20.4),
    ("gates shared by all layers", "shared", 20.7), ("two-layer gate", "mlp", 18.5),
    ("gate before the branch", "before", 1.0), ("frozen backbone", "frozen", 12.7),
    ("attention only", "attention_only", 14.9), ("MLP only", "mlp_only", 7.8),
)  # fmt: skip
#: Throughput over the dense model by rate, as in the paper; its repository disowns the measurement.
THROUGHPUT = {0.5: 1.164, 0.7: 1.35}
#: Prefill of the repository's compacted path over the *gated* model: 1B, 8 × 512, one A40, fp32.
PREFILL = {0.15: 1.07, 0.25: 1.17, 0.35: 1.25, 0.5: 1.42, 0.7: 1.73}

DIFFERENCES = (
    "Published rates count token×branch pairs that were skipped. Ours count multiply-accumulates "
    "of the decoder that were saved, less what gates, decisions, compensation and the keys and "
    "values of skipped tokens cost. A column stands for the same number, not for the same saving: "
    "the published gates add 14 % to a layer of the 1B model, about what skipping 15 % takes away.",
    "Published models have one to eight billion parameters and were tested on the usual "
    "generative tasks; ours are small enough for two CPU cores, and the lab's questions are "
    "synthetic. What can be compared is the share that a method keeps of its own accuracy, and "
    "the order of the methods, not the accuracies.",
    "Published thresholds are quantiles over the batch, so a token's fate depends on other "
    "requests; ours are calibrated once, and decide alike in prefill, in decoding and in any "
    "batch.",
    "Published figures come without intervals, and without a control that was trained alike "
    "without gates. For the 1B model the share is therefore also given of the original, neither "
    f"gated nor tuned ({UNGATED_1B} %).",
    "The published figures of CALM, FREE and LayerSkip do not change with the rate: their exits "
    "were counted, but not applied token by token.",
    "Published speeds are measured against the gated model that computes everything, or in a way "
    "that its authors' repository disowns; ours against the dense model.",
)


def section(found: Sequence[Summary]) -> list[str]:
    """Published figures beside ours of the same name, and what differs."""
    ours = [s for s in found if s.bench == BENCH and s.accuracy is not None]
    lines = ["## Beside the published figures", "", "What differs:", ""]
    lines += [
        *(f"- {text}" for text in DIFFERENCES),
        "",
        "### Accuracy on generated answers, %",
        "",
    ]
    lines += _accuracies([s for s in ours if not s.variant])
    lines += ["### Ablations at 15 %: accuracy, %, and the share of the full method's", ""]
    lines += _ablations([s for s in ours if s.method == GATES and s.saved_macs == 0.15])
    lines += ["### Speed", "", *_speeds([s for s in found if s.method == GATES and not s.variant])]
    return lines


def _accuracies(ours: Sequence[Summary]) -> list[str]:
    own = {(s.method, s.saved_macs): s for s in ours}
    rows = []
    for method in dict.fromkeys(row.method for row in ACCURACIES):
        for row in ACCURACIES:
            if row.method == method:
                original = UNGATED_1B if row.model == "Llama-3.2-1B" else None
                values = [row.at.get(rate) for rate in RATES]
                name = f"published, {row.model}" + (f" ({row.note})" if row.note else "")
                shares = [_share(v, row.at.get(0.0)) for v in values[1:]]
                shares += [_share(v, original) for v in values[1:]]
                texts = [NONE if v is None else f"{v:g}" for v in values]
                rows.append([f"`{method}`", name, *texts, *shares])
        mine = [own.get((method, rate)) for rate in RATES]
        if any(mine):
            means = [None if s is None else _mean(s) for s in mine]
            texts = [NONE if s is None else estimate_text("accuracy", s.accuracy) for s in mine]
            shares = [_share(m, means[0]) for m in means[1:]]
            shares += [
                NONE if s is None else estimate_text("accuracy", s.accuracy_kept) for s in mine[1:]
            ]
            rows.append([f"`{method}`", f"ours, {BENCH}", *texts, *shares])
    columns = ["method", "whose", *map(percent, RATES)]
    for base in ("itself at 0 %", "the ungated original; ours: the control"):
        columns += [f"{percent(rate)}: share of {base}" for rate in RATES[1:]]
    return markdown(columns, rows)


def _mean(summary: Summary) -> float:
    assert summary.accuracy is not None
    return 100 * summary.accuracy.mean


def _share(value: float | None, base: float | None) -> str:
    """One as percent of the other."""
    return f"{100 * value / base:.1f}" if value is not None and base else NONE


def _ablations(ours: Sequence[Summary]) -> list[str]:
    full = ACCURACIES[0].at[0.15]
    own = {s.variant: s for s in ours}
    rows = []
    for name, variant, accuracy in ABLATIONS:
        mine, main = own.get(variant), own.get("")
        share = _share(_mean(mine), _mean(main)) if mine is not None and main is not None else NONE
        text = NONE if mine is None else estimate_text("accuracy", mine.accuracy)
        rows.append([name, f"{accuracy:g}", _share(accuracy, full), text, share])
    columns = ("changed", "published", "of the full method", f"ours, {BENCH}", "of ours in full")
    return markdown(columns, rows)


def _speeds(ours: Sequence[Summary]) -> list[str]:
    benches = list(dict.fromkeys(s.bench for s in ours))
    own = {(s.bench, s.saved_macs): s for s in ours}
    fields = [
        (bench, name, field)
        for bench in benches
        for name, field in (("prefill", "prefill_speedup"), ("decode", "decode_speedup"))
        if any(s.mean_of(field) is not None for s in ours if s.bench == bench)
    ]
    rows = []
    for rate in sorted({*THROUGHPUT, *PREFILL}):
        values = [THROUGHPUT.get(rate), PREFILL.get(rate)]
        for bench, _, field in fields:
            mine = own.get((bench, rate))
            values.append(None if mine is None else mine.mean_of(field))
        rows.append([percent(rate), *(NONE if v is None else f"{v:.2f}×" for v in values)])
    columns = (
        "rate", "published throughput", "published prefill, 1B, 8 × 512, over the gated model",
        *(f"ours, {bench}: {name}" for bench, name, _ in fields),
    )  # fmt: skip
    return markdown(columns, rows)
