"""The card beside gates that a command made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import fails, run
from huggingface_hub import ModelCard

from hub import TOKEN, serving

# huggingface_hub's own call of its HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_fit_and_train_write_a_card(folder: Path, tmp_path: Path) -> None:
    card = ModelCard.load(folder / "gates" / "README.md")
    assert card.data.library_name == "gateskip"
    assert card.data.base_model == "base"
    assert "tests" not in card.text
    assert str(folder) not in card.text, "no path of this machine"
    policy = json.loads((folder / "gates" / "gateskip_config.json").read_text())["policy"]
    for compute, keep in zip(policy["compute"], policy["keep"], strict=True):
        assert f"| {compute:.3f} | {keep:.3f} |" in card.text
    assert "low_rank of rank 4 on attention and mlp" in card.text

    out = tmp_path / "out"
    given = ("train", folder / "base", "--data", folder / "data.jsonl", "--out", out, "--gates",
             folder / "gates", "--steps", 1, "--batch-size", 4)  # fmt: skip
    run(*given)
    text = ModelCard.load(out / "README.md").text
    assert "LoRA of rank 8" in text
    assert "data.jsonl" in text
    (out / "README.md").write_text("# Mine\n")
    run(*given, "--overwrite")
    assert (out / "README.md").read_text() == "# Mine\n", "somebody else's is left alone"


def test_a_command_pushes_what_it_made(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = ("fit", folder / "base", "--data", folder / "data.jsonl", "--compensation-rank", 4,
             "--push-to-hub", "someone/mine", "--out", tmp_path / "out")  # fmt: skip
    with serving(monkeypatch, tmp_path / "cache") as hub:
        assert "no token" in fails(capsys, *given)
        assert not (tmp_path / "out").exists()
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert "Pushed to" in run(*given)
        (files,) = hub.repos["someone/mine"]
    assert {"README.md", "gateskip_config.json"} <= set(files)
