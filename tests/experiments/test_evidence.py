"""The evidence page on made-up results: complete, partial and none; stale pages are found."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import evidence  # noqa: E402
import evidence_figures  # noqa: E402
import evidence_instead  # noqa: E402
import published  # noqa: E402

from gateskip.errors import DataError  # noqa: E402
from gateskip.evaluation.runs import read_runs  # noqa: E402
from gateskip.evaluation.statistics import holm, t_interval, wilson_interval  # noqa: E402

SEEDS = 3
#: Mean accuracy by method and saving.
LEVELS = {
    ("control", 0.0): 0.90, ("gateskip", 0.0): 0.89, ("gateskip", 0.15): 0.85,
    ("gateskip", 0.25): 0.60, ("random", 0.15): 0.40, ("random", 0.25): 0.30,
    ("shortgpt", 0.15): 0.84, ("shortgpt", 0.25): 0.70,
}  # fmt: skip


def write(root: Path, name: str, **fields: Any) -> None:
    given: dict[str, Any] = {
        "bench": "lab", "seconds": 60.0,
        "config": {"steps": 300, "rate": 0.003, "data": "/some/folder"},
        "versions": {"torch": "2.13.0", "cpu": "some", "date": "never shown"}, "questions": 200,
    }  # fmt: skip
    given |= fields
    path = root / given["bench"] / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(given))


def fill(root: Path) -> None:
    noise = random.Random(0)
    for (method, saved), level in LEVELS.items():
        for seed in range(SEEDS):
            accuracy = round(level + noise.uniform(-0.01, 0.01), 3)
            write(
                root, f"{method}_{saved}_{seed}", method=method, saved_macs=saved, seed=seed,
                accuracy=accuracy, loss=1 - accuracy, realised_macs=saved - 0.002,
                skip_rate=saved + 0.05, prefill_speedup=1.0 + saved, peak_memory_mb=500 + seed,
            )  # fmt: skip
    for seed in range(SEEDS):
        write(
            root, f"vector_{seed}", method="gateskip", saved_macs=0.15, seed=seed,
            accuracy=0.8 - seed / 100, loss=0.3, config={"variant": "vector"},
        )  # fmt: skip
    write(
        root, "gateskip_failed", method="gateskip", saved_macs=0.15, seed=9, accuracy=None,
        loss=None, collapsed=True,
    )  # fmt: skip
    write(root, "once", method="every_second", saved_macs=0.15, seed=0, accuracy=0.5, loss=0.5)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    fill(tmp_path / "results")
    return tmp_path / "results"


def run(monkeypatch: pytest.MonkeyPatch, results: Path, page: Path, *more: str) -> None:
    page.parent.mkdir(exist_ok=True)
    arguments = ["evidence.py", "--results", str(results), "--page", str(page), *more]
    monkeypatch.setattr(sys, "argv", arguments)
    evidence.main()


def values(results: Path, method: str, saved: float, metric: str = "accuracy") -> list[float]:
    return [
        getattr(r, metric)
        for r in read_runs(results)
        if (r.method, r.saved_macs, r.variant) == (method, saved, "")
        and getattr(r, metric) is not None
    ]


def row(text: str, start: str, nth: int = 0) -> list[str]:
    lines = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in lines[nth].strip("|").split("|")]


def test_tables(results: Path) -> None:
    text = evidence.page(read_runs(results))
    found = values(results, "gateskip", 0.15)
    interval = t_interval(found)
    mean = f"{100 * sum(found) / 3:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}] (3)"
    assert row(text, "`gateskip`")[2] == f"{mean}, 1 without, 1 collapsed"
    assert row(text, "`control`")[2] == "", "it saves nothing"
    assert row(text, "`every_second`")[2] == "50.0 – (1)"
    by = wilson_interval(100, 200)
    single = f"`every_second` at 15 % [{100 * by.low:.1f}, {100 * by.high:.1f}] of 200."
    assert f"(Wilson): {single}" in text
    assert "29 runs. The same in all, variants apart: rate 0.003, steps 300." in text
    assert "Not at the same net saving" not in text
    assert "Made with torch 2.13.0, cpu some." in text
    assert "never shown" not in text
    assert "14.8 % (20 % of pairs)" in text
    kept = values(results, "random", 0.25)
    control = values(results, "control", 0.0)
    share = sum(a / c for a, c in zip(kept, control, strict=True)) / 3
    assert f"{100 * share:.1f} [" in text
    assert "| `shortgpt` | 25 % | 60 | 1.25× | 501 |" in text
    assert row(text, "`gateskip`", -1)[:3] != []
    variant = next(line for line in text.splitlines() if line.startswith("| `gateskip` | vector |"))
    assert variant.split(" | ")[3].startswith("79.0 [")
    assert "## Beside the published figures" in text
    assert row(text, "scalar gate")[1:3] == ["20.4", "87.9"], "our main form"
    assert row(text, "scalar gate")[4] == "100.0"
    assert row(text, "vector gate")[1:] == [
        "23.2", "100.0", "79.0 [76.5, 81.5] (3)", f"{79.0 / (sum(found) / 3):.1f}"
    ]  # fmt: skip


def test_the_dense_model_is_the_same_for_all_seeds(results: Path) -> None:
    write(results, "dense", method="dense", saved_macs=0.0, seed=7, accuracy=0.99, loss=0.01)
    text = evidence.page(read_runs(results))
    line = next(line for line in text.splitlines() if line.startswith("| 15 % | `dense` |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[-1] == "apart, gates worse"
    assert "(3)" in cells[4]
    assert "`dense` 99.0 – (1): **gates lose**" in text


def test_sets_of_questions_and_texts(results: Path) -> None:
    assert "By set of questions" not in evidence.page(read_runs(results))
    for seed, right in ((0, 0.4), (1, 0.6)):
        write(
            results, f"sets{seed}", bench="smollm2", method="gateskip", saved_macs=0.25, seed=seed,
            accuracy=right, loss=1.5, loss_wikitext2=3.5, loss_full_budget=1.25 + seed / 10,
            realised_macs_wikitext2=0.22,
            tasks={"piqa_local": right, "arc_easy_local": right / 2},
        )  # fmt: skip
    text = evidence.page(read_runs(results))
    beside = ["loss on answers, nothing skipped", "loss on WikiText-2", "saved of WikiText-2, %"]
    assert f"| {' | '.join(['method', 'to save', 'arc_easy', 'piqa', *beside])} |" in text
    cells = row(text[text.index("By set of questions") :], "`gateskip`")
    assert cells[1] == "25 %"
    assert [cell.partition(" [")[0] for cell in cells[2:]] == [
        "25.0",
        "50.0",
        "1.300",
        "3.500",
        "22.0",
    ]
    assert all(cell.endswith("(2)") for cell in cells[2:])
    write(
        results, "sets0", bench="smollm2", method="gateskip", saved_macs=0.25, seed=0,
        accuracy=0.5, loss=1.5, tasks={"piqa_local": 40},
    )  # fmt: skip
    with pytest.raises(DataError, match="tasks"):
        read_runs(results)


def test_kinds_of_tokens(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(method: str, compute: float, rate: float) -> dict[str, Any]:
        layers = {"0": rate, "10": 1.0, "2": 0.0}
        word = {
            "kind": "word", "tokens": 9, "skip_rate": rate, "difference": 0.031, "p": 0.001,
            "p_holm": 0.0004, "by_layer": layers,
        }  # fmt: skip
        first = word | {"kind": "beginning", "difference": None, "p": None, "p_holm": None}
        return {
            "method": method, "compute": compute, "tokens": 1234, "texts": 7, "skip_rate": rate,
            "explained": 0.23, "rows": [first, word],
        }  # fmt: skip

    rows = [
        row("gateskip", 0.85, 0.2),
        row("gateskip", 0.75, 0.3),
        row("of another text", 0.75, 0.25),
    ]
    (results / "kinds_small.json").write_text(
        json.dumps({"header": {"gates": "g", "data": "d"}, "rows": rows})
    )
    page = tmp_path / "docs" / "evidence.md"
    run(monkeypatch, results, page)
    text = page.read_text()
    assert "| word | 20.0 %, +3.1 (p < 0.001) | 30.0 %, +3.1 (p < 0.001) | 25.0 %," in text
    assert "| beginning | 20.0 % | 30.0 % | 25.0 % |" in text
    assert "1,234 tokens of 7 texts." in text
    assert "gates at 25 % saved" in text
    layers = text.split("### Skip rates by layer")[1].split("##")[0].splitlines()
    assert [line for line in layers if line.startswith("| ")][1:] == [
        "| 0 | 30 |", "| 2 | 0 |", "| 10 | 100 |"
    ]  # fmt: skip
    run(monkeypatch, results, page, "--check")
    (results / "kinds_small.json").unlink()
    with pytest.raises(SystemExit, match="out of date"):
        run(monkeypatch, results, page, "--check")


def test_what_all_runs_have_in_common(tmp_path: Path) -> None:
    for seed in (0, 1):
        config = {"steps": 300, "rate": seed, "variant": "", "list": [1]}
        write(
            tmp_path, str(seed), method="control", saved_macs=0, seed=seed, accuracy=0.5,
            loss=1.0, config=config,
        )  # fmt: skip
    assert "2 runs. The same in all, variants apart: steps 300." in evidence.page(
        read_runs(tmp_path)
    )


def test_differences_are_paired_and_corrected(results: Path) -> None:
    text = evidence.page(read_runs(results))
    first = text.split("### Gates beside the others: accuracy")[1].split("###")[0]
    lines = [line for line in first.splitlines() if line.startswith("| ")][1:]
    cells = {
        (c[0], c[1]): c for c in ([x.strip() for x in li.strip("|").split("|")] for li in lines)
    }
    gates, others = (values(results, m, 0.25) for m in ("gateskip", "shortgpt"))
    gain = t_interval([100 * (g - o) for g, o in zip(gates, others, strict=True)])
    middle = (gain.low + gain.high) / 2
    told = f"{middle:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}] (3)"
    assert cells["25 %", "`shortgpt`"][4] == told
    assert cells["25 %", "`shortgpt`"][8] == "apart, gates worse"
    assert cells["15 %", "`random`"][8] == "apart, gates better"
    assert cells["15 %", "`random`"][6] == "0.250", "two of eight sign patterns"
    assert cells["15 %", "`every_second`"][5:] == ["–", "–", "–", "one seed"]
    assert cells["15 %", "`control`"][8] == "apart, gates worse"
    skipping = [
        ("15 %", "`random`"),
        ("15 %", "`shortgpt`"),
        ("25 %", "`random`"),
        ("25 %", "`shortgpt`"),
    ]
    p = {key: cells[key][5] for key in skipping}
    if all("<" not in value for value in p.values()):
        corrected = dict(zip(p, holm([float(v) for v in p.values()]), strict=True))
        for key in skipping:
            assert float(cells[key][7]) == pytest.approx(corrected[key], abs=0.01)


def test_unequal_savings_are_said(results: Path) -> None:
    for file in results.glob("lab/shortgpt_0.25_*.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"realised_macs": 0.29}))
    text = evidence.page(read_runs(results))
    told = "Not at the same net saving: `shortgpt` at 25 % saved 29 %, gates 24.8 %."
    assert text.count(told) == 2, "with accuracy and with loss"


def test_where_gates_lose_is_computed(results: Path) -> None:
    text = evidence.page(read_runs(results))
    part = text[text.index("### Where gates lose") : text.index("### Time and memory")]
    accuracy, loss = part.split("By loss, against methods that skip")
    assert "gates are better, with intervals apart, in 2 of 5 comparisons. They are not" in accuracy
    bullets = [line for line in accuracy.splitlines() if line.startswith("- ")]
    unknown = "- Without a second seed, and so without an interval, gates' mean is better"
    assert [b.split(":")[0] for b in bullets] == [
        "- `shortgpt` at 15 %", "- `shortgpt` at 25 %", unknown,
        "- `control` at 0 %", "- `control` at 15 %", "- `control` at 25 %",
    ]  # fmt: skip
    assert "the intervals overlap" in bullets[0]
    assert "**gates lose**, intervals apart" in bullets[1]
    assert bullets[2] == f"{unknown}: `every_second` at 15 %."
    assert "`random` at" not in accuracy
    assert "in 2 of 5 comparisons" in loss


def test_gates_alone_and_gates_ahead(tmp_path: Path) -> None:
    for seed in range(3):
        noise = seed / 100
        write(
            tmp_path, f"g{seed}", method="gateskip", saved_macs=0.15, seed=seed, loss=None,
            accuracy=0.8 + noise,
        )  # fmt: skip
    text = evidence.page(read_runs(tmp_path))
    assert "there is nothing yet to hold gates against among methods that skip" in text
    assert "### Loss" not in text
    for seed in range(3):
        write(
            tmp_path, f"r{seed}", method="random", saved_macs=0.15, seed=seed, loss=None,
            accuracy=0.2 + seed / 100,
        )  # fmt: skip
    text = evidence.page(read_runs(tmp_path))
    assert "in 1 of 1 comparisons.\n" in text


def test_no_results_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "docs" / "evidence.md"
    run(monkeypatch, tmp_path / "none", page)
    text = page.read_text()
    assert "No results yet." in text
    assert "## Beside the published figures" in text
    assert list(page.parent.iterdir()) == [page]
    run(monkeypatch, tmp_path / "none", page, "--check")


def test_every_part_may_be_missing(results: Path) -> None:
    files = sorted(results.glob("*/*.json"))
    for file in files[::2]:
        file.unlink()
    assert "# Evidence" in evidence.page(read_runs(results))
    for keep in ("control", "random", "vector", "once"):
        for file in results.glob("*/*.json"):
            if not file.name.startswith(keep):
                file.rename(file.with_suffix(".aside"))
        assert "# Evidence" in evidence.page(read_runs(results))
        for file in results.glob("*/*.aside"):
            file.rename(file.with_suffix(".json"))


def test_figures_and_stale_pages(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "docs" / "evidence.md"
    figure = page.parent / "figures" / "evidence_lab.svg"
    with pytest.raises(SystemExit, match=r"evidence\.md, evidence_lab\.svg out of date"):
        run(monkeypatch, results, page, "--check")
    assert not page.exists()
    run(monkeypatch, results, page)
    run(monkeypatch, results, page, "--check")
    first = page.read_bytes(), figure.read_bytes()
    text = " ".join(t for t in ElementTree.parse(figure).getroot().itertext())
    for label in ("gateskip", "shortgpt", "control", "accuracy, %", "loss, nats per token"):
        assert label in text
    assert "date" not in text
    assert "(figures/evidence_lab.svg)" in page.read_text()
    run(monkeypatch, results, page)
    assert (page.read_bytes(), figure.read_bytes()) == first, "deterministic"
    (page.parent / "figures" / "usage.svg").touch()

    write(results, "later", method="random", saved_macs=0.35, seed=0, accuracy=0.1, loss=3.0)
    with pytest.raises(SystemExit, match=r"evidence\.md, evidence_lab\.svg out of date"):
        run(monkeypatch, results, page, "--check")
    run(monkeypatch, results, page)
    figure.unlink()
    with pytest.raises(SystemExit, match=r"error: evidence_lab\.svg out of date"):
        run(monkeypatch, results, page, "--check")
    run(monkeypatch, results, page)
    (figure.parent / "evidence_smollm2.svg").touch()
    with pytest.raises(SystemExit, match=r"evidence_smollm2\.svg out of date"):
        run(monkeypatch, results, page, "--check")
    run(monkeypatch, results, page)
    assert {p.name for p in figure.parent.iterdir()} == {"evidence_lab.svg", "usage.svg"}


def test_a_damaged_file_stops_it(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (results / "lab" / "damaged.json").write_text('{"bench": "lab"}')
    with pytest.raises(SystemExit, match=r"error: .*damaged\.json: \w+ is missing"):
        run(monkeypatch, results, tmp_path / "docs" / "evidence.md")


def test_alternatives_are_held_against_gates_that_are_as_fast(results: Path) -> None:
    gates = [(0.25, 1.5, 0.6), (0.0, 1.0, 0.9), (0.15, 1.2, 0.84)]
    for speed, how, figure in (
        (0.9, "faster at 0 % saved, 1.00×", 0.9),
        (1.1, "as fast at 7.5 % saved", 0.87),
        (1.2, "as fast at 15 % saved", 0.84),
        (1.35, "as fast at 20 % saved", 0.72),
        (2.0, "never as fast: 1.50× at 25 % saved", 0.6),
    ):
        found = evidence_instead.at_speed(gates, speed)
        assert found == (how, pytest.approx(figure)), speed
    write(
        results, "int8", method="int8", saved_macs=0.0, seed=0, accuracy=0.91, loss=0.2,
        realised_macs=0.0, prefill_speedup=1.2, decode_speedup=0.5, kernel_decode_speedup=3.0,
    )  # fmt: skip
    text = evidence.page(read_runs(results))
    lines = [line for line in text.splitlines() if line.startswith("| accuracy | `int8` |")]
    prefill = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert prefill[2:6] == ["0 %", "prefill", "1.20×", "91.0 – (1)"]
    assert len(lines) == 1, "gates' decoding was not timed"
    assert prefill[7].startswith("as fast at 20 % saved"), "1 + saving"
    assert not evidence_instead.section([])


def test_in_short(results: Path) -> None:
    text = evidence.page(read_runs(results))
    short = text[text.index("## In short") : text.index("## The reasoning lab")]
    rows = [[c.strip() for c in r.split("|")[1:-1]] for r in short.splitlines() if "`lab`" in r]
    at = {(row[1], row[2]): row for row in rows if len(row) == 10}
    assert set(at) == {(s, m) for s in ("15 %", "25 %") for m in ("accuracy", "loss")}
    assert at["15 %", "accuracy"][3].startswith("85.")
    assert at["15 %", "accuracy"][5].startswith("`shortgpt` 84.")
    assert at["15 %", "accuracy"][6:] == ["1", "1", "0", "1"], "random, shortgpt, every_second"
    assert at["25 %", "accuracy"][5].startswith("`shortgpt` 70.")
    assert at["25 %", "loss"][5].startswith("`shortgpt` 0.29"), "the least loss"
    assert at["25 %", "loss"][6:] == ["1", "0", "1", "0"]
    aims = [line for line in short.splitlines() if line.startswith("- Aim")]
    assert len(aims) == 1, "half was not measured"
    assert aims[0].endswith("missed."), "0.60 of 0.90"
    for seed in range(SEEDS):
        write(
            results, f"half_{seed}", method="gateskip", saved_macs=0.5, seed=seed,
            accuracy=0.9, loss=0.1,
        )  # fmt: skip
    text = evidence.page(read_runs(results))
    aims = [line for line in text.splitlines() if line.startswith("- Aim")]
    assert "50 % is saved. 99" in aims[1] or "50 % is saved. 100" in aims[1]
    assert aims[1].endswith("reached.")


def test_sizes_and_curves(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"config": {"variant": "03m", "size": "03m"}, "loss": 0.2}
    for seed in range(2):
        same = {"seed": seed, "saved_macs": 0.15}
        control = small | {"method": "control", "saved_macs": 0.0, "accuracy": 0.7}
        write(results, f"c{seed}", seed=seed, **control)
        write(results, f"g{seed}", **same, **small, method="gateskip", accuracy=0.35)
        write(
            results, f"r{seed}", **same, method="calm", accuracy=0.5, loss=1.0,
            curve=[[10, 2.0 + seed], [20, 1.0]] + [[30, 0.5]] * seed, accuracy_full_budget=0.66,
        )  # fmt: skip
    text = evidence.page(read_runs(results))
    lines = text[text.index("### Sizes") :].splitlines()[2:]
    assert lines[0] == "| saved | method | as above | 03m |"
    assert [line.split(" | ")[1:2] for line in lines[2:4]] == [["`control`"], ["`gateskip`"]]
    assert "35.0 [35.0, 35.0] (2)" in lines[3]
    assert "| `gateskip` | 03m |" not in text, "no ablation"
    own = text[text.index("## The reasoning lab with a model of 0.3 M") : text.index("## Beside")]
    assert "4 runs." in own
    assert row(own, "`gateskip`", 0)[1:] == ["", "35.0 [35.0, 35.0] (2)"]
    assert "`calm`" not in own, "another size's"
    assert "`control` at 15 %: gates 35.0 [35.0, 35.0] (2), `control` 70.0" in own
    assert "evidence_lab_03m.svg" in evidence.figures(read_runs(results))
    assert row(text, "`calm`", 2)[2] == "66.0"
    data = evidence.figures(read_runs(results))["evidence_curves_lab.svg"]
    assert data == {"15 %": {"calm": [(10.0, 2.5), (20.0, 1.0)]}}
    page = tmp_path / "docs" / "evidence.md"
    run(monkeypatch, results, page)
    run(monkeypatch, results, page, "--check")
    assert "(figures/evidence_curves_lab.svg)" in page.read_text()
    drawing = ElementTree.parse(page.parent / "figures" / "evidence_curves_lab.svg").getroot()
    assert "15 % saved" in " ".join(drawing.itertext())


def test_points_have_realised_savings(results: Path) -> None:
    from gateskip.evaluation.results import summaries

    points = evidence_figures.points(summaries(read_runs(results)), "lab")
    saved, mean, low, high = points["accuracy"]["random"][0]
    assert saved == pytest.approx(14.8)
    assert low < mean < high
    assert "vector" not in str(points)
    assert len(points["loss"]["gateskip"]) == 3


def test_published_figures_are_what_was_published() -> None:
    rows = {(r.method, r.model): r.at for r in reversed(published.ACCURACIES)}
    assert rows["gateskip", "Llama-3.2-1B"] == {0.0: 26.8, 0.15: 23.2, 0.25: 19.8}
    assert rows["mixture_of_depths", "Llama-3.2-1B"] == {0.0: 20.83, 0.15: 3.96}
    assert {name: value for _, name, value in published.ABLATIONS}["frozen"] == 12.7
