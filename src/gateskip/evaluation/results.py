"""What runs of experiments say over seeds: means, intervals, comparisons with gates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from gateskip.config import one_of
from gateskip.evaluation.runs import CONTROL, DENSE, GATES, INSTEAD, METRICS, Run
from gateskip.evaluation.statistics import (
    Estimate,
    Interval,
    PairedDifference,
    estimate,
    holm,
    overlap,
    paired_difference,
)

__all__ = [
    "Comparison",
    "Summary",
    "by_seed",
    "comparisons",
    "control_of",
    "difference",
    "summaries",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """Runs that differ by seed only.

    Attributes:
        runs: them, by seed. collapsed: how many of them failed; they count in every mean that they
            have a figure for. realised_macs: mean, or None where a run has none.
        accuracy, loss: over seeds that have the figure, or None.
        accuracy_kept: accuracy as a share of the control's of the same seed, mean of the ratios;
        loss_ratio: loss, likewise. None without a control of a common seed.
    """

    bench: str
    method: str
    variant: str
    saved_macs: float
    runs: tuple[Run, ...]
    collapsed: int
    realised_macs: float | None
    accuracy: Estimate | None
    loss: Estimate | None
    accuracy_kept: Estimate | None
    loss_ratio: Estimate | None

    @property
    def seeds(self) -> int:
        """Number of runs."""
        return len(self.runs)

    def of(self, metric: str) -> Estimate | None:
        """``accuracy`` or ``loss`` over seeds."""
        one_of("metric", metric, METRICS)
        return self.accuracy if metric == "accuracy" else self.loss

    def mean_of(self, field: str) -> float | None:
        """Mean of a field over the runs that have it; None where none has."""
        values = [getattr(r, field) for r in self.runs if getattr(r, field) is not None]
        return sum(values) / len(values) if values else None


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """Gates beside another method.

    Attributes:
        metric: ``"accuracy"`` or ``"loss"``. gates, other: runs that have it, at the same saving,
            or ``other`` computes everything.
        gain: by how much gates are better (less loss is better) over common seeds; None without.
        p_holm: ``gain.p_student``, corrected for all comparisons of the bench and metric with
            methods that skip, or with those that compute everything.
        verdict: by the two intervals over seeds: ``"better"`` or ``"worse"`` where they are apart,
            ``"overlap"``, or ``"unknown"`` where one is missing.
    """

    metric: str
    gates: Summary
    other: Summary
    gain: PairedDifference | None
    p_holm: float | None
    verdict: str


def by_seed(runs: Iterable[Run], metric: str) -> dict[int, float]:
    """A figure by seed, of the runs that have it."""
    return {r.seed: getattr(r, metric) for r in runs if getattr(r, metric) is not None}


def control_of(run: Run, runs: Iterable[Run]) -> Run | None:
    """The control of a run: same bench and seed; of its own variant, if there is one."""
    found = {
        r.variant: r
        for r in runs
        if (r.method, r.bench, r.seed) == (CONTROL, run.bench, run.seed)
        and r.variant in (run.variant, "")
    }
    return found.get(run.variant) or found.get("")


def summaries(runs: Sequence[Run]) -> list[Summary]:
    """Of runs that differ by seed only, in the order of their keys; means are over seeds."""
    groups: dict[tuple[str, str, str, float], list[Run]] = {}
    for run in runs:
        groups.setdefault(run.key, []).append(run)
    controls = [run for run in runs if run.method == CONTROL]
    found = []
    for (bench, method, variant, saved), group in sorted(groups.items()):
        own = tuple(sorted(group, key=lambda r: r.seed))
        realised = [r.realised_macs for r in own if r.realised_macs is not None]
        summary = Summary(
            bench=bench, method=method, variant=variant, saved_macs=saved, runs=own,
            collapsed=sum(r.collapsed for r in own),
            realised_macs=sum(realised) / len(own) if len(realised) == len(own) else None,
            accuracy=_over(by_seed(own, "accuracy")), loss=_over(by_seed(own, "loss")),
            accuracy_kept=_over(_ratios(own, controls, "accuracy")),
            loss_ratio=_over(_ratios(own, controls, "loss")),
        )  # fmt: skip
        found.append(summary)
    return found


def _over(values: Mapping[int, float]) -> Estimate | None:
    return estimate(list(values.values())) if values else None


def _ratios(runs: Sequence[Run], controls: Sequence[Run], metric: str) -> dict[int, float]:
    """By seed: the figure as a share of the control's; seeds whose control has 0 are left out."""
    found = {}
    for run in runs:
        control = control_of(run, controls)
        base = getattr(control, metric) if control is not None else None
        value = getattr(run, metric)
        if base and value is not None:
            found[run.seed] = value / base
    return found


def difference(one: Summary, other: Summary, metric: str) -> PairedDifference | None:
    """By how much ``one`` is better over common seeds; None where there is none."""
    first, second = by_seed(one.runs, metric), by_seed(other.runs, metric)
    if other.method == DENSE and len(second) == 1:  # nothing in it is drawn: the same for all seeds
        second = dict.fromkeys(first, *second.values())
    if not set(first) & set(second):
        return None
    higher_is_better = metric == METRICS[0]
    return paired_difference(*((first, second) if higher_is_better else (second, first)))


def comparisons(found: Sequence[Summary], bench: str, metric: str) -> list[Comparison]:
    """Gates against every method of a bench, first those that skip, then control and dense.

    Ablations are left out, and what a user would do instead.
    """
    known = [s for s in found if s.bench == bench and not s.variant and s.of(metric) is not None]
    gates = [s for s in known if s.method == GATES]
    others = [s for s in known if s.method not in (GATES, CONTROL, DENSE, *INSTEAD)]
    full = [s for s in known if s.method in (CONTROL, DENSE) and s.saved_macs == 0.0]
    skipping = [(g, o) for g in gates for o in others if g.saved_macs == o.saved_macs]
    return _family(skipping, metric) + _family([(g, o) for g in gates for o in full], metric)


def _family(pairs: Sequence[tuple[Summary, Summary]], metric: str) -> list[Comparison]:
    gains = [difference(gates, other, metric) for gates, other in pairs]
    p_values = [gain.p_student if gain is not None else None for gain in gains]
    corrected = iter(holm([p for p in p_values if p is not None]))
    return [
        Comparison(
            metric, gates, other, gain, None if p is None else next(corrected),
            _verdict(gates, other, metric),
        )
        for (gates, other), gain, p in zip(pairs, gains, p_values, strict=True)
    ]  # fmt: skip


def _verdict(gates: Summary, other: Summary, metric: str) -> str:
    ours, theirs = gates.of(metric), other.of(metric)
    assert ours is not None
    assert theirs is not None
    theirs_interval = theirs.interval
    if other.method == DENSE and theirs.n == 1:
        theirs_interval = Interval(theirs.mean, theirs.mean, "constant", 1.0, 1)
    together = overlap(ours.interval, theirs_interval)
    if together is not False:
        return "unknown" if together is None else "overlap"
    return "better" if (ours.mean > theirs.mean) == (metric == METRICS[0]) else "worse"
