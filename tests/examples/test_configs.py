"""Every example config runs on a tiny model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from test_trl import words
from typer.testing import CliRunner

from gateskip.cli.main import app
from models import VOCAB, tiny

CONFIGS = sorted((Path(__file__).parents[2] / "examples" / "configs").iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("configs")
    tiny().save_pretrained(root / "base")
    words().save_pretrained(root / "base")
    choose = random.Random(0)
    names = [f"w{n}" for n in range(VOCAB - 3)]
    rows = [{"text": " ".join(choose.choices(names, k=48))} for _ in range(24)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_config(folder: Path, tmp_path: Path, config: Path) -> None:
    command = "fit" if config.name.startswith("fit") else "train"
    given = [command, str(folder / "base"), "--config", str(config), "--data",
             str(folder / "data.jsonl"), "--out", str(tmp_path / "out")]  # fmt: skip
    if command == "train":
        given += ["--steps", "2", "--batch-size", "4", "--max-length", "48"]
        given += ["--set", "training.budget_end=0.8"]  # so small a model reaches no further
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, (result.output, result.exception)
    written = json.loads((tmp_path / "out" / "gateskip_config.json").read_text())
    assert written["policy"]
    if "paper" in config.name:
        assert written["gate"]["kind"] == "vector"
