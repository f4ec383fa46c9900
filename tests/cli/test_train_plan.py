"""``gateskip train``: plan, reports, early stopping, and what is checked before a model loads."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from commands import as_json, fails, run

from models import LAYERS, tiny


def begun(folder: Path, out: Path) -> tuple[object, ...]:
    data = folder / "data.jsonl"
    return ("train", folder / "base", "--data", data, "--out", out, "--batch-size", 4)


@pytest.mark.parametrize("gates", [True, False])
def test_a_dry_run_says_what_it_would_take(folder: Path, tmp_path: Path, gates: bool) -> None:
    given = begun(folder, tmp_path / "out")
    given += ("--gates", folder / "gates") if gates else ("--set", "gate.compensation_rank=4")
    found = as_json(*given, "--dry-run", "--steps", 30, "--lora-rank", 4)
    assert not (tmp_path / "out").exists()
    lora = LAYERS * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    assert found["trained"]["backbone"] == lora
    assert found["trained"]["compensation"] == 2 * LAYERS * (64 + 2 * 4 * 64)
    assert "gates" not in found["trained"]
    assert (found["rows"], found["steps"]) == (24, 30)
    assert found["epochs"] == pytest.approx(30 * 4 / 24)
    assert found["tokens_per_step"] == pytest.approx(4 * 48)
    assert found["seconds"] == pytest.approx(30 * found["step_seconds"])
    assert found["memory_bytes"] > 0
    assert "Nothing was trained" in run(*given, "--dry-run")


def test_a_dry_run_of_decisions_that_learn(folder: Path, tmp_path: Path) -> None:
    given = begun(folder, tmp_path / "out")
    found = as_json(*given, "--dry-run", "--preset", "learned", "--max-length", 48)
    gates = found["trained"]["gates"]
    assert gates == 2 * LAYERS * (2 * 64 + 2), "a value and a score for every branch"
    assert not (tmp_path / "out").exists()


def test_early_stopping_keeps_the_best(folder: Path, tmp_path: Path) -> None:
    """Learning a few words unlearns all others: stopped long before the last step."""
    narrow = tmp_path / "narrow.jsonl"
    narrow.write_text("".join(json.dumps({"text": "w1 w2 w3 " * 16}) + "\n" for _ in range(24)))
    start = ("train", folder / "base", "--data", narrow, "--out", tmp_path / "out")
    start += ("--batch-size", 4)
    found = as_json(
        *start, "--gates", folder / "gates", "--steps", 40,
        "--eval-data", folder / "data.jsonl", "--eval-every", 2, "--save-every", 2,
        "--early-stopping", 2, "--learning-rate", 0.3, "--set", "trainer.warmup_steps=0",
    )  # fmt: skip
    losses = [entry["eval_loss"] for entry in found["history"] if "eval_loss" in entry]
    assert found["steps"] < 40
    best = losses.index(min(losses))
    assert len(losses) == best + 3, "two evaluations that are no better"
    state = json.loads(
        next((tmp_path / "out" / "checkpoints").glob(f"checkpoint-{found['steps']}"))
        .joinpath("trainer_state.json").read_text()
    )  # fmt: skip
    assert state["best_global_step"] == 2 * (best + 1)

    def trained() -> bytes:
        return (tmp_path / "out" / "gateskip_model.safetensors").read_bytes()

    kept = trained()
    again = as_json(
        *start, "--steps", 40, "--resume", "--eval-data",
        folder / "data.jsonl", "--eval-every", 2, "--save-every", 2, "--early-stopping", 2,
        "--learning-rate", 0.3, "--set", "trainer.warmup_steps=0",
    )  # fmt: skip
    assert again["steps"] == found["steps"], "it ended, and is not trained on"
    assert trained() == kept


def test_reports(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = begun(folder, tmp_path / "out")
    assert "Did you mean 'wandb'" in fails(capsys, *given, "--report-to", "wandbb")
    for name in ("trackio", "wandb", "clearml"):
        if importlib.util.find_spec(name) is None:
            message = fails(capsys, *given, "--report-to", name)
            assert f"pip install {name}" in message
    assert not (tmp_path / "out").exists()


def test_the_trainers_own_reports_get_our_figures(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import TrainerCallback, integrations

    logged: list[dict[str, Any]] = []

    class Board(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            logged.append(dict(logs))

    places = integrations.integration_utils.INTEGRATION_TO_CALLBACK
    monkeypatch.setitem(places, "tensorboard", Board)
    monkeypatch.setattr("gateskip.cli.train_plan.PACKAGES", {"tensorboard": ("json",)})
    run(*begun(folder, tmp_path / "out"), "--gates", folder / "gates", "--steps", 2,
        "--report-to", "tensorboard", "--train-gates", "--penalty", "0.1")  # fmt: skip
    steps = [entry for entry in logged if "loss" in entry]
    assert steps
    assert {"gate_penalty", "budget", "skip_rate"} <= set(steps[0])


def test_checked_before_the_model_is_loaded(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    tiny().config.save_pretrained(tmp_path / "empty")  # no weights
    data = ("--data", folder / "data.jsonl", "--out", tmp_path / "out")
    for given, match in (
        (("--max-length", "300"), "max_length=300 is more than the 256 positions"),
        (("--early-stopping", "2"), "needs --eval-data"),
        (("--penalty", "0.1"), "train_gates=False"),
        (("--set", "training.thresholds=batch"), "budget_unit='keep'"),
    ):
        assert match in fails(capsys, "train", tmp_path / "empty", *data, *given)
    more = ("--early-stopping", "2", "--eval-data", folder / "data.jsonl")
    more += ("--save-every", "5", "--eval-every", "2")
    assert "does not divide" in fails(capsys, "train", tmp_path / "empty", *data, *more)
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    bad = ("--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out")
    assert "it has question, answer" in fails(capsys, "train", tmp_path / "empty", *bad)


def test_generate_data(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("w1 w2\nw3 w4\nw5\n")
    given = ("--prompts", tmp_path / "p.txt", "--out", tmp_path / "rows.jsonl")
    given += ("--max-new-tokens", 4, "--samples", 8)
    found = as_json("generate-data", folder / "base", *given)
    assert (found["rows"], found["total"]) == (24, 24)
    assert "pass --resume or --overwrite" in fails(capsys, "generate-data", folder / "base", *given)
    assert as_json("generate-data", folder / "base", *given, "--resume")["rows"] == 0
    again = as_json(
        "generate-data", folder / "gates", "--base", folder / "base", *given, "--overwrite",
        "--compute", "0.9",
    )  # fmt: skip
    assert again["rows"] == 24
    message = fails(capsys, "generate-data", folder / "base", *given, "--resume", "--keep", "0.9")
    assert "needs gates" in message
    run("train", folder / "base", "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out",
        "--gates", folder / "gates", "--steps", 1, "--calibration-data", folder / "data.jsonl",
        "--distill", "0.5")  # fmt: skip


def test_nothing_is_loaded_before_data_and_checkpoint_are_checked(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = begun(folder, tmp_path / "out")
    run(*given, "--gates", folder / "gates", "--steps", 2, "--save-every", 1)
    monkeypatch.setattr("gateskip.cli.train.load_base", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("gateskip.cli.train.load_gated", lambda *_: pytest.fail("loaded"))
    rest = ("--resume", "--save-every", 1, "--steps", 2)
    assert "learning_rate=" in fails(capsys, *given, *rest, "--learning-rate", 0.5)
    assert "budget_end=" in fails(capsys, *given, *rest, "--budget", 0.9)
    narrow = tmp_path / "narrow.jsonl"
    row = {"prompt": "w1 " * 40, "completion": "w2"}
    narrow.write_text(json.dumps(row) + "\n")
    start = ("train", folder / "base", "--data", narrow, "--out", tmp_path / "new")
    assert "no usable row" in fails(capsys, *start, "--max-length", 20)
    narrow.write_text(json.dumps({"messages": [{"role": "user", "content": "w1"}]}) + "\n")
    assert "chat template" in fails(capsys, *start)
