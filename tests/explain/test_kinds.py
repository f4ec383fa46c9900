"""Skips by kind of token: the kinds, and a test that finds what is there and nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gateskip
from gateskip.errors import ConfigError, DataError
from gateskip.explain.kinds import KINDS, KindReport, skips_by_kind, token_kinds
from gateskip.skipping.rule import set_rule
from gateskip.skipping.state import state_of
from models import tiny

PIECES = ["<s>", "the", " the", " cat", " cats", " run", "ning", " 42", "7", ",", ".", "\n", " "]


class Words:
    """Decodes ids as pieces; what is beyond them is a word."""

    all_special_ids = (0,)

    def decode(self, ids: list[int]) -> str:
        return "".join(PIECES[i] if i < len(PIECES) else f" w{'abc'[i % 3]}" for i in ids)


class Stripping(Words):
    """Drops the space that its text begins with, as SentencePiece's decoders do."""

    def decode(self, ids: list[int]) -> str:
        return super().decode(ids).removeprefix(" ")


def test_kinds_of_tokens() -> None:
    # "the cats running 42, 7. \n the" and a special token, after the beginning
    ids = [1, 4, 5, 6, 7, 9, 8, 10, 11, 2, 0, 12]
    for tokenizer in (Words(), Stripping()):
        assert token_kinds(ids, tokenizer) == [
            "beginning", "word", "word", "inside a word", "number", "punctuation", "number",
            "punctuation", "space", "function word", "special", "space",
        ]  # fmt: skip
    assert token_kinds([1, 4], Words(), words=("cats",)) == ["beginning", "function word"]


class Ranked:
    """Ranks by what a test says of ids and places."""

    name, causal = "ranked", True

    def __init__(self, rank: Any) -> None:
        self.rank = rank

    def score(self, key: Any, h_BTH: Tensor, call: Any) -> Tensor:
        found: Tensor = self.rank(call.ids_BT, call.visible_keys())
        # Ties are broken by what has to do with another token.
        other = call.ids_BT.roll(3, 1) * 12.9898 + call.visible_keys() * 78.233
        return found + 0.01 * torch.sin(other)

    def tensors(self) -> dict[str, Tensor]:
        return {}


def report(rank: Any, ids: Tensor, **options: Any) -> KindReport:
    model = tiny()
    gateskip.attach(model, gateskip.GateConfig(kind="unit", compensation="none"))
    state = state_of(model)
    set_rule(state, Ranked(rank))  # type: ignore[arg-type]
    state.fitted = True
    gateskip.calibrate(model, list(ids), allocation="uniform")
    with gateskip.budget(model, keep=0.7):
        return skips_by_kind(model, list(ids), Words(), draws=400, **options)


def texts(seed: int = 0) -> Tensor:
    """40 texts of commas and words."""
    ids = torch.randint(13, 60, (40, 48), generator=torch.Generator().manual_seed(seed))
    comma = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.25
    return ids.masked_fill(comma, PIECES.index(","))


def test_finds_a_kind_that_is_skipped() -> None:
    comma = PIECES.index(",")
    found = report(lambda ids, place: -(ids == comma).float(), texts())
    rows = {row.kind: row for row in found.rows}
    assert rows["punctuation"].skip_rate > 0.9
    assert rows["punctuation"].difference > 0.7
    assert rows["punctuation"].p == pytest.approx(1 / 401)
    assert rows["punctuation"].p_holm == pytest.approx(2 / 401)
    assert rows["beginning"].skip_rate == 0.0
    assert rows["beginning"].difference is None
    assert found.explained > 0.7
    assert set(rows["word"].by_layer) == {0, 1, 2, 3}
    names = [row.kind for row in found.rows]
    assert names == sorted(names, key=KINDS.index)


