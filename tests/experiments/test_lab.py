"""The lab: its language, its dense model, and a run of it in small."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
sys.path[:0] = [str(EXPERIMENTS), str(EXPERIMENTS / "lab")]

import language  # noqa: E402
import model as lab_model  # noqa: E402
import timing  # noqa: E402

import run as lab  # noqa: E402
from gateskip.evaluation.runs import read_runs  # noqa: E402

SMALL = ("--steps", "4", "--batch-size", "4", "--problems", "8", "--seeds", "0")


def worked(prompt: str, asked: str) -> list[int]:
    """What the asked person has after each line, from the lines alone."""
    total, found = 0, []
    for line in prompt.split(" . ")[:-1]:
        words = line[line.index("#") :].split()
        _, who, what = words[:3]
        if what == "doubles":
            total *= 2 if who == asked else 1
        elif what == "gives":
            change = int(words[4])
            total += change * ((words[3] == asked) - (who == asked))
        elif who == asked:
            total += {"has": 1, "finds": 1, "loses": -1}[what] * int(words[3])
        found.append(total)
    return found


def test_answers_follow_from_the_problems() -> None:
    kinds = set()
    for row in language.problems(3, 300):
        asked = re.search(r"does (\w+) have now", row["prompt"])
        assert asked
        expected = worked(row["prompt"], asked[1])
        told = [int(n) for n in re.findall(rf", {asked[1]} (\d+)", row["completion"])]
        assert told == expected
        assert language.answer_of(row["completion"]) == str(expected[-1])
        assert max(expected) <= language.LARGEST
        kinds |= set(row["prompt"].split()) & {"finds", "loses", "gives", "doubles"}
    assert kinds == {"finds", "loses", "gives", "doubles"}
    words = language.tokenizer()
    ids = words(row["prompt"] + row["completion"])["input_ids"]
    assert words.unk_token_id not in ids
    assert list(language.problems(3, 5)) == list(language.problems(3, 5))
    assert language.answer_of("so nothing") is None


@pytest.mark.skipif(not lab_model.DENSE.is_dir(), reason="the lab's dense model is not there")
def test_the_dense_model_solves_them() -> None:
    from transformers import LlamaForCausalLM

    dense = LlamaForCausalLM.from_pretrained(lab_model.DENSE, dtype=torch.float32).eval()
    rows = list(language.problems(lab_model.TEST_SEED + 1, 40))
    assert lab_model.exact_match(dense, rows) >= 0.9
    for layer in dense.model.layers[:4]:  # and not by chance
        layer.mlp.down_proj.weight.data.zero_()
    assert lab_model.exact_match(dense, rows) < 0.5


def test_stages_take_all_steps_and_wild_figures_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import argparse

    from arms import Bench, Job, make

    seen: list[tuple[int, int]] = []
    made = lab.bench(argparse.Namespace(dense=str(lab_model.DENSE), test_seed=1, problems=1))
    monkeypatch.setattr(
        Bench, "_stage",
        lambda self, job, model, config, rows, steps, options: (
            (seen.append((len(rows), steps)), model)[1], [],
        ),
    )  # fmt: skip
    options = argparse.Namespace(steps=5, batch_size=2)
    made.trained(Job("skipgpt", "", 0.25, 0), None, ((0.5, None), (0.5, None)), options)  # type: ignore[arg-type]
    assert seen == [(4, 2), (6, 3)]
    monkeypatch.setattr(
        Bench, "run", lambda self, job, options: {"accuracy": None, "loss": float("nan")}
    )
    given = argparse.Namespace(
        threads=None, out=tmp_path, shard=(0, 1), seeds=[0], saved=[0.5], methods=["random"],
        variants=[""], budget_hours=1.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="JSON compliant"):
        make(made, given)
    assert not list(tmp_path.glob("*.json"))


def test_variants_are_those_of_their_method() -> None:
    import argparse

    from arms import every_job

    given = argparse.Namespace(
        seeds=[0], saved=[0.5, 0.0], methods=["control", "gateskip", "random", "skipgpt"],
        variants=["", "fitted", "noisy"],
    )  # fmt: skip
    assert [job.name for job in every_job(given)] == [
        "gateskip_50_s0", "gateskip_fitted_50_s0", "random_50_s0", "skipgpt_50_s0",
        "skipgpt_noisy_50_s0", "control_0_s0", "gateskip_0_s0",
    ]  # fmt: skip


@pytest.mark.skipif(not lab_model.DENSE.is_dir(), reason="the lab's dense models are not there")
@pytest.mark.parametrize(
    ("size", "saved", "branches"),
    [("1m", 0.15, ["attention"]), ("03m", 0.25, ["attention", "mlp"]),
     ("1m", 0.5, ["attention", "mlp"])],
    ids=["attentions suffice", "they would by a budget below the grid", "they cannot"],
)  # fmt: skip
def test_a_method_gets_more_of_the_model_where_it_needs_it(
    size: str, saved: float, branches: list[str]
) -> None:
    import argparse

    from arms import Job

    dense = str(lab_model.dense_of(size))
    made = lab.bench(argparse.Namespace(dense=dense, test_seed=1, problems=1))
    made = dataclasses.replace(made, fit_rows=made.fit_rows[:60])
    _, options = made.prepared(Job("router_tuning", "", saved, 0), made.fresh())
    assert list(options["branches"]) == branches


@pytest.mark.parametrize("variant", lab.VARIANTS)
def test_options_of_every_variant_go_together(variant: str) -> None:
    import argparse

    from arms import CALIBRATED, Job

    import gateskip

    made = lab.bench(argparse.Namespace(dense=str(lab_model.DENSE), test_seed=1, problems=1))
    gate, training = lab.VARIANTS[variant]
    config = made.gate_config(Job("gateskip", variant, 0.5, 3))
    found = json.loads(json.dumps(config.to_json()))
    asked = json.loads(json.dumps(dict(gate)))
    assert found == found | asked | {"seed": 3}
    for _, own in training.get("stages", made.stages):
        gateskip.GateSkipTrainingConfig(**({"budget_end": 0.5} | made.training | own))
    named = set(training) - {"stages", "fit", *CALIBRATED}
    assert named <= set(gateskip.GateSkipTrainingConfig().to_json())


@pytest.mark.skipif(not lab_model.DENSE.is_dir(), reason="the lab's dense model is not there")
def test_runs_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "FIT_PROBLEMS", 12)
    monkeypatch.setattr(lab, "LOSS_PROBLEMS", 10)
    out = tmp_path / "results" / "lab"
    small = lab_model.build("03m", 0)
    small.save_pretrained(tmp_path / "small")
    names = (
        "gateskip", "control", "shortgpt", "mixture_of_depths", "skipgpt", "gate_norm", "int8",
        "smaller",
    )  # fmt: skip
    given = [
        str(out), *SMALL, "--work", str(tmp_path / "work"), "--models", str(tmp_path / "m"),
        "--smaller", str(tmp_path / "small"),
    ]  # fmt: skip
    lab.main([*given, "--methods", *names, "--saved", "0.5", "0.0"])
    lab.main([*given, "--methods", "skipgpt", "--variants", "noisy", "--saved", "0.5"])
    noisy = json.loads((out / "skipgpt_noisy_50_s0.json").read_text())
    assert noisy["config"]["method"]["noise"] == 1.0
    assert [stage["decision_noise"] for stage in noisy["config"]["training"]] == [1.0, 0.0]
    (out / "skipgpt_noisy_50_s0.json").unlink()
    files = {path.name: json.loads(path.read_text()) for path in out.iterdir()}
    assert set(files) == {
        "gateskip_50_s0.json", "gateskip_0_s0.json", "control_0_s0.json", "shortgpt_50_s0.json",
        "mixture_of_depths_50_s0.json", "skipgpt_50_s0.json", "gate_norm_50_s0.json",
        "int8_0_s0.json", "smaller_0_s0.json",
    }  # fmt: skip
    gone = files.pop("gate_norm_50_s0.json")  # attentions are not half of the model
    assert "floor" in gone["config"]["unreachable"]
    assert gone["accuracy"] is None
    for name, found in files.items():
        assert found["bench"] == "lab"
        assert 0.0 <= found["accuracy"] <= 1.0
        assert found["loss"] > 0.0
        if name == "smaller_0_s0.json":  # 6 of 8 layers, each two thirds as wide
            assert found["saved_macs"] == pytest.approx(1 - 6 / 8 * (64 / 96) ** 2, abs=0.05)
        elif found["saved_macs"]:
            assert found["realised_macs"] == pytest.approx(0.5, abs=0.06), name
    # In both of its stages, and from the first routed layer on.
    assert [stage["backbone"] for stage in files["skipgpt_50_s0.json"]["config"]["training"]] == [
        "frozen", "full",
    ]  # fmt: skip
    assert files["mixture_of_depths_50_s0.json"]["config"]["method"]["every"] == 1
    assert files["control_0_s0.json"]["config"]["training"][0]["arm"] == "control"
    assert len(read_runs(tmp_path / "results")) >= 6
    assert (tmp_path / "m" / "gateskip_50_s0" / "gateskip_config.json").is_file()
    # And what was kept is timed.
    monkeypatch.setattr(timing, "NEW", 3)
    monkeypatch.setattr(timing, "WINDOWS", 1)
    timing.main([
        str(out), str(tmp_path / "m"), "--batch", "2", "--repeats", "1", "--smaller",
        str(tmp_path / "small"),
    ])  # fmt: skip
    plain = ("shortgpt_50_s0", "int8_0_s0", "smaller_0_s0")
    for name in ("gateskip_50_s0", "gateskip_0_s0", *plain):
        found = json.loads((out / f"{name}.json").read_text())
        assert found["prefill_speedup"] > 0.0
        assert found["decode_speedup"] > 0.0
        assert found["timing"].get("plain", False) == (name in plain), name
        assert (found.get("kernel_decode_speedup", 0.0) > 0.0) == (name in plain), name
    control, int8 = (
        json.loads((out / f"{name}_0_s0.json").read_text()) for name in ("control", "int8")
    )
    assert int8["loss"] == pytest.approx(control["loss"], rel=0.2, abs=2e-4)  # the same, in 8 bits
    assert int8["loss"] != control["loss"]
    assert len(read_runs(tmp_path / "results")) == 9
    gates = json.loads((out / "gateskip_50_s0.json").read_text())
    assert gates["timing"]["prefill_macs_saved"] == pytest.approx(0.5, abs=0.2)
    assert "timing" not in json.loads((out / "control_0_s0.json").read_text())
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    lab.main([*given, "--methods", *names, "--saved", "0.5", "0.0"])
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
