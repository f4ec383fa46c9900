"""README's Python runs as it stands, on a tiny model in the place of the named one."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import gateskip
from models import VOCAB, gated, random_ids, tiny

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.filterwarnings("ignore")
def test_the_python_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    base = tmp_path / "base"
    tiny().save_pretrained(base)
    words = ["<pad>", *(f"w{n}" for n in range(VOCAB - 6)), "The", "tide", "rises", "because"]
    split = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    split.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=split, pad_token="<pad>")
    fast.model_input_names = ["input_ids", "attention_mask"]
    fast.save_pretrained(base)
    choose = random.Random(0)
    texts = [" ".join(choose.choices(words[1:], k=50)) for _ in range(30)]
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(base))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"texts": texts}
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "my-gates" / "gateskip_config.json").is_file()
    assert isinstance(names["model"], torch.nn.Module)


def test_the_python_of_the_page_on_families(monkeypatch: pytest.MonkeyPatch) -> None:
    from gateskip.retrofit.families import FAMILIES

    monkeypatch.setattr(FAMILIES, "_targets", dict(FAMILIES._targets))
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, "families.md", "exec"), names)
    for name in FAMILIES.names():
        if name != "starcoder2":
            assert name in page, f"docs/families.md does not name {name}"


@pytest.mark.filterwarnings("ignore")
def test_the_python_of_the_page_on_calibration() -> None:
    page = (ROOT / "docs" / "calibration.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    texts = [random_ids(1, 60, seed=n) for n in range(40)]
    names: dict[str, object] = {
        "gateskip": gateskip, "model": gated(init_std=0.5), "texts": texts, "tokenizer": None,
        "ids": random_ids(2, 8),
    }  # fmt: skip
    for code in blocks:
        exec(compile(code, "calibration.md", "exec"), names)
    assert len(blocks) == 2


def test_the_makefile_has_what_the_readme_names() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"make ([a-z]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert {"demo", "test"} <= named <= targets
    assert {"setup", "fix", "bench", "docs"} <= targets
