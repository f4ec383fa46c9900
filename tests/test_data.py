"""Texts in, batches out; whatever is malformed names its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gateskip.data import (
    Sample,
    count_tokens,
    encode,
    read_texts,
    split_samples,
    take_tokens,
    to_batches,
)
from gateskip.errors import DataError


class Letters:
    """A tokenizer with one token per character."""

    chat_template: str | None = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 128 for c in text]}

    def apply_chat_template(
        self, messages: list[Any], tokenize: bool, add_generation_prompt: bool = False
    ) -> str:
        text = "".join(f"<{m['role']}>{m['content']}\n" for m in messages)
        return text + ("<assistant>" if add_generation_prompt else "")


def chat() -> Letters:
    tokenizer = Letters()
    tokenizer.chat_template = "yes"
    return tokenizer


def sample(length: int) -> Sample:
    return Sample(torch.arange(1, length + 1), torch.ones(length, dtype=torch.bool))


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_text_file(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "one\ntwo\n\n\n three \n\n\n\n")
    assert read_texts(path) == ["one\ntwo", "three"]
    assert read_texts(str(path)) == ["one\ntwo", "three"]


def test_json_lines(tmp_path: Path) -> None:
    rows: list[Any] = [
        "plain", {"text": "é"}, {"prompt": "p", "completion": "c"},
        {"messages": [{"role": "user", "content": "x"}]},
    ]  # fmt: skip
    path = written(tmp_path, "a.jsonl", "\n".join(json.dumps(r) for r in rows) + "\n\n")
    assert read_texts(path) == rows


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "a"', "not valid JSON"),
        ("nonsense", "not valid JSON"),
        ("[1, 2]", "list"),
        ("3", "int"),
        ('{"body": "a"}', "body"),
        ('{"text": 5}', "text"),
        ('{"prompt": "a"}', "completion"),
        ('{"messages": []}', "messages"),
        ('{"messages": "hi"}', "messages"),
        ("{}", "nothing"),
    ],
)
def test_malformed_lines_name_file_and_line(tmp_path: Path, line: str, words: str) -> None:
    path = written(tmp_path, "bad.jsonl", f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(DataError) as caught:
        read_texts(path)
    assert "bad.jsonl, line 3" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_empty_and_missing_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="not a file"):
        read_texts(tmp_path / name)
    with pytest.raises(DataError, match=r"empty|no rows"):
        read_texts(written(tmp_path, name, "\n \n"))


def test_encode_tensors() -> None:
    samples = encode([torch.arange(5), torch.arange(4)[None], torch.tensor([1])])
    assert [s.ids.tolist() for s in samples] == [[0, 1, 2, 3, 4], [0, 1, 2, 3]]
    assert all(bool(s.scored.all()) and s.ids.dtype == torch.int64 for s in samples)
    assert encode([torch.arange(9)], max_length=3)[0].ids.tolist() == [0, 1, 2]
    for bad in (torch.zeros(2, 3), torch.zeros(1, 1, 3)):
        with pytest.raises(DataError, match=r"data\[0\]"):
            encode([bad])


def test_encode_texts() -> None:
    (one, two) = encode(["abc", {"text": "de"}], Letters())
    assert one.ids.tolist() == [97, 98, 99]
    assert bool(two.scored.all())
    with pytest.raises(DataError, match="tokenizer"):
        encode(["abc"])


@pytest.mark.parametrize("tokenizer", [Letters(), chat()])
def test_only_completions_are_scored(tokenizer: Letters) -> None:
    rows = [
        {"prompt": "what", "completion": "this"},
        {"messages": [{"role": "user", "content": "what"},
                      {"role": "assistant", "content": "this"}]},
    ]  # fmt: skip
    for found in encode(rows, tokenizer):
        scored = "".join(chr(c) for c in found.ids[found.scored].tolist())
        assert scored.strip() == "this"
        assert not bool(found.scored[0])


@pytest.mark.parametrize("data", ["abc", torch.arange(5), 7, [], ["a"]])
def test_encode_refuses(data: Any) -> None:
    with pytest.raises(DataError):
        encode(data, Letters())


def test_encode_names_the_row() -> None:
    with pytest.raises(DataError, match=r"data\[1\]"):
        encode(["fine", {"body": "x"}], Letters())


def test_take_count_split() -> None:
    samples = [sample(n) for n in (3, 4, 5, 6)]
    assert count_tokens(samples) == 18
    assert take_tokens(samples, None) == samples
    assert take_tokens(samples, 7) == samples[:2]
    assert take_tokens(samples, 8) == samples[:3]
    rest, held = split_samples(samples, 2)
    assert (rest, held) == ([samples[0], samples[2]], [samples[1], samples[3]])


def test_batches_lose_nothing_and_respect_the_limit() -> None:
    samples = [sample(n) for n in (9, 2, 5, 7, 2, 30)]
    batches = to_batches(samples, tokens=20)
    assert sum(b.tokens for b in batches) == count_tokens(samples)
    lengths = sorted(int(n) for b in batches for n in b.mask.sum(1))
    assert lengths == [2, 2, 5, 7, 9, 30]
    for batch in batches:
        assert batch.ids.shape == batch.mask.shape == batch.scored.shape
        assert batch.ids.numel() <= 20 or batch.ids.shape[0] == 1
        assert torch.equal(batch.mask.bool(), batch.ids > 0), "padding on the right"
        assert bool((batch.mask[:, 1:] <= batch.mask[:, :-1]).all())
        assert not bool((batch.scored & ~batch.mask.bool()).any())
