"""Per-branch budgets that were searched for: a compute budget is spent where it hurts least.

Both searches change by how much each branch's threshold differs from the global one (its offset),
at a few budgets; between them offsets are interpolated, so the table stays nested. The loss is that
of the search text, with every skip done.

- ``lagrangian``: at the optimum of a budget every branch loses equally much per MAC saved at the
  margin. Each round measures that ratio for every branch at the operating point, with all others
  skipping (so interactions count), and moves offsets against it: as harm grows with e^{2s}, by half
  the logarithm of the ratio. A move that does not lower the loss at equal compute is halved, then
  dropped.
- ``greedy``: a table of the loss when one branch alone keeps a share of its tokens, and from
  everything kept always the step that costs least per MAC saved. Blind to interactions.

Shapes: N scored tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gateskip.config import BranchKey
from gateskip.data import Batch
from gateskip.fitting.closed_loop import Allocation, Collector, Measured, keep_all
from gateskip.fitting.passes import eval_mode
from gateskip.retrofit.devices import device_of
from gateskip.skipping.state import override, state_of

__all__ = ["SEARCHES", "Loss", "measure_loss", "passes_of", "search"]

SEARCHES = ("lagrangian", "greedy")
#: Shares of compute at which offsets are searched.
ANCHORS = (0.85, 0.75, 0.5)
ROUNDS = 1
#: Share of a branch's tokens by which its marginal loss is measured.
STEP = 0.12
#: A measured ratio counts at most so many times the median, and at least its inverse.
RATIO_BOUND = 6.0
MOVES = (0.5, 0.25)
CLOSE = 0.004
#: Share of tokens below which a branch is tried without.
IDLE = 0.03
LEVELS = (0.75, 0.4, 0.0)

Thresholds = dict[BranchKey, float]


@dataclasses.dataclass(frozen=True, slots=True)
class Loss:
    """A pass under thresholds: loss per scored token ``[N]``, and what was kept and spent."""

    thresholds: Thresholds
    loss_N: Tensor
    seen: Measured

    @property
    def mean(self) -> float:
        return float(self.loss_N.mean())


@torch.no_grad()
def measure_loss(model: nn.Module, batches: Sequence[Batch], thresholds: Thresholds) -> Loss:
    """Loss of the scored tokens under thresholds, in nats, and what they keep and spend."""
    state, collector = state_of(model), Collector()
    device, losses = device_of(model), []
    with eval_mode(model), override(
        state, thresholds=thresholds, scores=collector, recorder=collector, execution="compacted"
    ):  # fmt: skip
        for batch in batches:
            run: Any = model
            out = run(
                input_ids=batch.ids.to(device), attention_mask=batch.mask.to(device),
                use_cache=False,
            )  # fmt: skip
            scored = batch.scored[:, 1:].to(device)
            logits_NV = out.logits[:, :-1][scored].float()
            target_N = batch.ids[:, 1:].to(device)[scored]
            found_N = nn.functional.cross_entropy(logits_NV, target_N, reduction="none")
            losses.append(found_N.cpu())
    return Loss(thresholds, torch.cat(losses), collector.measured(state))


def search(
    model: nn.Module,
    batches: Sequence[Batch],
    split: Allocation,
    *,
    method: str = "lagrangian",
    anchors: Sequence[float] = ANCHORS,
    rounds: int = ROUNDS,
    advance: Callable[[], None] = lambda: None,
) -> Allocation:
    """The allocation that a search finds, starting from ``split``.

    Args:
        batches: the search text; a few thousand tokens. anchors: shares of compute, descending.
        rounds: of the Lagrangian search at every anchor. advance: called after every pass.
    """
    run = _Search(model, batches, advance)
    start = run.measure(keep_all(state_of(model)))
    if method == "greedy":
        found = _greedy(run, start, split, anchors)
    else:
        found = []
        at = start
        for target in anchors:
            at, split = _lagrangian(run, at, split, target, rounds)
            found.append((at.seen.keep, split.offsets))
    return dataclasses.replace(split, name="searched", found=tuple(found))


def passes_of(method: str, branches: int, anchors: int = len(ANCHORS), rounds: int = ROUNDS) -> int:
    """About how many passes a search takes, for a progress bar."""
    if method == "greedy":
        return 1 + branches * len(LEVELS)
    return 1 + anchors * (2 + rounds * (branches + 5))


def beyond(seen: Measured, key: BranchKey) -> float:
    """A threshold above every score of a branch; ``calibrate`` then switches it off for good."""
    return float(seen.scores[key].weighted().values[-1]) + 1e-3


class _Search:
    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], advance: Callable[[], None]
    ) -> None:
        self.model, self.batches, self.advance = model, batches, advance

    def measure(self, thresholds: Thresholds) -> Loss:
        found = measure_loss(self.model, self.batches, thresholds)
        self.advance()
        return found

    def at_compute(self, split: Allocation, start: Loss, target: float) -> Loss:
        """Thresholds of an allocation that spend ``target``, within ``CLOSE``."""
        at, keep = start, start.seen.keep - (start.seen.compute - target)
        best: Loss | None = None
        for _ in range(4):
            at = self.measure(split.thresholds(at.seen, min(max(keep, 0.02), 1.0)))
            if best is None or abs(at.seen.compute - target) < abs(best.seen.compute - target):
                best = at
            if abs(at.seen.compute - target) <= CLOSE:
                break
            keep = at.seen.keep - (at.seen.compute - target)
        assert best is not None
        return best


def _lagrangian(
    run: _Search, start: Loss, split: Allocation, target: float, rounds: int
) -> tuple[Loss, Allocation]:
    """(operating point, allocation) with offsets improved at one budget."""
    at = run.at_compute(split, start, target)
    for _ in range(rounds):
        ratios = _ratios(run, at)
        if not ratios:
            break
        slope = sorted(ratios.values())[len(ratios) // 2]
        if slope <= 0.0:
            break  # skipping more costs nothing measurable here: nothing to balance
        better = None
        for move in MOVES:
            offsets = dict(split.offsets)
            for key, ratio in ratios.items():
                bounded = min(max(ratio / slope, 1.0 / RATIO_BOUND), RATIO_BOUND)
                offsets[key] -= move * math.log(bounded)
            moved = dataclasses.replace(split, offsets=offsets)
            after = run.at_compute(moved, at, target)
            # At equal compute: what was spent more or less is worth the median ratio.
            gain = (at.mean - after.mean) + slope * (at.seen.compute - after.seen.compute)
            if gain > 0.0:
                better = after, moved
                break
        if better is None:
            break
        at, split = better
        at, split = _switch_off(run, at, split, target, slope)
    return at, split


def _switch_off(
    run: _Search, at: Loss, split: Allocation, target: float, slope: float
) -> tuple[Loss, Allocation]:
    """Branches that (nearly) nobody uses are off for good, where that does no harm."""
    idle = [
        key
        for key, scores in at.seen.scores.items()
        if 0 < scores.count - scores.weighted().below(at.thresholds[key]) <= IDLE * scores.count
    ]
    if not idle:
        return at, split
    offsets = dict(split.offsets)
    for key in idle:
        theta = at.thresholds[key] - offsets[key]
        offsets[key] = beyond(at.seen, key) - theta
    moved = dataclasses.replace(split, offsets=offsets)
    after = run.at_compute(moved, at, target)
    gain = (at.mean - after.mean) + slope * (at.seen.compute - after.seen.compute)
    return (after, moved) if gain >= 0.0 else (at, split)


def _ratios(run: _Search, at: Loss) -> dict[BranchKey, float]:
    """Loss per MAC saved, in nats per share of dense MACs, when a branch alone skips more."""
    found: dict[BranchKey, float] = {}
    for key, scores in at.seen.scores.items():
        held = scores.weighted()
        kept = 1.0 - held.below(at.thresholds[key]) / held.total
        more = min(STEP, 0.5 * kept)
        if more * held.total < 20:
            continue  # (nearly) always off
        threshold = held.lowest((1.0 - kept + more) * held.total)
        after = run.measure(at.thresholds | {key: threshold})
        saved = at.seen.compute - after.seen.compute
        if saved > 1e-6:
            found[key] = float((after.loss_N - at.loss_N).mean()) / saved
    return found


def _greedy(
    run: _Search, start: Loss, split: Allocation, anchors: Sequence[float]
) -> list[tuple[float, dict[BranchKey, float]]]:
    """(keep, offsets) at the anchors along the greedy path."""
    steps: list[tuple[float, float, float, BranchKey, float]] = []
    taken: dict[BranchKey, list[tuple[float, float, float, float]]] = {}
    for key, scores in start.seen.scores.items():
        held = scores.weighted()
        points = []
        for level in LEVELS:
            threshold = beyond(start.seen, key)
            if level:
                threshold = held.lowest((1.0 - level) * held.total)
            after = run.measure(start.thresholds | {key: threshold})
            saved = start.seen.compute - after.seen.compute
            points.append((after.mean - start.mean, saved, level, threshold))
        taken[key] = points
    # Steps of one branch in order; a later step with a better ratio pulls the earlier one along.
    for key, points in taken.items():
        before = (0.0, 0.0)
        for harm, saved, level, threshold in _hull(points):
            steps.append(
                ((harm - before[0]) / max(saved - before[1], 1e-9), saved - before[1], level, key,
                 threshold)
            )  # fmt: skip
            before = harm, saved
    steps.sort(key=lambda step: step[0])
    thresholds = {key: s.weighted().lowest(0.0) for key, s in start.seen.scores.items()}
    compute, found = start.seen.compute, []
    wanted = list(anchors)
    levels = dict.fromkeys(start.seen.shares, 1.0)
    for _ratio, saved, level, key, threshold in steps:
        compute -= saved
        thresholds[key], levels[key] = threshold, level
        while wanted and compute <= wanted[0]:
            wanted.pop(0)
            found.append((sum(levels.values()) / len(levels), dict(thresholds)))
    return found


def _hull(
    points: Sequence[tuple[float, float, float, float]],
) -> list[tuple[float, float, float, float]]:
    """The points of a branch on the lower convex hull of harm over MACs saved, from (0, 0)."""
    hull: list[tuple[float, float, float, float]] = [(0.0, 0.0, 1.0, -math.inf)]
    for point in points:
        while len(hull) > 1 and (point[0] - hull[-1][0]) * (hull[-1][1] - hull[-2][1]) <= (
            hull[-1][0] - hull[-2][0]
        ) * (point[1] - hull[-1][1]):
            hull.pop()
        if point[1] > hull[-1][1]:
            hull.append(point)
    return hull[1:]
