"""The Python of docs/decoding.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import gateskip
from models import gated, random_ids, with_table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "decoding.md"


def test_the_python_of_the_page() -> None:
    model = with_table(gated("llama", compensation="low_rank"))
    model.generation_config.max_new_tokens = 8
    ids = random_ids(1, 9)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {
        "gateskip": gateskip, "model": model,
        "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    }  # fmt: skip
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    assert isinstance(names["stats"], gateskip.DecodingStats)
