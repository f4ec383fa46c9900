"""The experiment on kinds of token: gates at every budget, and the control."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import gateskip
from models import VOCAB, random_ids, tiny

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
sys.path[:0] = [str(EXPERIMENTS)]

import kinds  # noqa: E402


def test_gates_and_the_control(tmp_path: Path) -> None:
    words = ["<pad>", "<s>", "</s>", ",", *(f"w{n}" for n in range(VOCAB - 4))]
    fast = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<pad>"))
    fast.pre_tokenizer = Whitespace()
    model = tiny()
    model.save_pretrained(tmp_path / "base")
    PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>").save_pretrained(
        tmp_path / "base"
    )
    gateskip.attach(model)
    ids = random_ids(24, 48)
    gateskip.fit(model, list(ids))
    gateskip.calibrate(model, list(ids))
    gateskip.save(model, tmp_path / "gates")
    texts = [{"text": " ".join(words[int(i)] for i in row)} for row in ids]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    kinds.main([
        str(tmp_path / "out.json"), "--gates", str(tmp_path / "gates"), "--model",
        str(tmp_path / "base"), "--data", str(tmp_path / "data.jsonl"), "--compute", "0.9", "0.8",
    ])  # fmt: skip
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(row["method"], row["compute"]) for row in found["rows"]] == [
        ("gateskip", 0.9), ("gateskip", 0.8), (kinds.CONTROL, 0.8)
    ]  # fmt: skip
    assert found["rows"][1]["skip_rate"] > found["rows"][0]["skip_rate"] > 0.0
    assert found["header"]["data"] == "data.jsonl"
