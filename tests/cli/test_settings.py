"""Options from files, by ``--set``, and from presets."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import as_json, fails, run
from safetensors.torch import load_file

STEPS = {"steps": 2, "batch_size": 4, "max_length": 40}


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def written(out: Path) -> Any:
    return json.loads((out / "gateskip_config.json").read_text())


def test_fit_from_a_yaml_file(folder: Path, tmp_path: Path) -> None:
    config = write(
        tmp_path / "fit.yaml",
        f"""
        model: {folder / "base"}
        data: {folder / "data.jsonl"}
        out: {tmp_path / "out"}
        compensation-rank: 4
        max_tokens: 1100
        gate:
          rank: 3
          gate_input: raw
          protected_ids: [5, 6]
        """,
    )
    found = as_json("fit", "--config", config)
    gate = written(tmp_path / "out")["gate"]
    assert (gate["rank"], gate["gate_input"], gate["protected_ids"]) == (3, "raw", [5, 6])
    assert gate["compensation_rank"] == 4
    assert 1100 <= found["tokens"] < 1150


def test_what_is_nearer_wins(folder: Path, tmp_path: Path) -> None:
    config = write(
        tmp_path / "fit.toml", f'model = "{folder / "base"}"\nrank = 3\n[gate]\ninit_bias = 2\n'
    )
    common = ("--config", config, "--data", folder / "data.jsonl", "--overwrite")
    run("fit", *common, "--out", tmp_path / "a", "--compensation-rank", 4)
    assert written(tmp_path / "a")["gate"]["rank"] == 3
    assert written(tmp_path / "a")["gate"]["init_bias"] == 2.0
    run("fit", *common, "--out", tmp_path / "a", "--rank", 5, "--set", "gate.init_bias=4.5",
        "--set", "compensation_rank=2")  # fmt: skip
    gate = written(tmp_path / "a")["gate"]
    assert (gate["rank"], gate["init_bias"], gate["compensation_rank"]) == (5, 4.5, 2)
    run("fit", *common, "--out", tmp_path / "a", "--rank", 5, "--set", "gate.rank=6")
    assert written(tmp_path / "a")["gate"]["rank"] == 6
    run("fit", *common, "--out", tmp_path / "a", "--rank", 5, "--set", "rank=7")
    assert written(tmp_path / "a")["gate"]["rank"] == 7


def test_train_from_a_file(folder: Path, tmp_path: Path) -> None:
    config = write(
        tmp_path / "train.yaml",
        """
        steps: 2
        batch_size: 4
        backbone: frozen
        training:
          train_gates: true
          penalty: 1e-2
          penalty_kind: l1
          budget_end: 0.9
        trainer:
          lr_scheduler_type: constant
          learning_rate: 3e-3
          logging_steps: 1
        """,
    )
    given = ("train", folder / "base", "--data", folder / "data.jsonl", "--config", config)
    found = as_json(*given, "--out", tmp_path / "out", "--gates", folder / "gates")
    options = found["options"]
    assert (options["penalty"], options["penalty_kind"], options["budget_end"]) == (0.01, "l1", 0.9)
    assert options["backbone"] == "frozen"
    rates = {entry["learning_rate"] for entry in found["history"] if "loss" in entry}
    assert len(rates) == 1, "no cosine"
    assert found["steps"] == 2
    again = as_json(
        *given, "--out", tmp_path / "more", "--gates", folder / "gates", "--budget", "0.95",
        "--penalty", "0.5", "--set", "training.penalty_kind=l2",
    )["options"]  # fmt: skip
    assert (again["budget_end"], again["penalty"], again["penalty_kind"]) == (0.95, 0.5, "l2")


def test_the_papers_recipe(folder: Path, tmp_path: Path) -> None:
    found = as_json(
        "train", folder / "base", "--data", folder / "data.jsonl", "--out", tmp_path / "out",
        "--preset", "paper", "--steps", 2, "--batch-size", 4, "--max-length", 48,
        "--set", "trainer.warmup_steps=1",
    )  # fmt: skip
    options, saved = found["options"], written(tmp_path / "out")
    assert (options["thresholds"], options["penalty"], options["backbone"]) == (
        "batch",
        0.1,
        "full",
    )
    assert options["gate_learning_rate"] is None, "one rate for everything"
    assert saved["gate"]["kind"] == "vector"
    assert saved["gate"]["kv_source"] == "previous"
    assert saved["policy"]["allocation"] == "uniform"
    assert not any(row.get("skip_rate", 0.0) > 0.5 for row in found["history"])


def test_learned_decisions_as_the_page_says(folder: Path, tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "training.md"
    text = page.read_text(encoding="utf-8")
    text = text[text.index("## Decisions that learn") :]
    line = next(line for line in text.splitlines() if line.startswith("    gateskip train"))
    places: dict[str, Any] = {
        "MODEL": folder / "base", "my.jsonl": folder / "data.jsonl", "my-gates": tmp_path / "out",
        "0.75": "0.8",
    }  # fmt: skip
    given = [places.get(word, word) for word in shlex.split(line)[1:]]
    given += ["--steps", 3, "--batch-size", 4, "--max-length", 48, "--overwrite"]
    given += ["--set", "trainer.warmup_steps=0"]
    heads = []
    for more in (("--set", "training.gate_learning_rate=0.0"), ()):
        found = as_json(*given, *more)
        tensors = load_file(tmp_path / "out" / "gateskip_model.safetensors")
        heads.append({name: t for name, t in tensors.items() if name.endswith("score_weight")})
    options = found["options"]
    assert (options["backbone"], options["budget_end"]) == ("lora", 0.8)
    assert (options["cost_kind"], options["learn_from_skipped"]) == ("absolute", True)
    assert written(tmp_path / "out")["gate"]["importance"] == "head"
    assert any(row.get("expected_cost", 0.0) > 0.0 for row in found["history"])
    fitted, learned = heads
    assert fitted
    assert all(not torch.equal(fitted[name], learned[name]) for name in fitted)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("ranks: 3", "key='ranks' is not one of"),
        ("gate:\n  ranks: 3", "gate field='ranks' is not one of"),
        ("gate:\n  rank: three", "gate.rank='three' is of the wrong type; it takes int"),
        ("gate:\n  kind: [a]", "gate.kind=['a'] is of the wrong type"),
        ("gate: 3", "gate is a section"),
        ("rank: {a: 3}", "rank is an option"),
        ("- 3", "has to be a mapping"),
        ("a: [", "is damaged"),
    ],
)
def test_bad_files(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    match: str,
) -> None:
    config = write(tmp_path / "bad.yaml", text)
    given = ("fit", folder / "base", "--data", folder / "data.jsonl", "--out", tmp_path / "out")
    error = fails(capsys, *given, "--config", config)
    assert match in error
    assert "bad.yaml" in error
    assert not (tmp_path / "out").exists()


def test_bad_assignments(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ("train", folder / "base", "--data", folder / "data.jsonl", "--out", tmp_path / "out")
    assert "must look like KEY=VALUE" in fails(capsys, *given, "--set", "steps")
    assert "Did you mean 'penalty'" in fails(capsys, *given, "--set", "training.penalti=1")
    assert "trainer field='max_steps'" in fails(capsys, *given, "--set", "trainer.max_steps=3")
    assert "Did you mean 'paper'" in fails(capsys, *given, "--preset", "papers")
    assert "cannot be read" in fails(capsys, *given, "--config", tmp_path / "none.yaml")


def test_gates_that_are_there_are_not_changed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("train", folder / "base", "--data", folder / "data.jsonl", "--out", tmp_path / "out")
    message = fails(capsys, *given, "--gates", folder / "gates", "--set", "gate.importance=head")
    assert "importance='head', but" in message
    assert not (tmp_path / "out").exists()


def test_every_command_takes_a_file(folder: Path, tmp_path: Path) -> None:
    config = write(tmp_path / "generate.yaml", "prompt: w1 w2\nmax_new_tokens: 3\n")
    found = as_json("generate", folder / "gates", "--base", folder / "base", "--config", config)
    assert found
    assert "--config" in run("bench", "--help")
