"""Rows in, padded batches with labels out.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers.trainer_pt_utils import LengthGroupedSampler

from gateskip.data import Sample, encode
from gateskip.errors import DataError

__all__ = ["Collator", "SeededLengths", "TokenDataset", "make_dataset"]

IGNORED = -100


class TokenDataset(Dataset[dict[str, Tensor]]):
    """Samples as ``input_ids`` and ``labels`` (−100 where the loss does not count)."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        labels = sample.ids.masked_fill(~sample.scored, IGNORED)
        return {"input_ids": sample.ids, "labels": labels, "length": sample.ids.shape[0]}


def make_dataset(data: Any, tokenizer: Any = None, max_length: int = 512) -> TokenDataset:
    """A training dataset of texts, rows or id tensors (see ``gateskip.data``).

    Of ``prompt`` and ``completion``, and of ``messages``, only the answer is labelled.

    Raises:
        DataError: bad rows, or none whose answer fits into ``max_length``.
    """
    samples = encode(data, tokenizer, max_length)
    usable = [sample for sample in samples if bool(sample.scored[1:].any())]
    if not usable:
        raise DataError(
            f"data has no usable row: none of {len(samples)} has an answer within "
            f"max_length={max_length} tokens."
        )
    return TokenDataset(usable)


@dataclasses.dataclass(frozen=True, slots=True)
class Collator:
    """Pads on the right; the mask, not the pad token, says what is real."""

    pad_token_id: int = 0

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        length = max(len(f["input_ids"]) for f in features)
        shape = (len(features), length)
        ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.int64)
        for row, feature in enumerate(features):
            n = len(feature["input_ids"])
            ids[row, :n] = torch.as_tensor(feature["input_ids"])
            labels[row, :n] = torch.as_tensor(feature["labels"])
            mask[row, :n] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class SeededLengths(LengthGroupedSampler):  # type: ignore[misc]
    """Groups of like length, the same in every run of an epoch."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before every epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed * 100_003 + self.epoch)
        return super().__iter__()
