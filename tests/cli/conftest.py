"""What tests of commands share."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from commands import as_json
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from models import LAYERS, VOCAB, tiny

SPECIAL = ["<pad>", "<s>", "</s>"]
WORDS = [f"w{n}" for n in range(VOCAB - len(SPECIAL))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, a model with a tokenizer; data.jsonl; gates/, made by the command itself."""
    root = tmp_path_factory.mktemp("cli")
    tiny().save_pretrained(root / "base")
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(root / "base")
    choose = random.Random(0)
    rows = [{"text": " ".join(choose.choices(WORDS, k=48))} for _ in range(24)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = as_json(
        "fit", root / "base", "--data", root / "data.jsonl", "--out", root / "gates",
        "--rank", 4, "--compensation-rank", 4,
    )  # fmt: skip
    assert len(found["r2"]) == 2 * LAYERS
    return root
