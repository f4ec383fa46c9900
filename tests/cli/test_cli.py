"""Every command on a tiny model, and one line per error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import as_json, fails, run
from typer.testing import CliRunner

from gateskip.cli.main import app, main
from gateskip.config import GateConfig
from gateskip.costs import break_even_skip_rate, gate_parameters
from models import LAYERS, tiny


def test_fit_wrote_gates(folder: Path) -> None:
    assert {p.name for p in (folder / "gates").iterdir()} == {
        "README.md",
        "gateskip_config.json",
        "gateskip_model.safetensors",
    }
    saved = json.loads((folder / "gates" / "gateskip_config.json").read_text())
    assert saved["gate"]["rank"] == 4
    assert saved["policy"]["tokens"] >= 1_000


TRAIN = (
    "--steps", 3, "--batch-size", 4, "--budget", 0.8, "--lora-rank", 2, "--save-every", 2,
    "--learning-rate", 0.01,
)  # fmt: skip


def test_train_from_gates_evaluate_and_resume(folder: Path, tmp_path: Path) -> None:
    data, out = folder / "data.jsonl", tmp_path / "trained"
    start = ("train", folder / "base", "--data", data, "--out", out)
    found = as_json(*start, "--gates", folder / "gates", *TRAIN)
    assert found["steps"] == 3
    assert found["floor"] < 0.8
    assert "gateskip train" in (out / "README.md").read_text()
    losses = [entry["loss"] for entry in found["history"] if "loss" in entry]
    assert len(losses) == 3
    assert {"gateskip_config.json", "gateskip_model.safetensors"} <= {p.name for p in out.iterdir()}
    rows = as_json("eval", out, "--data", data, "--compute", 0.9, "--max-tokens", 300, "--seed", 5)
    dense, skipping = rows["rows"]
    assert (dense["arm"], dense["seed"]) == ("dense", None)
    assert (skipping["arm"], skipping["seed"], skipping["data"]) == ("gateskip", 5, "data")
    plain = as_json("eval", folder / "gates", "--data", data, "--max-tokens", 300)["rows"][0]
    assert dense["loss"] == pytest.approx(plain["loss"]), "dense is the model before training"
    control = as_json("eval", out, "--data", data, "--max-tokens", 300, "--arm", "control")["rows"]
    assert control[1]["arm"] == "control"
    assert control[1]["loss"] != pytest.approx(dense["loss"])
    # Interrupted while calibrating at the end, then in the last step.
    for last, left in (("checkpoint-3", 0), ("checkpoint-2", 1)):
        assert (out / "checkpoints" / last).is_dir()
        (out / "gateskip_model.safetensors").unlink()
        again = as_json(*start, *TRAIN, "--resume")
        assert again["steps"] == 3
        assert (again["tokens"] > 0) == bool(left)
        assert again["tokens"] < found["tokens"]
        assert [e["loss"] for e in again["history"] if "loss" in e] == losses
        assert (out / "gateskip_model.safetensors").is_file()
        shutil.rmtree(out / "checkpoints" / "checkpoint-3")


@pytest.mark.parametrize("arm", ["control", "random"])
def test_train_arms(folder: Path, tmp_path: Path, arm: str) -> None:
    found = as_json(
        "train", folder / "base", "--data", folder / "data.jsonl", "--out", tmp_path / "out",
        "--arm", arm, "--kind", "scalar", *TRAIN,
    )  # fmt: skip
    skipped = [entry.get("skip_rate", 0.0) for entry in found["history"]]
    assert (max(skipped) > 0) == (arm == "random")


def test_train_a_full_backbone(folder: Path, tmp_path: Path) -> None:
    found = as_json(
        "train", folder / "base", "--data", folder / "data.jsonl", "--out", tmp_path / "out",
        "--gates", folder / "gates", "--steps", 2, "--backbone", "full",
    )  # fmt: skip
    assert found["steps"] == 2
    assert (tmp_path / "out" / "gateskip_backbone.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--arm", "dense"), "arm='dense'"),
        (("--backbone", "lorra"), "backbone='lorra'"),
        (("--budget", "1.5"), "budget_end=1.5"),
        (("--resume",), "no training to resume"),
        (("--data", "no/such"), "neither a file nor a dataset"),
        (("--data", "no.jsonl"), "not a file"),
        (("--learning-rate", "0"), "learning_rate=0.0"),
    ],
)
def test_train_bad_input(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Any, match: str
) -> None:
    given = ("--data", folder / "data.jsonl", "--out", tmp_path / "out", *arguments)
    assert match in fails(capsys, "train", folder / "base", *given)
    assert not (tmp_path / "out").exists()


def test_an_arm_is_what_the_gates_are(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--data", folder / "data.jsonl")
    start = ("train", folder / "base", *data, "--out", tmp_path / "out", "--gates")
    gates = folder / "gates"
    assert "importance='mean_logit'" in fails(capsys, *start, gates, "--arm", "random")
    assert "gates with 'low_rank'" in fails(capsys, *start, gates, "--kind", "vector")
    assert "importance='mean_logit'" in fails(capsys, "eval", gates, *data, "--arm", "random")


def test_an_overwritten_training_is_not_resumed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from gateskip.training import recipe

    out = tmp_path / "out"
    start = ("train", folder / "base", "--data", folder / "data.jsonl", "--out", out)
    run(*start, "--gates", folder / "gates", *TRAIN)
    before = (out / "gateskip_model.safetensors").read_bytes()

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "start", interrupted)
    result = CliRunner().invoke(app, [str(a) for a in (*start, *TRAIN, "--overwrite")])
    assert result.exit_code != 0
    monkeypatch.undo()
    assert "no training to resume" in fails(capsys, *start, *TRAIN, "--resume")
    assert (out / "gateskip_model.safetensors").read_bytes() == before, "nothing is lost"


def test_train_says_when_there_is_no_chat_template(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    given = ("--data", tmp_path / "chat.jsonl", "--out", tmp_path / "out")
    assert "chat template" in fails(capsys, "train", folder / "base", *given)


def test_train_on_a_dataset_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    text = (folder / "data.jsonl").read_text()
    (tmp_path / "set" / "train.jsonl").write_text(text)
    found = as_json(
        "train", folder / "base", "--data", tmp_path / "set", "--out", tmp_path / "out",
        "--gates", folder / "gates", *TRAIN,
    )  # fmt: skip
    assert found["steps"] == 3


def test_calibrate(folder: Path, tmp_path: Path) -> None:
    found = as_json(
        "calibrate", folder / "gates", "--data", folder / "data.jsonl", "--out", tmp_path / "new",
        "--allocation", "uniform",
    )  # fmt: skip
    assert found["policy"]["allocation"] == "uniform"
    assert (tmp_path / "new" / "gateskip_config.json").is_file()


def test_generate(folder: Path) -> None:
    found = as_json(
        "generate", folder / "gates", "--prompt", "w1 w2 w3", "--keep", 0.7,
        "--max-new-tokens", 5,
    )  # fmt: skip
    assert 1 <= found["new_tokens"] <= 5
    assert found["budget"] == {"keep": 0.7}
    assert found["skip_rate"] > 0
    plain = run("generate", folder / "gates", "--prompt", "w1 w2", "--max-new-tokens", 2)
    assert "skipped 0.0%" in plain


def test_generate_speculative(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ("generate", folder / "gates", "--prompt", "w1 w2 w3", "--keep", 0.9,
             "--max-new-tokens", 12)  # fmt: skip
    plain = as_json(*start)
    assert plain["speculative"] is None
    for draft in ("0.7", "lookup", "dense", "exit:1"):
        found = as_json(*start, "--speculative", "--draft", draft, "--draft-tokens", 3)
        assert found["text"] == plain["text"]
        assert found["speculative"]["new_tokens"] == found["new_tokens"] - 1
    assert "drafted tokens were right" in run(*start, "--speculative")
    store = ("--draft-store", folder / "data.jsonl")
    found = as_json(*start, "--speculative", "--draft", "lookup", *store)
    assert found["text"] == plain["text"]
    assert "--draft-store" in fails(capsys, *start, *store)
    assert "--draft 'half'" in fails(capsys, *start, "--speculative", "--draft", "half")
    assert "draft_tokens=0" in fails(capsys, *start, "--speculative", "--draft-tokens", 0)
    assert "layers=99" in fails(capsys, *start, "--speculative", "--draft", "exit:99")


def test_tune_draft(folder: Path) -> None:
    arguments = (
        "tune-draft", folder / "gates", "--data", folder / "data.jsonl", "--keep", 0.9,
        "--draft-keep", 0.7, "--draft-tokens", 2, "--new-tokens", 6, "--max-prompts", 2,
        "--repeats", 1,
    )  # fmt: skip
    found = as_json(*arguments)
    assert [t["settings"] for t in found["tried"]] == [
        {}, {"draft_keep": 0.7, "draft_tokens": 2}, {"draft_policy": "lookup", "draft_tokens": 2},
    ]  # fmt: skip
    shown = run(*arguments, "--no-lookup")
    assert "lookup" not in shown
    assert "plain decoding" in shown


def test_eval(folder: Path, tmp_path: Path) -> None:
    shown = run(
        "eval", folder / "gates", "--data", folder / "data.jsonl", "--keep", 0.9, "--keep", 0.7,
        "--compute", 0.8, "--max-tokens", 400, "--json", tmp_path / "eval.json",
    )  # fmt: skip
    assert "dense" in shown
    assert "keep=0.7" in shown
    rows = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == ["dense"] + ["gateskip"] * 3
    assert rows[2]["skip_rate"] > rows[1]["skip_rate"]
    assert [p.name for p in tmp_path.iterdir()] == ["eval.json"], "no temporary file is left"


def test_bench(folder: Path) -> None:
    found = as_json(
        "bench", folder / "gates", "--data", folder / "data.jsonl", "--keep", 0.7, "--batch", 2,
        "--prompt-tokens", 12, "--new-tokens", 3, "--dtype", "float32", "--repeats", 2,
        "--no-compiled",
    )  # fmt: skip
    assert {row["phase"] for row in found["rows"]} == {"prefill", "decode"}
    assert {row["model"] for row in found["rows"]} == {"base"}


def test_explain(folder: Path, tmp_path: Path) -> None:
    found = as_json(
        "explain", folder / "gates", "--text", "w5 w6 w7 w8", "--keep", 0.6,
        "--png", tmp_path / "usage.png",
    )  # fmt: skip
    assert found["tokens"] == ["w5", "w6", "w7", "w8"]
    assert len(found["kept"][0]) == 2 * LAYERS
    assert (tmp_path / "usage.png").stat().st_size > 0


def test_explain_by_kind(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Words of the tokenizer here are all of one kind, and a text's first token is another.
    found = as_json("explain", folder / "gates", "--data", folder / "data.jsonl", "--keep", 0.6)
    rows = {row["kind"]: row for row in found["rows"]}
    assert found["tokens"] == 24 * 48
    assert rows["beginning"]["skip_rate"] == 0.0
    assert rows["beginning"]["p"] is None
    assert sum(row["tokens"] for row in rows.values()) == 24 * 48
    assert found["skip_rate"] == pytest.approx(0.4, abs=0.1)


def test_info_reads_the_config_alone(folder: Path, tmp_path: Path) -> None:
    config = (folder / "base" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    found = as_json("info", tmp_path, "--context", 16)
    rows = {row["kind"]: row for row in found["gates"]}
    for kind, row in rows.items():
        gates = 2 if kind == "shared" else 2 * LAYERS
        assert row["parameters"] == gates * gate_parameters(kind, 64, 16, groups=4)
    from gateskip.retrofit.attach import find_family

    hf_config = tiny().config
    shape = find_family(hf_config).shape_of_config(hf_config, 2)
    assert found["decoder_macs"] == shape.dense_macs(16)
    expected = break_even_skip_rate(shape, GateConfig(kind="scalar"), 16)
    assert rows["scalar"]["break_even_skip_rate"] == pytest.approx(expected)
    assert "pays from" in run("info", tmp_path)


def test_info_families() -> None:
    assert "llama" in run("info", "--families").split()


def test_help_is_light() -> None:
    code = (
        "import sys, gateskip.cli.main; "
        "sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fit", "{0}/base", "--data", "{0}/data.jsonl", "--out", "{0}/gates"), "--overwrite"),
        (("fit", "{0}/base", "--data", "{0}/no.jsonl", "--out", "{0}/new"), "not a file"),
        (("fit", "{0}/base", "--data", "{0}/data.jsonl", "--out", "{0}/new", "--kind", "low_rnk"),
         "low_rank"),
        (("fit", "{0}/none", "--data", "{0}/data.jsonl", "--out", "{0}/new"), "not be loaded"),
        (("fit", "{0}/base", "--data", "{0}/data.jsonl", "--out", "{0}/new", "--dtype", "int3"),
         "dtype='int3'"),
        (("calibrate", "{0}/gates", "--data", "{0}/data.jsonl", "--out", "{0}/new",
          "--allocation", "globl"), "Did you mean 'global'"),
        (("generate", "{0}/base", "--prompt", "w1"), "no gateskip folder"),
        (("generate", "{0}/gates", "--prompt", "w1", "--keep", "0.9", "--compute", "0.9"),
         "exactly one"),
        (("generate", "{0}/gates", "--prompt", "w1", "--keep", "0.01"), "floor"),
        (("generate", "{0}/gates", "--prompt", "w1", "--chat"), "--no-chat"),
        (("eval", "{0}/gates", "--data", "{0}/data.jsonl", "--keep", "7"), "keep=7.0"),
        (("eval", "{0}/gates", "--data", "{0}/data.jsonl", "--json", "{0}/no/x.json"),
         "does not exist"),
        (("bench", "{0}/gates", "--data", "{0}/data.jsonl", "--dtype", "float32"), "tokens need"),
        (("explain", "{0}/gates", "--text", "w1", "--png", "{0}/no/x.png"), "--png"),
        (("explain", "{0}/gates"), "one of --text"),
        (("explain", "{0}/gates", "--text", "w1", "--data", "{0}/data.jsonl"), "one of --text"),
        (("explain", "{0}/gates", "--data", "{0}/data.jsonl", "--png", "{0}/x.png"), "one text"),
        (("explain", "{0}/gates", "--data", "{0}/data.jsonl"), "choose a budget"),
        (("info",), "--families"),
        (("info", "{0}/none"), "no config that loads"),
    ],
)  # fmt: skip
def test_errors_are_one_line(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    line = fails(capsys, *(argument.format(folder) for argument in arguments))
    assert message in line
    assert not (folder / "new").exists(), "nothing was written"


def test_debug_shows_the_traceback() -> None:
    from gateskip.errors import ConfigError

    with pytest.raises(ConfigError):
        main(["--debug", "info"])
