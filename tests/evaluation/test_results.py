"""Result files: what is read, what is refused, and what it says over seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gateskip.errors import DataError
from gateskip.evaluation.results import comparisons, control_of, summaries
from gateskip.evaluation.runs import Run, read_runs
from gateskip.evaluation.statistics import holm, paired_difference, t_interval


def write(root: Path, name: str, **fields: Any) -> Path:
    given: dict[str, Any] = {
        "bench": "lab", "method": "gateskip", "seed": 0, "saved_macs": 0.25, "accuracy": 0.5,
        "loss": 1.0, "seconds": 60.0, "config": {}, "versions": {"torch": "2"},
    }  # fmt: skip
    given |= fields
    path = root / str(given["bench"]) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({k: v for k, v in given.items() if v != "absent"}))
    return path


def untrained(root: Path, method: str, dense: float = 1.4, *losses: float) -> None:
    def row(arm: str, compute: float | None, saved: float, loss: float) -> dict[str, Any]:
        return {
            "arm": arm, "compute": compute, "macs_saved": saved, "skip_rate": saved, "loss": loss,
        }  # fmt: skip

    rows = [row("dense", None, 0.0, dense)]
    rows += [row(method, 0.9 - n / 10, 0.11 + n / 10, loss) for n, loss in enumerate(losses)]
    write(
        root, f"untrained_{method}", bench="smollm2", method=method, trained=False, rows=rows,
        saved_macs="absent", accuracy="absent", loss="absent",
    )  # fmt: skip


def test_fields(tmp_path: Path) -> None:
    write(tmp_path, "plain")
    write(
        tmp_path, "full", method="control", saved_macs=0, accuracy=None, seconds=None,
        config={"variant": "frozen", "rate": 1}, realised_macs=0.01, skip_rate=0.2, questions=200,
        prefill_speedup=1.2, decode_speedup=2, peak_memory_mb=900, dense_accuracy=0.4,
        collapsed=True, curve=[[0, 3.0], [100, 1.5]], something_else="is left alone",
    )  # fmt: skip
    write(tmp_path / "lab", "deeper")  # not a run: lab/lab/deeper.json
    full, plain = read_runs(tmp_path)
    assert (plain.key, plain.seed) == (("lab", "gateskip", "", 0.25), 0)
    assert (plain.accuracy, plain.loss, plain.seconds, plain.collapsed) == (0.5, 1.0, 60.0, False)
    assert plain.realised_macs is plain.questions is None
    assert plain.curve == ()
    assert (full.key, full.accuracy) == (("lab", "control", "frozen", 0.0), None)
    assert (full.questions, full.collapsed, full.curve[1]) == (200, True, (100.0, 1.5))
    assert full.file == "full.json"


def test_nothing_there(tmp_path: Path) -> None:
    assert read_runs(tmp_path / "none") == []
    assert summaries([]) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bench", 3), ("method", ""), ("method", "absent"), ("seed", 1.5), ("seed", True),
        ("seed", -1), ("saved_macs", 1.2), ("saved_macs", None), ("accuracy", 41.0),
        ("accuracy", "absent"), ("loss", "high"), ("loss", float("nan")), ("seconds", "absent"),
        ("config", []), ("versions", "absent"), ("questions", 0), ("curve", [[1, 2, 3]]),
        ("curve", [1, 2]), ("collapsed", "no"), ("realised_macs", True), ("decode_speedup", -1),
    ],
)  # fmt: skip
def test_a_damaged_file_names_file_and_field(tmp_path: Path, field: str, value: Any) -> None:
    write(tmp_path, "fine")
    path = write(tmp_path, "damaged")
    data = json.loads(path.read_text()) | {"seed": 1, field: value}
    path.write_text(json.dumps({k: v for k, v in data.items() if v != "absent"}))
    with pytest.raises(DataError, match=rf"damaged\.json: {field} is .*it must be"):
        read_runs(tmp_path)


def test_other_damage(tmp_path: Path) -> None:
    path = write(tmp_path, "damaged")
    for text, message in (
        ("{", r"damaged\.json: no readable JSON"), ("[1]", "one JSON object, not a list"),
        (path.read_text().replace("lab", "smollm2"), "bench is 'smollm2'.*'lab', as the file's"),
        (path.read_text().replace('"config": {}', '"config": {"variant": 3}'), "config.variant=3"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_runs(tmp_path)


def test_the_same_run_twice(tmp_path: Path) -> None:
    write(tmp_path, "a")
    write(tmp_path, "b", seed=1)
    write(tmp_path, "c", config={"variant": "frozen"})
    assert len(read_runs(tmp_path)) == 3
    write(tmp_path, "d", loss=9.0)
    with pytest.raises(DataError, match=r"d\.json and a\.json are one run: 'gateskip'"):
        read_runs(tmp_path)


def test_methods_without_training(tmp_path: Path) -> None:
    untrained(tmp_path, "random", 1.4, 5.0, 7.0)
    untrained(tmp_path, "shortgpt", 1.4, 2.0)
    runs = read_runs(tmp_path)
    assert [(r.method, r.saved_macs, r.loss) for r in runs] == [
        ("dense", 0.0, 1.4), ("random", 0.1, 5.0), ("random", 0.2, 7.0), ("shortgpt", 0.1, 2.0),
    ]  # fmt: skip
    assert [r.realised_macs for r in runs] == pytest.approx([0.0, 0.11, 0.21, 0.11])
    assert {r.bench for r in runs} == {"smollm2_untrained"}
    assert {r.accuracy for r in runs} == {None}
    untrained(tmp_path, "every_second", 1.5, 2.0)
    with pytest.raises(DataError, match=r"random\.json: rows: the dense model's loss is 1\.4"):
        read_runs(tmp_path)
    path = tmp_path / "smollm2" / "untrained_every_second.json"
    path.write_text(path.read_text().replace('"loss": 2.0', '"loss": null'))
    with pytest.raises(DataError, match=r"rows\[1\]\.loss is None"):
        read_runs(tmp_path)


def test_over_seeds(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.6, 0.7, 0.8)):
        write(tmp_path, f"g{seed}", seed=seed, accuracy=accuracy, realised_macs=0.24 + seed / 100)
    write(tmp_path, "g3", seed=3, accuracy=None, loss=None, collapsed=True)
    write(tmp_path, "control0", method="control", saved_macs=0, accuracy=0.8, loss=0.5)
    write(tmp_path, "control2", method="control", saved_macs=0, accuracy=1.0, loss=0.5, seed=2)
    write(tmp_path, "random0", method="random", accuracy=0.1)
    control, gates, random = summaries(read_runs(tmp_path))
    assert (gates.seeds, gates.collapsed) == (4, 1)
    assert gates.accuracy is not None
    assert gates.accuracy.n == 3
    assert gates.accuracy.mean == pytest.approx(0.7)
    assert gates.accuracy.interval == t_interval([0.6, 0.7, 0.8])
    assert gates.realised_macs is None, "one run does not say"
    assert gates.mean_of("realised_macs") == pytest.approx(0.25)
    assert gates.mean_of("peak_memory_mb") is None
    # Paired: seeds 0 and 2 have a control.
    assert gates.accuracy_kept is not None
    assert gates.accuracy_kept.interval == t_interval([0.6 / 0.8, 0.8 / 1.0])
    assert gates.loss_ratio is not None
    assert gates.loss_ratio.mean == 2.0
    assert control.accuracy_kept is not None
    assert control.accuracy_kept.mean == 1.0
    assert random.accuracy is not None
    assert random.accuracy.interval is None
    assert random.accuracy_kept is not None
    assert random.accuracy_kept.mean == pytest.approx(0.125)


def test_which_control(tmp_path: Path) -> None:
    write(tmp_path, "a", method="control", saved_macs=0)
    write(tmp_path, "b", method="control", saved_macs=0, config={"variant": "long"})
    write(tmp_path, "c", bench="smollm2", method="control", saved_macs=0)
    write(tmp_path, "zero", method="control", saved_macs=0, seed=5, accuracy=0.0)
    write(tmp_path, "z", seed=5)
    runs = read_runs(tmp_path)

    def control(**fields: Any) -> Run | None:
        path = write(tmp_path / "asked", "x", **fields)
        (asked,) = read_runs(tmp_path / "asked")
        path.unlink()
        return control_of(asked, runs)

    names = [
        found.file if (found := control(**fields)) else None
        for fields in (
            {}, {"config": {"variant": "long"}}, {"config": {"variant": "frozen"}}, {"seed": 9},
        )
    ]  # fmt: skip
    assert names == ["a.json", "b.json", "a.json", None]
    zero = next(s for s in summaries(runs) if s.bench == "lab" and s.method == "gateskip")
    assert zero.accuracy_kept is None, "no share of nothing"
    assert zero.loss_ratio is not None


def test_gates_against_others(tmp_path: Path) -> None:
    def seeds(method: str, accuracies: tuple[float, ...], **fields: Any) -> None:
        for seed, accuracy in enumerate(accuracies):
            write(
                tmp_path, f"{method}{fields.get('saved_macs', '')}_{seed}", method=method,
                seed=seed, accuracy=accuracy, loss=1 - accuracy, **fields,
            )  # fmt: skip

    seeds("gateskip", (0.60, 0.61, 0.62))
    seeds("gateskip", (0.70, 0.71, 0.72), saved_macs=0.1)
    seeds("apart_below", (0.2, 0.21, 0.22))
    seeds("apart_above", (0.8, 0.82, 0.81))
    seeds("near", (0.6, 0.58, 0.65))
    seeds("single", (0.3,))
    seeds("elsewhere", (0.3, 0.3), saved_macs=0.5)
    seeds("control", (0.9, 0.9, 0.91), saved_macs=0.0)
    write(tmp_path, "ablation", method="near", config={"variant": "x"})
    for seed in (7, 8):
        write(tmp_path, f"other{seed}", method="other_seeds", seed=seed, accuracy=0.1 * seed)
    runs = read_runs(tmp_path)
    found = comparisons(summaries(runs), "lab", "accuracy")
    assert {(c.other.method, c.gates.saved_macs): c.verdict for c in found} == {
        ("apart_above", 0.25): "worse", ("apart_below", 0.25): "better", ("near", 0.25): "overlap",
        ("other_seeds", 0.25): "overlap", ("single", 0.25): "unknown", ("control", 0.1): "worse",
        ("control", 0.25): "worse",
    }  # fmt: skip
    named = {c.other.method: c for c in found if c.gates.saved_macs == 0.25}
    assert named["near"].gain == paired_difference(
        {0: 0.60, 1: 0.61, 2: 0.62}, {0: 0.6, 1: 0.58, 2: 0.65}
    )
    assert named["other_seeds"].gain is named["other_seeds"].p_holm is None
    assert named["single"].gain is not None
    assert named["single"].gain.mean == pytest.approx(0.3)
    assert named["single"].p_holm is None
    three = ("apart_above", "apart_below", "near")
    p_values = [c.gain.p_student for n in three if (c := named[n]).gain is not None]
    assert [named[n].p_holm for n in three] == holm([p for p in p_values if p is not None])
    by_loss = {
        c.other.method: c
        for c in comparisons(summaries(runs), "lab", "loss")
        if c.gates.saved_macs == 0.25
    }
    for name in three:  # less loss is better
        assert by_loss[name].verdict == named[name].verdict
        assert by_loss[name].gain is not None
        assert named[name].gain is not None
        assert by_loss[name].gain.mean == pytest.approx(named[name].gain.mean)
    assert comparisons(summaries(runs), "smollm2", "accuracy") == []
