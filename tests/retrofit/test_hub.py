"""Pushing gates to a hub and loading them by name, against a stub of its HTTP interface."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub import hub

import gateskip
from gateskip.errors import CheckpointError
from models import gated, random_ids, with_table

PUSH = """
import gateskip, sys
print(gateskip.push_to_hub(sys.argv[1], "someone/gates", private=True, token="hf_x"))
"""
LOAD = """
import sys, torch, gateskip
from transformers import AutoModelForCausalLM
ids = torch.load(sys.argv[2])
model = gateskip.load("someone/gates", base=sys.argv[1], revision="main")
with torch.no_grad(), gateskip.budget(model, keep=0.6):
    torch.save(model(ids).logits, sys.argv[3])
"""


def program(text: str, *arguments: object, **environment: str) -> Any:
    """Another process, since the hub's address is read when huggingface_hub is imported."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)], env=kept | environment,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_push_and_load(tmp_path: Path) -> None:
    import torch

    model = with_table(gated(compensation="low_rank"))
    ids = random_ids(2, 12)
    with torch.no_grad(), gateskip.budget(model, keep=0.6):
        wanted = model(ids).logits
    gateskip.save(model, tmp_path / "gates")
    (tmp_path / "gates" / "README.md").write_text("---\nlibrary_name: gateskip\n---\n# Gates\n")
    (tmp_path / "gates" / "secret.txt").write_text("not to be sent")
    gateskip.detach(model).save_pretrained(tmp_path / "base")
    torch.save(ids, tmp_path / "ids.pt")
    with hub() as server:
        around = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "cache")}
        pushed = program(PUSH, tmp_path / "gates", **around)
        assert pushed.returncode == 0, pushed.stderr
        assert "someone/gates/commit/" in pushed.stdout
        files = server.repositories["someone/gates"]
        assert set(files) == {
            "README.md", "gateskip_config.json", "gateskip_model.safetensors",
        }  # fmt: skip
        assert server.private["someone/gates"] is True
        assert server.messages == ["Upload gates"]
        loaded = program(
            LOAD, tmp_path / "base", tmp_path / "ids.pt", tmp_path / "out.pt", **around
        )
        assert loaded.returncode == 0, loaded.stderr
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), wanted, atol=1e-5, rtol=1e-5)


def test_what_the_hub_lacks(tmp_path: Path) -> None:
    gateskip.save(with_table(gated()), tmp_path / "gates")
    last = "import gateskip; gateskip.load('no/gates', base='x')"
    with hub() as server:
        around = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "cache")}
        missing = program(last, **around)
        no_token = program(
            "import sys, gateskip; gateskip.push_to_hub(sys.argv[1], 'a/b')", tmp_path / "gates",
            **around,
        )  # fmt: skip
    gone = program(last, **around)
    assert "CheckpointError: path='no/gates' is no local folder" in missing.stderr
    assert "CheckpointError: path='no/gates' is no local folder" in gone.stderr
    assert "OutputError: repo_id='a/b'" in no_token.stderr


def test_only_whole_gates_are_sent(tmp_path: Path) -> None:
    gateskip.save(with_table(gated()), tmp_path)
    weights = tmp_path / "gateskip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="damaged"):
        gateskip.push_to_hub(tmp_path, "a/b")


FIT = """
import sys
from gateskip.cli.main import main
main(["fit", sys.argv[1], "--data", sys.argv[2], "--out", sys.argv[3], "--compensation-rank", "4",
      "--push-to-hub", sys.argv[4]])
"""


def test_a_command_pushes_what_it_made(tmp_path: Path) -> None:
    import json
    import random

    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    from models import VOCAB, tiny

    tiny().save_pretrained(tmp_path / "base")
    split = Tokenizer(WordLevel({f"w{n}": n for n in range(VOCAB)}, unk_token="w0"))
    split.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=split, pad_token="w0").save_pretrained(
        tmp_path / "base"
    )
    choose = random.Random(0)
    rows = [{"text": " ".join(f"w{choose.randrange(VOCAB)}" for _ in range(50))} for _ in range(24)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = (tmp_path / "base", tmp_path / "d.jsonl", tmp_path / "out")
    with hub() as server:
        around = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "cache")}
        early = program(FIT, *given, "someone/mine", **around)
        assert "needs a token" in early.stderr
        assert not (tmp_path / "out").exists()
        done = program(FIT, *given, "someone/mine", **around, HF_TOKEN="hf_x")
        assert done.returncode == 0, done.stderr
        assert "README.md" in server.repositories["someone/mine"]
