"""Usage agrees with the trace and the ledger; pictures and text can be drawn of it."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import gateskip
from gateskip.errors import AttachError, ConfigError, DataError, OutputError
from gateskip.explain.plot import plot_usage
from gateskip.explain.terminal import print_usage
from gateskip.explain.usage import Usage, branch_usage, usage_of
from models import LAYERS, gated, random_ids, tiny, with_table

TOKENS = 150


@pytest.fixture(scope="module")
def usage() -> Usage:
    model = with_table(gated(compensation="low_rank"))
    with gateskip.budget(model, keep=0.5):
        return branch_usage(model, random_ids(1, TOKENS))


@pytest.fixture(scope="module")
def tokens() -> list[str]:
    odd = ["$x^2", "\n", " the", "\u0f3a", "a" * 40, "\x00"]
    return odd + [f"t{n}" for n in range(TOKENS - len(odd))]


def test_usage_is_the_trace() -> None:
    model, ids = with_table(gated()), random_ids(1, 20)
    with gateskip.budget(model, keep=0.5), gateskip.trace(model) as trace, torch.no_grad():
        model(ids)
    with gateskip.budget(model, keep=0.5):
        found = branch_usage(model, ids)
    assert found.kept_TN.shape == (20, 2 * LAYERS)
    assert found.branches == tuple((n, k) for n in range(LAYERS) for k in ("attention", "mlp"))
    for column, key in enumerate(found.branches):
        assert torch.equal(found.kept_TN[:, column], trace.keep[key][0][0])
    assert found.skip_rate == pytest.approx(trace.ledger.skip_rate)
    assert found.macs_saved == pytest.approx(1 - trace.ledger.compute)
    assert torch.equal(usage_of(trace).kept_TN, found.kept_TN)


def test_rates_add_up(usage: Usage) -> None:
    assert 0 < usage.skip_rate < 1
    for rates in (usage.skip_by_layer, usage.skip_by_kind, usage.skip_by_branch):
        assert sum(rates.values()) / len(rates) == pytest.approx(usage.skip_rate)
    assert usage.used_share[0] == 1.0, "the first token is protected"
    assert usage.to_json()["tokens"] is None


def test_full_budget_uses_everything() -> None:
    found = branch_usage(gated(), random_ids(1, 6))
    assert bool(found.kept_TN.all())
    assert found.skip_rate == 0.0


def test_one_branch_kind(tmp_path: Path) -> None:
    model = gateskip.attach(tiny(), gateskip.GateConfig(branches=("mlp",)))
    found = branch_usage(model, random_ids(1, 5))
    assert found.kinds == ("mlp",)
    plot_usage(found, list("abcde"), tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 0


@pytest.mark.parametrize("shape", [(4,), (2, 4), (1, 0)])
def test_bad_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="input_ids"):
        branch_usage(gated(), torch.zeros(shape, dtype=torch.long))


def test_no_gates() -> None:
    with pytest.raises(AttachError):
        branch_usage(tiny(), random_ids(1, 4))


def test_plot(usage: Usage, tokens: list[str], tmp_path: Path) -> None:
    path = tmp_path / "usage.png"
    plot_usage(usage, tokens, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["usage.png"], "no temporary file is left"
    assert "matplotlib.pyplot" not in sys.modules


def test_plot_errors(
    usage: Usage, tokens: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="labels"):
        plot_usage(usage, tokens[1:], tmp_path / "usage.png")
    with pytest.raises(OutputError, match="could not be written"):
        plot_usage(usage, tokens, tmp_path / "missing" / "usage.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install gateskip\[explain\]"):
        plot_usage(usage, tokens, tmp_path / "usage.png")


def test_terminal(usage: Usage, tokens: list[str]) -> None:
    stream = io.StringIO()
    print_usage(usage, tokens, Console(file=stream, width=100))
    shown = stream.getvalue()
    assert "Skipped by layer" in shown
    assert f"skipped {usage.skip_rate:.1%}" in shown
    assert "█$x^2" in shown
