"""The training examples run, on a tiny model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from processes import launched, two_processes
from test_trl import words
from transformers import AutoModelForCausalLM

import gateskip
from models import VOCAB, random_ids, tiny

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "train"
CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}w0 {{ m.content }} w1 {% else %}"
    "{% generation %}{{ m.content }} </s>{% endgeneration %}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("train")
    config = tiny().config
    config.intermediate_size = 128  # 4-bit blocks are 64 wide
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "base")
    tokenizer = words()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(root / "base")
    choose = random.Random(0)
    names = [f"w{n}" for n in range(VOCAB - 3)]

    def said(count: int) -> str:
        return " ".join(choose.choices(names, k=count))

    rows = [
        {"messages": [{"role": "user", "content": said(12)},
                      {"role": "assistant", "content": said(30)}]}
        for _ in range(40)
    ]  # fmt: skip
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def works(folder: Path, out: Path) -> None:
    model = gateskip.load(out, base=folder / "base")
    with torch.no_grad(), gateskip.budget(model, compute=0.85), gateskip.trace(model) as trace:
        model(random_ids(2, 30))
    assert trace.ledger.skip_rate > 0.03


@pytest.mark.parametrize("processes", [1, 2])
def test_sft_chat(folder: Path, tmp_path: Path, processes: int) -> None:
    launch = two_processes() if processes == 2 else ()
    launched(*launch, EXAMPLES / "sft_chat.py", folder / "base", folder / "rows.jsonl",
        tmp_path / "out", "--steps", 2)  # fmt: skip
    works(folder, tmp_path / "out")


def test_frozen_4bit(folder: Path, tmp_path: Path) -> None:
    launched(EXAMPLES / "frozen_4bit.py", folder / "base", folder / "rows.jsonl", tmp_path / "out",
        "--steps", 2)  # fmt: skip
    works(folder, tmp_path / "out")
