"""Training text by the model itself: rows, seeds, interrupts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trl import words

import gateskip
from gateskip.errors import ConfigError, DataError, OutputError
from gateskip.training import make_dataset
from gateskip.training.generation import generate_data, read_prompts
from models import gated, tiny, with_table

PROMPTS = [f"w{n} w{n + 1} w{n + 2}" + " w9" * (n % 3) for n in range(5)]


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(path: Path, model: Any = None, prompts: Any = None, **options: Any) -> int:
    given: dict[str, Any] = {"samples": 2, "max_new_tokens": 5, "batch_size": 4}
    return generate_data(
        tiny() if model is None else model, words(), prompts or PROMPTS, path, **(given | options)
    )


def test_rows_train(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert written(out) == 10
    found = rows(out)
    assert [row["prompt"] for row in found] == [p for p in PROMPTS for _ in range(2)]
    assert len({row["completion"] for row in found}) > 5
    assert found[0]["completion"] != found[1]["completion"], "samples differ"
    assert len(make_dataset(found, words())) > 5


def test_an_interrupted_run_goes_on_and_writes_the_same(tmp_path: Path) -> None:
    whole, parts, model = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tiny()
    written(whole, model)
    calls = []
    original = model.generate

    def stops(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    model.generate = stops
    with pytest.raises(KeyboardInterrupt):
        written(parts, model)
    assert len(rows(parts)) == 8, "whole lines at every moment"
    model.generate = original
    text = parts.read_bytes()
    parts.write_bytes(text[: text.rindex(b"\n", 0, -1) + 12])  # a line that was cut
    with pytest.raises(OutputError, match="resume=True"):
        written(parts, model)
    assert written(parts, model, resume=True) == 6
    assert parts.read_bytes() == whole.read_bytes()
    assert written(parts, model, resume=True) == 0
    with pytest.raises(DataError, match="other prompts or samples"):
        written(parts, model, prompts=PROMPTS[::-1], resume=True)
    with pytest.raises(DataError, match="more than the 5 asked for"):
        written(parts, model, samples=1, resume=True)
    assert written(parts, model, overwrite=True, samples=1) == 5


def test_greedy_answers_are_generates_own(tmp_path: Path) -> None:
    out, model, tokenizer = tmp_path / "rows.jsonl", tiny(), words()
    written(out, model, samples=1, temperature=0.0)
    for row in rows(out):
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        new = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert row["completion"] == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_a_gated_model_answers_at_its_budget(tmp_path: Path) -> None:
    model = with_table(gated())
    with gateskip.budget(model, keep=0.5), gateskip.trace(model) as trace:
        written(tmp_path / "rows.jsonl", model, samples=1)
    assert trace.ledger.skip_rate > 0.2


def test_the_callers_random_numbers_stay(tmp_path: Path) -> None:
    model = tiny()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    written(tmp_path / "rows.jsonl", model)
    assert torch.equal(torch.rand(3), expected)


def test_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    assert read_prompts(tmp_path / "p.txt") == ["one", "two"]
    lines = [
        {"prompt": "a", "completion": "b"}, {"text": "c"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "d"}]},
    ]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert read_prompts(tmp_path / "p.jsonl") == ["a", "c", "d"]
    (tmp_path / "empty.txt").write_text("\n")
    for name, match in (("empty.txt", "has no prompt"), ("no.txt", "is not a file")):
        with pytest.raises(DataError, match=match):
            read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    "options", [{"samples": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"batch_size": 0}]
)
def test_bad_options(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        written(tmp_path / "rows.jsonl", **options)
    with pytest.raises(OutputError, match="does not exist"):
        written(tmp_path / "none" / "rows.jsonl")