def test_finds_nothing_where_only_the_place_counts() -> None:
    # Later tokens are skipped, and commas are late: their rate is higher, but not at one place.
    ids = torch.randint(13, 60, (40, 48), generator=torch.Generator().manual_seed(3))
    late = torch.rand(ids.shape, generator=torch.Generator().manual_seed(4))
    ids = ids.masked_fill(late < torch.linspace(0, 0.5, 48), PIECES.index(","))
    found = report(lambda ids, place: -(place.float().log2().floor()), ids)
    rows = {row.kind: row for row in found.rows}
    assert rows["punctuation"].skip_rate > rows["word"].skip_rate + 0.1
    assert abs(rows["punctuation"].difference) < 0.03
    assert rows["punctuation"].p > 0.01


def test_a_template_says_nothing() -> None:
    # The same five tokens begin every text; skips go by the place alone, at random.
    ids = texts(7)
    ids[:, 1:6] = torch.tensor([PIECES.index(","), 14, 15, PIECES.index(","), 16])
    found = report(lambda _, place: -torch.sin(place * 3.7), ids)
    rows = {row.kind: row for row in found.rows}
    assert abs(rows["punctuation"].skip_rate - rows["word"].skip_rate) > 0.02
    assert abs(rows["punctuation"].difference) < 0.02
    assert rows["punctuation"].p > 0.01


@pytest.mark.parametrize("case", ["runs", "template", "spread", "lengths"])
def test_p_values_of_chance_are_uniform(case: str) -> None:
    """Decisions that come in runs, and kinds that do, without anything to do with each other."""
    from gateskip.explain.kinds import _at_the_same_place, _differences

    random, p_values = np.random.default_rng(0), []

    def turned(values: Any) -> Any:
        return np.roll(np.repeat(values, 4), random.integers(48))

    for trial in range(100):
        rates = [turned(random.random(12)) + random.random() for _ in range(30)]
        kinds = [turned(random.integers(3, 5, 12)) for _ in range(30)]
        if case == "template":  # 36 of 48 tokens, decided alike in all texts
            rates = [np.concatenate([rates[0][:36], rate[36:]]) for rate in rates]
            kinds = [np.concatenate([kinds[0][:36], kind[36:]]) for kind in kinds]
        if case == "spread":  # the last places differ twenty times as much
            rates = [rate * np.where(np.arange(48) < 36, 0.05, 1.0) for rate in rates]
        if case == "lengths":
            ends = random.integers(12, 49, 30)
            rates = [rate[:end] for rate, end in zip(rates, ends, strict=True)]
            kinds = [kind[:end] for kind, end in zip(kinds, ends, strict=True)]
        left = _at_the_same_place(rates, [np.arange(len(rate)) for rate in rates])
        found, null = _differences(left, [kind[1:] for kind in kinds], 200, trial)
        p_values.append((1 + (abs(null[:, 3]) >= abs(found[3])).sum()) / 201)
    assert np.mean(np.array(p_values) <= 0.1) <= 0.18
    assert np.mean(np.array(p_values) <= 0.02) <= 0.07
    assert 0.35 < np.mean(p_values) < 0.65


def test_kinds_of_another_text_say_nothing() -> None:
    comma = PIECES.index(",")
    found = report(lambda ids, place: -(ids == comma).float(), texts(), of_another_text=True)
    rows = {row.kind: row for row in found.rows}
    assert rows["punctuation"].tokens > 300
    assert abs(rows["punctuation"].difference) < 0.1
    assert rows["punctuation"].p > 0.005
    assert found.explained < 0.02


def test_what_is_asked_for_is_checked() -> None:
    model = gateskip.attach(tiny())
    with pytest.raises(ConfigError, match="tokenizer=None"):
        skips_by_kind(model, list(texts()), None)
    with pytest.raises(DataError, match="at least 1000"):
        skips_by_kind(model, [torch.arange(13, 40)], Words())
    with pytest.raises(DataError, match="choose a budget"):
        skips_by_kind(model, list(texts()), Words())
    row = report(lambda ids, place: ids.float(), texts()).to_json()["rows"][0]
    assert set(row) == {f.name for f in dataclasses.fields(report_row())}


def report_row() -> Any:
    from gateskip.explain.kinds import KindRow

    return KindRow
