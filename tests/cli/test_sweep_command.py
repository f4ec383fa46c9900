"""``gateskip sweep`` end to end."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from commands import fails, run


def test_two_gate_sets(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder / "gates", tmp_path / "others")
    out = tmp_path / "out"
    given = (
        "sweep", folder / "gates", tmp_path / "others", "--data", folder / "data.jsonl", "--out",
        out, "--compute", 0.9, "--keep", 0.8, "--prompt-tokens", 16, "--new-tokens", 2,
        "--repeats", 1,
    )  # fmt: skip
    said = run(*given)
    assert "gates" in said
    assert "others" in said
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    assert [(row["gates"], row["budget"]) for row in rows] == [
        ("dense", ""), ("gates", "keep=0.8"), ("gates", "compute=0.9"),
        ("others", "keep=0.8"), ("others", "compute=0.9"),
    ]  # fmt: skip
    assert rows[1]["loss"] == rows[3]["loss"]
    with (out / "sweep.csv").open() as stream:
        assert [row["budget"] for row in csv.DictReader(stream)] == [row["budget"] for row in rows]
    assert {path.name for path in out.iterdir()} == {
        "sweep.jsonl", "sweep.json", "sweep.csv", "sweep.png", "sweep.svg",
    }  # fmt: skip
    assert "other max_length" in fails(capsys, *given, "--max-length", 20)


def test_bad_input(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gates, rest = folder / "gates", ("--data", folder / "data.jsonl", "--out", tmp_path / "out")
    assert "no folder of saved gates" in fails(capsys, "sweep", gates, tmp_path / "none", *rest)
    assert "two gate sets" in fails(capsys, "sweep", gates, gates, *rest)
    (tmp_path / "empty.jsonl").touch()
    empty = ("--data", tmp_path / "empty.jsonl", "--out", tmp_path / "out")
    assert "no rows" in fails(capsys, "sweep", gates, *empty)
    assert not (tmp_path / "out").exists()
