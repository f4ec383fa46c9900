"""Does self-stitching agree with full decoding more often than switching by chance?

    python experiments/smollm2/stitching.py MODEL GATES PROMPTS experiments/results/stitching.json

PROMPTS is a .jsonl file of rows with an answer, which is not used. Every prompt is decoded greedily
with everything kept; then with thresholds of entropy, and with switches that are drawn as often as
each of them switched (five seeds). Agreement: share of a prompt's new tokens before the first that
differs. Both are compared at equal MACs: chance is interpolated between its own points. Intervals
are bootstraps over prompts, paired, 95 %.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

import gateskip
from gateskip.cli.output import check_json, command_line, write_json
from gateskip.config import Budget
from gateskip.data import encode, read_texts
from gateskip.decoding import DecodingStats
from gateskip.decoding.loop import run as decode
from gateskip.decoding.policies import AtBudget
from gateskip.decoding.stitched import Stitched
from gateskip.errors import GateSkipError
from gateskip.evaluation.header import run_header
from gateskip.retrofit.attach import inner_model


class ByChance(Stitched):
    """Is unsure with a fixed probability, whatever the logits."""

    def __init__(self, *arguments: Any, rate: float, seed: int) -> None:
        super().__init__(*arguments)
        self.rate, self.draws = rate, random.Random(seed)

    def unsure(self, logits_BV: Tensor) -> list[bool]:
        return [self.draws.random() < self.rate for _ in range(logits_BV.shape[0])]


class Counting(Stitched):
    """Counts how often it was unsure."""

    asked = flagged = 0

    def unsure(self, logits_BV: Tensor) -> list[bool]:
        found = super().unsure(logits_BV)
        self.asked += len(found)
        self.flagged += sum(found)
        return found


def prefix(a: Tensor, b: Tensor) -> float:
    """Share of the tokens before the first difference."""
    wrong = (a != b).nonzero()
    return (int(wrong[0]) if wrong.numel() else a.shape[0]) / a.shape[0]


def between(points: list[tuple[float, float]], x: float) -> float | None:
    """The value at x on the line through points; None outside."""
    points = sorted(points)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def interval(values: list[float], draws: int = 2000) -> list[float]:
    """Bootstrap over prompts, 95 %."""
    generator = random.Random(0)
    means = sorted(statistics.mean(generator.choices(values, k=len(values))) for _ in range(draws))
    return [means[int(0.025 * draws)], means[int(0.975 * draws) - 1]]


def main() -> int:
    """Run; 1 after an error of gateskip."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("gates")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("json")
    parser.add_argument("--cheap", type=float, default=0.75)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.3, 0.2, 0.1, 0.05])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    try:
        check_json(options.json)
        write_json(options.json, measured(options))
    except GateSkipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """All arms over all prompts."""
    model = gateskip.load(options.gates, base=options.model, dtype=options.dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    samples = encode(read_texts(options.prompts), tokenizer, 1024)
    step = max(len(samples) // options.count, 1)
    prompts = [s.ids[: int(s.scored.to(torch.uint8).argmax())] for s in samples[::step]]
    prompts = [p[None] for p in prompts if p.shape[0] > 1][: options.count]
    cheap, full = AtBudget(Budget(keep=options.cheap)), AtBudget(Budget(keep=1.0))
    given: dict[str, Any] = {"do_sample": False, "max_new_tokens": options.new_tokens,
                             "min_new_tokens": options.new_tokens}  # fmt: skip

    def arm(make: Any) -> dict[str, Any]:
        stats, agreed, macs = DecodingStats(), [], []
        flagged = asked = 0
        for ids, wanted in zip(prompts, reference, strict=True):
            decoder = make(stats)
            with gateskip.trace(model) as trace:
                out = decode(inner_model(model), decoder, ids, stats, "stitching",
                             {**given, "attention_mask": torch.ones_like(ids)})  # fmt: skip
            agreed.append(prefix(out[0, ids.shape[1] :], wanted))
            spent = sum(record_macs(call) for call in trace.calls[1:])
            macs.append(spent / full_macs[len(macs)])
            flagged += getattr(decoder, "flagged", 0)
            asked += getattr(decoder, "asked", 0)
        rate = flagged / asked if asked else None
        return {"agreement": agreed, "macs": macs, "rate": rate, **stats.to_json()}

    def stitched(kind: Any, threshold: float, **more: Any) -> Any:
        return lambda stats: kind(cheap, full, threshold, False, False, stats, **more)

    reference: list[Tensor] = []
    full_macs: list[float] = []
    for ids in prompts:
        with gateskip.trace(model) as trace:
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **given)
        reference.append(out[0, ids.shape[1] :])
        full_macs.append(sum(record_macs(call) for call in trace.calls[1:]))
    ends = [arm(stitched(Stitched, 1.0))]
    entropy = [(t, arm(stitched(Counting, t))) for t in options.thresholds]
    chance = []
    for _, found in entropy:
        for seed in range(options.seeds):
            chance.append(arm(stitched(ByChance, 0.0, rate=found["rate"], seed=seed)))
    rows = []
    for threshold, found in entropy:
        rows.append(row_of(threshold, found, ends, chance, len(prompts), options.seeds))
        print(rows[-1])
    return {
        "header": run_header(command_line("python experiments/smollm2/stitching.py",
                                          vars(options) | {"prompts": str(options.prompts)})),
        "prompts": len(prompts), "cheap": options.cheap,
        "cheap_agreement": statistics.mean(ends[0]["agreement"]),
        "cheap_macs": statistics.mean(ends[0]["macs"]), "rows": rows,
    }  # fmt: skip


def record_macs(call: Any) -> float:
    """Decoder MACs of one call."""
    from gateskip.skipping.ledger import macs_of

    return float(macs_of(call)[1].sum())


def row_of(
    threshold: float, found: Any, ends: list[Any], chance: list[Any], prompts: int, seeds: int
) -> dict[str, Any]:
    """One threshold beside chance at equal MACs."""
    macs = statistics.mean(found["macs"])
    ours = found["agreement"]
    # Chance's curve of one prompt, over its rates and seeds: mean over prompts of MACs, as ours.
    curve = [(statistics.mean(arm["macs"]), arm["agreement"]) for arm in [*ends, *chance]]
    levels = grouped(curve, seeds)
    theirs = [between([(m, agreed[p]) for m, agreed in levels], macs) for p in range(prompts)]
    row: dict[str, Any] = {
        "threshold": threshold, "macs": macs, "rate": found["rate"],
        "agreement": statistics.mean(ours), "agreement_interval": interval(ours),
        "discarded": found["discarded"], "switches": found["switches"],
    }  # fmt: skip
    if all(t is not None for t in theirs):
        gain = [a - b for a, b in zip(ours, theirs, strict=True)]
        row |= {
            "chance_agreement": statistics.mean(theirs),
            "gain": statistics.mean(gain), "gain_interval": interval(gain),
        }  # fmt: skip
    return row


def grouped(curve: list[tuple[float, list[float]]], seeds: int) -> list[tuple[float, list[float]]]:
    """Means over the seeds of each rate; the first point, all cheap, stands alone."""
    first, *middle = curve
    levels = [first]
    for at in range(0, len(middle), seeds):
        part = middle[at : at + seeds]
        agreed = [statistics.mean(each) for each in zip(*(a for _, a in part), strict=True)]
        levels.append((statistics.mean(m for m, _ in part), agreed))
    return levels


if __name__ == "__main__":
    sys.exit(main())
