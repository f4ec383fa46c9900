"""The experiment on real text, on a small model and made-up rows."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from models import VOCAB, tiny

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
SMOLLM2 = EXPERIMENTS / "smollm2"
sys.path[:0] = [str(EXPERIMENTS), str(SMOLLM2)]

import trained  # noqa: E402

from gateskip.evaluation.runs import read_runs  # noqa: E402


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """A model, its texts and questions."""
    found = {name: tmp_path / name for name in ("model", "texts", "eval")}
    tiny().save_pretrained(found["model"])
    words = [f"w{n}" for n in range(VOCAB - 3)]
    vocabulary = {word: n for n, word in enumerate(["<pad>", "<s>", "</s>", *words])}
    fast = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    fast.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(found["model"])
    draw = random.Random(0)

    def text(count: int = 40) -> str:
        return " ".join(draw.choices(words, k=count))

    names = ("mix", "cal", "gsm8k_test", "wikitext2_test")
    files = {
        found["texts"] / f"{name}.jsonl": [{"text": text()} for _ in range(40)] for name in names
    }
    choice = [{"query": text(6), "choices": [text(2), text(2)], "gold": n % 2} for n in range(6)]
    for name in ("arc_easy", "openbook_qa", "piqa"):
        files[found["eval"] / f"{name}.jsonl"] = choice
    files[found["eval"] / "lambada_openai.jsonl"] = [
        {"context": text(8), "continuation": text(1)} for _ in range(6)
    ]
    files[found["eval"] / "winogrande.jsonl"] = [
        {"context_options": [text(4), text(4)], "continuation": text(3), "gold": n % 2}
        for n in range(6)
    ]
    for path, rows in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def test_results_of_every_kind(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results" / "smollm2"
    given = [
        str(places["model"]), str(places["texts"]), str(places["eval"]), str(out), "--steps", "2",
        "--batch-size", "2", "--max-length", "48", "--loss-tokens", "600", "--limit", "4",
        "--seeds", "0", "--dtype", "float32", "--work", str(tmp_path / "work"), "--methods",
        "dense", "control", "gateskip", "router_tuning", "int8", "--saved", "0.15", "0.0",
        "--models", str(tmp_path / "m"),
    ]  # fmt: skip
    trained.main(given)
    files = {path.stem: json.loads(path.read_text()) for path in out.iterdir()}
    assert set(files) == {
        "dense_0_s0", "control_0_s0", "gateskip_0_s0", "gateskip_15_s0", "router_tuning_15_s0",
        "int8_0_s0",
    }  # fmt: skip
    for name, found in files.items():
        assert set(found["tasks"]) == set(trained.QUESTIONS), name
        assert found["loss"] > 0.0
        assert found["loss_wikitext2"] > 0.0
    assert files["dense_0_s0"]["config"]["training"] == []
    assert files["dense_0_s0"]["loss"] != files["control_0_s0"]["loss"]
    gates = files["gateskip_15_s0"]
    assert gates["realised_macs"] == pytest.approx(0.15, abs=0.1)
    assert gates["loss_full_budget"] != gates["loss"]
    assert min(gates["tasks_macs_saved"].values()) > 0.05
    routers = files["router_tuning_15_s0"]["config"]
    assert routers["training"][0]["backbone"] == "frozen"
    assert routers["method"]["branches"] == ["attention"]
    assert len(read_runs(tmp_path / "results")) == 6
    control, int8 = files["control_0_s0"]["loss"], files["int8_0_s0"]["loss"]
    assert int8 == pytest.approx(control, rel=0.01)  # the same, in 8 bits
    assert int8 != control
    # What was kept is timed, each as what it is.
    spec = importlib.util.spec_from_file_location("smollm2_timing", SMOLLM2 / "timing.py")
    assert spec is not None
    assert spec.loader is not None
    timing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(timing)
    for name, value in (("PROMPT", 16), ("NEW", 3), ("WINDOWS", 1)):
        monkeypatch.setattr(timing, name, value)
    timing.main([
        str(out), str(tmp_path / "m"), str(places["model"]), "--repeats", "1", "--dtype", "float32",
    ])  # fmt: skip
    timed = {path.stem: json.loads(path.read_text()) for path in out.iterdir()}
    assert {name for name, found in timed.items() if "timing" in found} == {
        "gateskip_0_s0", "gateskip_15_s0", "router_tuning_15_s0", "int8_0_s0",
    }  # fmt: skip
    assert timed["int8_0_s0"]["kernel_decode_speedup"] > 0.0
    assert timed["int8_0_s0"]["timing"]["prompt"] == 16
