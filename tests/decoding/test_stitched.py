"""Self-stitching: its two ends are plain decoding, and what is between is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gateskip
from gateskip.decoding import DecodingStats
from gateskip.decoding.entropy import normalised_entropy
from gateskip.decoding.loop import run
from gateskip.decoding.policies import as_policy
from gateskip.decoding.sequences import Sequences
from gateskip.decoding.stitched import Stitched
from gateskip.errors import ConfigError, UnsupportedError
from gateskip.execution.api import dense
from models import gated, padded, random_ids, with_table

NEW = 20


@pytest.fixture(scope="module")
def model() -> Any:
    built = with_table(gated("llama", compensation="low_rank"))
    built.generation_config.eos_token_id = None
    return built


def stitched(model: Any, ids: Any, threshold: float, mask: Any = None, **more: Any) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    return gateskip.generate_stitched(
        model, ids, threshold=threshold, attention_mask=mask,
        **({"max_new_tokens": NEW, "do_sample": False} | more),
    )  # fmt: skip


def plain(model: Any, ids: Any, mask: Any = None, **more: Any) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **more)


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("prompt", ["full", "cheap"])
def test_below_zero_everything_is_dense(model: Any, refresh: bool, prompt: str) -> None:
    ids, stats = random_ids(1, 9), DecodingStats()
    with dense(model):
        wanted = plain(model, ids)
    found = stitched(model, ids, -0.1, full="dense", refresh=refresh, prompt=prompt, stats=stats)
    if prompt == "full":
        assert torch.equal(found, wanted)
    elif refresh:  # the first token is the cheap prompt's, all others see a dense cache
        assert stats.refreshed == 9
        with dense(model):
            assert torch.equal(found[:, 10:], plain(model, found[:, :10])[:, 10 : 9 + NEW])
    assert stats.discarded == 1, "only the first"
    assert stats.switches == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_from_one_on_everything_is_cheap(model: Any, batch: int) -> None:
    ids, mask, _ = padded(batch, 9, "left")
    stats = DecodingStats()
    found = stitched(model, ids, 1.0, mask, cheap=0.5, prompt="cheap", stats=stats)
    assert torch.equal(found, plain(model, ids, mask, gateskip_budget={"keep": 0.5}))
    assert (stats.discarded, stats.switches, stats.refreshed) == (0, 0, 0)


def test_rows_switch_alone(model: Any) -> None:
    ids, mask, _ = padded(3, 9, "left")
    middle = 0.905
    stats = DecodingStats()
    together = stitched(model, ids, middle, mask, stats=stats)
    assert 0 < stats.discarded
    for row in range(3):
        first = int(mask[row].argmax())
        alone = stitched(model, ids[row : row + 1, first:], middle)
        assert torch.equal(together[row, first:], alone[0])


def test_counts_are_the_ledgers(model: Any) -> None:
    ids, stats = random_ids(1, 9), DecodingStats()
    with gateskip.trace(model) as trace:
        stitched(model, ids, 0.91, stats=stats, refresh=True)
    assert 0 < stats.discarded < NEW
    assert 0 < stats.refreshed
    calls = trace.calls[1:]
    assert len(calls) == stats.passes + stats.discarded
    tokens = sum(call.valid_BT.numel() for call in calls)
    assert tokens == stats.new_tokens + stats.discarded + stats.refreshed
    with gateskip.trace(model) as cheap:
        stitched(model, ids, 1.0)
    assert trace.ledger.macs_spent > cheap.ledger.macs_spent


class Watched(Stitched):
    """Is unsure where it is told; compares what a switch gives with the full policy's own."""

    def __init__(self, *arguments: Any, at: set[int]) -> None:
        super().__init__(*arguments)
        self.at, self.asked, self.errors = at, 0, []  # type: ignore[var-annotated]

    def unsure(self, logits_BV: Tensor) -> list[bool]:
        self.asked += 1
        return [self.asked in self.at]

    def _again(self, rows: Sequences) -> Tensor:
        logits = super()._again(rows)
        with self.full.on(rows.state):
            whole = rows.model(rows.row(0)).logits
        self.errors.append(float((logits[:, -1] - whole[:, -1]).abs().max()))
        return logits


@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize("cheap_prompt", [True, False])
def test_a_refreshed_switch_is_as_if_all_had_been_full(
    model: Any, refresh: bool, cheap_prompt: bool
) -> None:
    """After it, logits are those of an uncached pass of the full policy over everything."""
    ids, stats = random_ids(1, 9), DecodingStats()
    decoder = Watched(
        as_policy("cheap", 0.5), as_policy("full", 1.0), 0.0, cheap_prompt, refresh, stats,
        at={4, 12},
    )  # fmt: skip
    run(model, decoder, ids, stats, "test", {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False,
    })  # fmt: skip
    assert len(decoder.errors) == 2
    if refresh:
        assert max(decoder.errors) < 1e-4
        assert stats.refreshed == (9 if cheap_prompt else 0) + 3 + 6
    else:
        assert min(decoder.errors) > 1e-2


def test_entropy() -> None:
    even, sure = torch.zeros(1, 8), torch.tensor([[200.0] + [0.0] * 7])
    hidden = torch.tensor([[0.0, 0.0] + [float("-inf")] * 6])
    assert normalised_entropy(even).item() == pytest.approx(1.0)
    assert normalised_entropy(sure).item() == pytest.approx(0.0, abs=1e-6)
    assert normalised_entropy(hidden).item() == pytest.approx(1 / 3, abs=1e-5)


def test_bad_arguments(model: Any) -> None:
    ids = random_ids(2, 9)
    with pytest.raises(ConfigError, match="threshold="):
        stitched(model, ids, "high")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="prompt='half'"):
        stitched(model, ids, 0.5, prompt="half")
    with pytest.raises(UnsupportedError, match="one row"):
        stitched(model, ids, 0.5, refresh=True)
    with pytest.raises(UnsupportedError, match="one budget"):
        stitched(model, ids, 0.5, full="dense")
    windowed = with_table(gated("mistral_window"))
    windowed.generation_config.eos_token_id = None
    with pytest.raises(UnsupportedError, match="windows"):
        stitched(windowed, random_ids(1, 9), 0.5, refresh=True, prompt="cheap")


def test_a_padded_row_is_refreshed_without_its_padding(model: Any) -> None:
    ids, mask, _ = padded(2, 11, "left")
    options: dict[str, Any] = {"prompt": "cheap", "refresh": True}
    found = stitched(model, ids[1:], 0.91, mask[1:], **options)
    assert torch.equal(found[:, 2:], stitched(model, ids[1:, 2:], 0.91, **options))
