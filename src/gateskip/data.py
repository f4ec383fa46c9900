"""Text in, token batches out: what ``fit``, ``calibrate`` and ``evaluate`` accept as data.

Accepted: a list (or dataset) of strings, of rows with ``text``, ``prompt``/``completion`` or
``messages``, or of id tensors ``[T]`` or ``[1, T]``. Knows nothing of gates.
Shapes: B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gateskip.errors import DataError

__all__ = [
    "Batch",
    "Sample",
    "encode",
    "read_rows",
    "read_texts",
    "split_samples",
    "take_tokens",
    "text_windows",
    "to_batches",
]

ROW_SHAPES = "'text', 'prompt' and 'completion', or 'messages'"


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One text: ids int64 ``[T]`` and scored bool ``[T]``, True where the loss counts."""

    ids: Tensor
    scored: Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded samples: ids, attention mask and scored, ``[B, T]`` each."""

    ids: Tensor
    mask: Tensor
    scored: Tensor

    @property
    def tokens(self) -> int:
        """Valid tokens."""
        return int(self.mask.sum())


def read_texts(path: str | Path) -> list[Any]:
    """Rows of a ``.jsonl`` file, or the paragraphs' blocks of any other text file.

    Raises:
        DataError: no such file, an empty one, or a malformed line (file and line number).
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"data={str(path)!r} is not a file; give a .jsonl or .txt file.")
    if path.suffix not in (".jsonl", ".json"):
        blocks = [block.strip() for block in path.read_text(encoding="utf-8").split("\n\n")]
        texts: list[Any] = [block for block in blocks if block]
        if not texts:
            raise DataError(f"data={str(path)!r} is empty.")
        return texts
    rows: list[Any] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not valid JSON ({error.msg}).") from error
            _check_row(row, f"{path}, line {number}")
            rows.append(row)
    if not rows:
        raise DataError(f"data={str(path)!r} has no rows.")
    return rows


def read_rows(source: str | Path) -> list[Any]:
    """Rows of a file, or of a dataset by its hub name or folder, ``NAME`` or ``NAME:SPLIT``.

    Raises:
        DataError: neither is there, or a row of unknown shape.
    """
    if Path(source).is_file() or Path(source).suffix in (".jsonl", ".json", ".txt"):
        return read_texts(source)
    name, _, split = str(source).partition(":")
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise DataError(
            f"data={str(source)!r} is not a file; datasets by name need gateskip[train]."
        ) from error
    try:
        rows = list(load_dataset(name, split=split or "train"))
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"data={str(source)!r} is neither a file nor a dataset that loads ({reason})."
        ) from error
    for index, row in enumerate(rows):
        _check_row(row, f"{source}, row {index + 1}")
    if not rows:
        raise DataError(f"data={str(source)!r} has no rows.")
    return rows


def _check_row(row: Any, where: str) -> None:
    if isinstance(row, str):
        return
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: a {type(row).__name__}, but a row needs {ROW_SHAPES}.")
    if "messages" in row:
        if isinstance(row["messages"], list) and row["messages"]:
            return
        raise DataError(f"{where}: 'messages' must be a non-empty list.")
    names = ("prompt", "completion") if "prompt" in row else ("text",)
    for name in names:
        if not isinstance(row.get(name), str):
            keys = ", ".join(map(str, row)) or "nothing"
            raise DataError(f"{where}: a row needs {ROW_SHAPES} as strings; it has {keys}.")


def encode(data: Any, tokenizer: Any = None, max_length: int = 512) -> list[Sample]:
    """Tokenise everything, cut to ``max_length`` tokens; samples under two tokens are dropped.

    Raises:
        DataError: no data, a row of unknown shape, or texts without a tokenizer.
    """
    if isinstance(data, str | Tensor) or not isinstance(data, Iterable):
        raise DataError(
            f"data is a {type(data).__name__}; give a list of texts, rows or id tensors."
        )
    samples = []
    for index, row in enumerate(data):
        sample = _encode_row(row, index, tokenizer)
        if sample.ids.shape[0] >= 2:
            samples.append(Sample(sample.ids[:max_length], sample.scored[:max_length]))
    if not samples:
        raise DataError("data has no sample of at least 2 tokens.")
    return samples


