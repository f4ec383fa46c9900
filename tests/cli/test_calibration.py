"""``gateskip calibrate``, ``latency`` and ``export``: checks, times, risks, bad input."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from commands import as_json, fails, run
from transformers import AutoModelForCausalLM, AutoTokenizer

import gateskip
from gateskip.execution.api import dense
from models import LAYERS


def test_check_compares_files(folder: Path, tmp_path: Path) -> None:
    same = tmp_path / "repeats.jsonl"
    same.write_text((json.dumps({"text": "w1 " * 48}) + "\n") * 24)
    before = (folder / "gates" / "gateskip_config.json").read_bytes()
    options = ("calibrate", folder / "gates", "--check", "--data", folder / "data.jsonl")
    rows = as_json(*options, "--data", same, "--keep", 0.8, "--compute", 0.9)["rows"]
    assert [(row["data"], row["budget"]) for row in rows] == [
        (name, budget) for name in ("data", "repeats") for budget in ("keep=0.8", "compute=0.9")
    ]
    assert all(row["kept"] for row in rows if row["data"] == "data")
    assert not all(row["kept"] for row in rows)
    assert "Drift: repeats" in run(*options, "--data", same)
    assert (folder / "gates" / "gateskip_config.json").read_bytes() == before


def test_latency_is_kept_with_the_gates(folder: Path, tmp_path: Path) -> None:
    gates = tmp_path / "gates"
    shutil.copytree(folder / "gates", gates)
    options = ("--prompt-tokens", 16, "--new-tokens", 3, "--repeats", 1)
    record = as_json("latency", gates, "--data", folder / "data.jsonl", *options)
    saved = json.loads((gates / "gateskip_config.json").read_text())["latency"]
    assert saved == [record]
    # A tiny model's own times are noise.
    config = json.loads((gates / "gateskip_config.json").read_text())
    count = len(record["keep"])
    config["latency"][0] |= {"prefill": [1.0 - 0.1 * n for n in range(count)], "dense_prefill": 1.0}
    (gates / "gateskip_config.json").write_text(json.dumps(config))
    found = as_json(
        "generate", gates, "--prompt", "w1 w2 w3", "--max-new-tokens", 3, "--latency", 0.85,
        "--workload", 16, 0,
    )  # fmt: skip
    assert found["budget"] == {"latency": 0.85, "workload": [16, 0]}
    assert found["skip_rate"] > 0.0


def test_bad_input(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateskip.load", lambda *_, **__: pytest.fail("a model was loaded"))
    gates, data = folder / "gates", folder / "data.jsonl"
    some = ("calibrate", gates, "--data", data)
    assert "leave one out" in fails(capsys, *some, "--check", "--out", tmp_path / "o")
    assert "--out is missing" in fails(capsys, *some)
    assert "for --check" in fails(capsys, *some, "--out", tmp_path / "o", "--keep", 0.5)
    assert "called 'data'" in fails(capsys, *some, "--check", "--data", data)
    wrong = fails(capsys, "latency", "no/such-gates", "--data", data)
    assert "--out is missing" in wrong
    assert "one of keep, compute" in fails(
        capsys, "generate", gates, "--prompt", "w1", "--latency", 0.5, "--keep", 0.5
    )
    assert "workload" in fails(
        capsys, "generate", gates, "--prompt", "w1", "--keep", 0.5, "--workload", 1, 1
    )


def test_risk_control(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (folder / "data.jsonl").read_text().splitlines()
    more = tmp_path / "more.jsonl"
    more.write_text("\n".join(lines * 8))
    given = ("calibrate", folder / "gates", "--data", folder / "data.jsonl", "--out")
    found = as_json(
        *given, tmp_path / "out", "--risk-data", more, "--max-loss-increase", "40%",
        "--confidence", "90%",
    )  # fmt: skip
    risk = found["risk"]
    assert (risk["criterion"], risk["limit"], risk["confidence"]) == ("loss_increase", 0.4, 0.9)
    assert risk["texts"] == 8 * len(lines)
    assert risk["rows"][0]["accepted"]
    saved = json.loads((tmp_path / "out" / "gateskip_config.json").read_text())
    assert saved["budget"] == risk["budget"]
    split = as_json(
        "calibrate", folder / "gates", "--data", more, "--out", tmp_path / "split",
        "--min-agreement", 0.2, "--max-tokens", 2000,
    )  # fmt: skip
    assert split["risk"]["texts"] == 4 * len(lines), "every second text"
    for bad, said in (
        (("--max-loss-increase", "lots"), "lots"),
        (("--confidence", "95%"), "bound"),
    ):
        assert said in fails(capsys, *given, tmp_path / "bad", *bad)
    assert not (tmp_path / "bad").exists()


def test_export(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gates, out = folder / "gates", tmp_path / "out"
    given = ("export", gates, "--out", out)
    assert "--static" in fails(capsys, *given)
    assert "Did you mean 'mlp'" in fails(capsys, *given, "--static", "--remove", "7.mpl")
    assert "no branch" in fails(capsys, *given, "--static", "--remove", "77.mlp")
    assert "always off" in fails(capsys, *given, "--static", "--keep", 0.8)
    wanted = ("--static", "--remove", "1.mlp", "--remove", "1.attention", "--remove", "2.mlp")
    assert "--approximate" in fails(capsys, *given, *wanted)
    assert not out.exists()
    report = as_json(*given, *wanted, "--approximate")
    assert report["layers_removed"] == [1]
    assert report["zeroed"] == [[2, "mlp"]]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == LAYERS - 1
    assert AutoTokenizer.from_pretrained(out)("w1 w2")["input_ids"]


def test_accuracy_is_of_generated_answers(folder: Path) -> None:
    model = gateskip.load(folder / "gates", base=folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    prompts = [f"w{n} w{n + 1} w{2 * n}" + " w3" * (n % 3) for n in range(40)]

    def said(prompt: str) -> str:
        """The model's last number, alone and without padding."""
        inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
        new = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return ["", *re.findall(r"\d+", new)][-1]

    with dense(model):
        answers = [said(prompt) or "-1" for prompt in prompts]
    rows = [
        {"prompt": p, "completion": f"it is {a}"} for p, a in zip(prompts, answers, strict=True)
    ]
    rows[0]["completion"] = "it is 99999"
    report = gateskip.control_risk(
        model, rows, tokenizer, max_accuracy_drop=0.3, confidence=0.8, max_new_tokens=4
    )
    assert (report.criterion, report.texts) == ("accuracy_drop", 40)
    first = report.rows[0]
    with gateskip.budget(model, compute=float(first.budget.partition("=")[2])):
        right = sum(said(p) == a for p, a in zip(prompts[1:], answers[1:], strict=True))
    known = sum(answer != "-1" for answer in answers[1:])
    assert first.risk == pytest.approx((known - right) / 40)
