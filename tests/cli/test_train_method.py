"""``gateskip train-method`` end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import as_json, fails, run

SMALL = ("--batch-size", 4, "--save-every", 1, "--learning-rate", 0.01)


def given(folder: Path, out: Path, method: str, *more: object) -> tuple[object, ...]:
    start = ("train-method", folder / "base", method, "--data", folder / "data.jsonl")
    return (*start, "--out", out, *SMALL, *more)


def losses(found: Any) -> list[list[float]]:
    return [[e["loss"] for e in stage["history"] if "loss" in e] for stage in found["stages"]]


def test_stages_are_trained_resumed_and_compared(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "skipgpt"
    start = given(folder, out, "skipgpt", "--steps", 5, "--budget", 0.8)
    found = as_json(*start)
    assert [stage["steps"] for stage in found["stages"]] == [2, 3]
    assert found["recipe"]["options"]["router_steps"] == 0.5
    routes, adapts = losses(found)
    assert len(routes) == 2
    assert len(adapts) == 3
    card = (out / "README.md").read_text()
    assert "gateskip train-method base skipgpt --data data.jsonl" in card
    assert "| skipgpt |" in card
    gates = (out / "gateskip_model.safetensors").read_bytes()

    data = folder / "data.jsonl"
    more = tmp_path / "more.jsonl"  # thresholds take a third
    more.write_text(data.read_text() * 3)
    rows = as_json(
        "compare", folder / "base", "--data", data, "--fit-data", more, "--methods", "random",
        "--gates", out, "--compute", 0.8,
        "--max-tokens", 300,
    )["rows"]  # fmt: skip
    assert [(row["method"], row["error"]) for row in rows][-1] == ("skipgpt", None)
    assert rows[-1]["skip_rate"] > 0.0

    # Cut off within the last stage, before its first checkpoint, and within the first one.
    for gone in (
        ("checkpoints/stage-2/checkpoint-3",),
        ("checkpoints/stage-2",),
        ("checkpoints/stage-2", "stages", "checkpoints/stage-1/checkpoint-2"),
    ):
        for name in (*gone, "gateskip_model.safetensors"):
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        again = as_json(*start, "--resume")
        assert losses(again)[-1] == adapts
        assert (len(again["stages"]) == 2) == ("stages" in gone)
        assert (out / "gateskip_model.safetensors").read_bytes() == gates


def test_what_is_left_of_a_smaller_model_trains(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "shortgpt"
    found = as_json(*given(folder, out, "shortgpt", "--steps", 4, "--budget", 0.7))
    (stage,) = found["stages"]
    assert stage["floor"] < 0.7
    (curve,) = losses(found)
    assert curve[-1] < curve[0]
    start, end = (
        json.loads((path / "gateskip_config.json").read_text()) for path in (out / "start", out)
    )
    assert start["policy"] == end["policy"], "what is removed stays removed"
    assert end["method"] == "shortgpt"


def test_a_method_that_cannot_save_so_much_says_how(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    start = given(folder, out, "mixture_of_depths", "--steps", 1, "--budget", 0.35)
    assert "every=1" in fails(capsys, *start)
    assert not out.exists()
    more = ("--set", "trainer.data_seed=3", "--set", "trainer.warmup_steps=0")
    run(*start, "--set", "method.every=1", *more)
    assert (out / "gateskip_config.json").is_file()
    other = fails(capsys, *start, "--set", "method.every=2", "--resume")
    assert "begun with" in other
    assert "'every': 1" in other


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("skipgt",), "'skipgpt'"),
        (("skipgpt", "--set", "method.evry=1"), "evry"),
        (("skipgpt", "--set", "method.noise=much"), "method.noise='much' is of the wrong type"),
        (("skipgpt", "--budget", 1.5), "compute=1.5"),
        (("skipgpt", "--backbone", "frozen"), "backbone='frozen' must be 'lora' or 'full'"),
        (("skipgpt", "--learning-rate", 0), "learning_rate=0.0"),
        (("skipgpt", "--set", "trainer.learning_rate=-1"), "learning_rate=-1"),
        (("skipgpt", "--steps", 1), "steps=1 are too few for 2 stages"),
        (("skipgpt", "--resume"), "no training of a method to resume"),
    ],
)
def test_bad_input(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    match: str,
) -> None:
    data = ("--data", folder / "data.jsonl", "--out", tmp_path / "out")
    assert match in fails(capsys, "train-method", folder / "base", *arguments[:1], *data,
                          *arguments[1:])  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_options_are_checked_before_a_model_is_loaded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = fails(
        capsys, "train-method", tmp_path / "no-model", "skipgpt", "--data", folder / "data.jsonl",
        "--out", tmp_path / "out", "--steps", 1,
    )  # fmt: skip
    assert "steps=1 are too few for 2 stages of 'skipgpt'" in said
