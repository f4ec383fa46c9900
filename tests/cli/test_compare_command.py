"""``gateskip compare`` end to end."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from commands import as_json, fails, run

from models import tiny

SMALL = ("--set", "gate.rank=4", "--set", "gate.compensation_rank=4", "--max-tokens", 300)


def given(folder: Path, base: str = "base") -> tuple[object, ...]:
    data = folder / "data.jsonl"
    more = folder / "more.jsonl"  # thresholds take a third
    more.write_text(data.read_text() * 3)
    return ("compare", folder / base, "--data", data, "--fit-data", more, *SMALL)


def test_methods_and_saved_gates(folder: Path, tmp_path: Path) -> None:
    more = (
        "--methods", "gateskip, random,every_second", "--compute", 0.9, "--keep", 0.8, "--seeds",
        "0,1", "--gates", folder / "gates", "--dtype", "float32",
    )  # fmt: skip
    out, plot = tmp_path / "found.json", tmp_path / "found.svg"
    said = run(*given(folder), *more, "--json", out, "--plot", plot)
    for word in ("random", "every_second", "gates", "compute=0.9", "keep=0.8", "decoder MACs", "±"):
        assert word in said
    found = json.loads(out.read_text())
    assert found["header"]["command"].startswith("gateskip compare --model base --data data.jsonl")
    assert [(row["method"], row["seed"], row["budget"]) for row in found["rows"]] == [
        ("dense", None, ""), ("gateskip", None, "keep=0.8"), ("gateskip", None, "compute=0.9"),
        ("random", 0, "keep=0.8"), ("random", 0, "compute=0.9"), ("random", 1, "keep=0.8"),
        ("random", 1, "compute=0.9"), ("every_second", None, "keep=0.8"),
        ("every_second", None, "compute=0.9"), ("gates", None, "keep=0.8"),
        ("gates", None, "compute=0.9"),
    ]  # fmt: skip
    assert all(row["error"] is None and row["loss"] > 0 for row in found["rows"])
    # The same gates by `gateskip fit`, and the dense row is that of `gateskip eval`.
    (dense, _) = as_json(
        "eval", folder / "gates", "--base", folder / "base", "--data", folder / "data.jsonl",
        "--max-tokens", 300, "--dtype", "float32",
    )["rows"]  # fmt: skip
    assert dense["loss"] == found["rows"][0]["loss"]
    text = " ".join(t for t in ElementTree.parse(plot).getroot().itertext())
    for label in ("gateskip", "random", "every_second", "gates", "dense", "MACs saved", "loss"):
        assert label in text
    before = plot.read_bytes()
    assert as_json(*given(folder), *more, "--plot", plot)["rows"] == found["rows"]
    assert plot.read_bytes() == before


def test_what_cannot_be_measured_is_a_row(folder: Path, tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    for file in (folder / "base").glob("tokenizer*"):
        (tmp_path / "gpt2" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "data.jsonl").write_bytes((folder / "data.jsonl").read_bytes())
    names = ("--methods", "gate_norm,every_second", "--compute", 0.8, "--compute", 0.05)
    out = tmp_path / "found.json"
    said = " ".join(run(*given(tmp_path, "gpt2"), *names, "--json", out).split())
    assert said.count("not measured") == 2
    assert "warning: gate_norm: method 'gate_norm' reads q_proj" in said
    assert "warning: every_second: " in said
    assert "floor" in said
    errors = [bool(row["error"]) for row in json.loads(out.read_text())["rows"]]
    assert errors == [False, True, False, True]


def test_bad_input(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = given(folder)
    for more, message in (
        (("--methods", "random,gate_nrom"), "Did you mean 'gate_norm'?"),
        (("--methods", "random,random"), "name of two rows"),
        (("--methods", ","), "compares nothing"),
        (("--seeds", "0,x"), "seeds='0,x' must be"),
        (("--seeds", "1,1"), "seeds='1,1' must be"),
        (("--compute", 1.5), "in (0, 1]"),
        (("--gates", tmp_path), "no folder of saved gates"),
        (("--gates", folder / "gates", "--gates", folder / "gates"), "two gate sets"),
        (("--plot", tmp_path / "plot.pdf"), "must end in .png or .svg"),
        (("--plot", tmp_path / "none" / "plot.png"), "does not exist"),
        (("--json", tmp_path), "is a folder"),
        (("--set", "gate.kin=1"), "Did you mean 'kind'?"),
        (("--data", tmp_path / "none.jsonl"), "is not a file"),
        (("--dtype", "float8"), "dtype='float8'"),
    ):  # fmt: skip
        assert message in fails(capsys, *base, *more)
    missing = (*base[:1], tmp_path / "no", *base[2:])
    assert "could not be loaded" in fails(capsys, *missing)
