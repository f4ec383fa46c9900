"""Loss by whether a token could be copied from its context."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import gateskip
from models import gated, random_ids

SMOLLM2 = Path(__file__).resolve().parents[2] / "experiments" / "smollm2"
sys.path[:0] = [str(SMOLLM2)]

import copied  # noqa: E402


def test_kinds_of_tokens() -> None:
    #     5, new 6, seen 5, copied 6 (it followed 5), new 7, seen 7, copied 7 (it followed 7)
    assert copied.kinds([5, 6, 5, 6, 7, 7, 7]) == [0, 1, 2, 0, 1, 2]
    assert copied.kinds([5]) == []


def test_kinds_make_up_the_loss_at_a_budget() -> None:
    model = gated(init_std=0.5)
    texts = list(random_ids(30, 48))
    gateskip.fit(model, texts)
    gateskip.calibrate(model, texts)
    ids = [row % 7 for row in texts[:6]]  # tokens come again
    row = copied.row_of(model, "gates", 0.8, ids)
    counts = [row[kind]["tokens"] for kind in copied.KINDS]
    assert sum(counts) == 6 * 47
    assert min(counts) > 0
    mean = sum(row[kind]["loss"] * row[kind]["tokens"] for kind in copied.KINDS) / sum(counts)
    with torch.no_grad(), gateskip.budget(model, compute=0.8):
        losses = [float(model(x[None], labels=x[None]).loss) for x in ids]
    assert mean == pytest.approx(sum(losses) / 6, abs=1e-4)
    assert row["macs_saved"] > 0.05
    full = copied.row_of(model, "control", 0.8, ids)
    assert full["macs_saved"] == 0.0
    assert full["seen"]["loss"] != row["seen"]["loss"]