def _encode_row(row: Any, index: int, tokenizer: Any) -> Sample:
    if isinstance(row, Tensor):
        if row.dim() not in (1, 2) or (row.dim() == 2 and row.shape[0] != 1):
            raise DataError(f"data[{index}] has shape {tuple(row.shape)}; give [T] or [1, T].")
        ids = row.reshape(-1).long().cpu()
        return Sample(ids, torch.ones_like(ids, dtype=torch.bool))
    _check_row(row, f"data[{index}]")
    if tokenizer is None:
        raise DataError(f"data[{index}] is text, so tokenizer= is needed.")
    if isinstance(row, str):
        row = {"text": row}
    if "text" in row and "prompt" not in row:
        ids = _ids(tokenizer, row["text"])
        return Sample(ids, torch.ones_like(ids, dtype=torch.bool))
    if "messages" in row:
        messages: list[Any] = row["messages"]
    else:
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    if getattr(tokenizer, "chat_template", None):
        head = tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True
        )
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    else:
        head = "\n".join(m["content"] for m in messages[:-1]) + "\n"
        whole = head + messages[-1]["content"]
    ids, prefix = _ids(tokenizer, whole), _ids(tokenizer, head)
    scored = torch.arange(ids.shape[0]) >= prefix.shape[0]
    return Sample(ids, scored)


def _ids(tokenizer: Any, text: str) -> Tensor:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def take_tokens(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """The first samples with together at most about ``limit`` tokens."""
    taken, total = [], 0
    for sample in samples:
        if limit is not None and total >= limit:
            break
        taken.append(sample)
        total += sample.ids.shape[0]
    return taken


def count_tokens(samples: Sequence[Sample]) -> int:
    """Tokens of all samples."""
    return sum(sample.ids.shape[0] for sample in samples)


def text_windows(data: Any, tokenizer: Any, shape: tuple[int, int], most: int = 1) -> Tensor:
    """Texts one after another as ids, int64 ``[V, B, T]``: up to ``most`` windows.

    Raises:
        DataError: fewer than B·T tokens.
    """
    wanted = shape[0] * shape[1]
    flat = torch.cat([sample.ids for sample in encode(data, tokenizer, max_length=wanted * most)])
    if flat.shape[0] < wanted:
        raise DataError(
            f"texts have {flat.shape[0]} tokens; {shape[0]} rows of {shape[1]} tokens need "
            f"{wanted}. Give more text, or a smaller batch, prompt or number of new tokens."
        )
    count = min(flat.shape[0] // wanted, most)
    return flat[: count * wanted].view(count, *shape)


def split_samples(samples: Sequence[Sample], every: int) -> tuple[list[Sample], list[Sample]]:
    """(all others, every ``every``-th sample)."""
    rest = [s for i, s in enumerate(samples) if i % every != every - 1]
    return rest, [s for i, s in enumerate(samples) if i % every == every - 1]


def to_batches(samples: Sequence[Sample], tokens: int = 2048) -> list[Batch]:
    """Batches of at most about ``tokens`` padded tokens, samples of like length together."""
    ordered = sorted(samples, key=lambda s: s.ids.shape[0])
    groups: list[list[Sample]] = [[]]
    for sample in ordered:
        if groups[-1] and (len(groups[-1]) + 1) * sample.ids.shape[0] > tokens:
            groups.append([])
        groups[-1].append(sample)
    return [_pad(group) for group in groups]


def _pad(group: Sequence[Sample]) -> Batch:
    shape = (len(group), max(s.ids.shape[0] for s in group))
    ids = torch.zeros(shape, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    scored = torch.zeros(shape, dtype=torch.bool)
    for row, sample in enumerate(group):
        n = sample.ids.shape[0]
        ids[row, :n], mask[row, :n], scored[row, :n] = sample.ids, 1, sample.scored
    return Batch(ids, mask, scored)
