"""lm-eval's tasks under budgets: exact beside plain HFLM; a ledger that batches do not change."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate, simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import gateskip
from gateskip.cli.main import app, main
from gateskip.config import Budget
from gateskip.errors import AttachError, BudgetError, ConfigError, DataError
from gateskip.evaluation import harness
from gateskip.evaluation.harness import GateSkipLM, HarnessRow, harness_evaluate
from gateskip.skipping.ledger import Ledger
from models import VOCAB, gated, tiny, with_table

ROOT = Path(__file__).resolve().parents[2]
SPECIAL = ["<pad>", "<s>", "</s>"]
WORDS = [f"w{n}" for n in range(VOCAB - len(SPECIAL))]
CHOICE = """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_target: gold
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true},
              {metric: acc_norm, aggregation: mean, higher_is_better: true}]
metadata: {version: 2.5}
"""
ANSWER = """
task: answer
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
output_type: generate_until
test_split: test
doc_to_text: question
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: [w7, w9], max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two tasks on the same 12 questions of unequal lengths."""
    folder = tmp_path_factory.mktemp("tasks")
    choose = random.Random(0)

    def words(count: int) -> str:
        return " ".join(choose.choices(WORDS, k=count))

    rows = [
        {
            "question": words(3 + 2 * number),
            "choices": [words(1 + (number + k) % 3) for k in range(3)],
            "gold": number % 3,
        }
        for number in range(12)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choose", CHOICE), ("answer", ANSWER)):
        text = text.replace("DATA", str(folder / "data.jsonl"))
        (folder / f"{name}.yaml").write_text(text.replace("CACHE", str(folder / "cache")))
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    split = Tokenizer(WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<pad>"))
    split.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=split, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture
def model() -> Any:
    return with_table(gated(compensation="low_rank"))


def requests(tasks: Path, name: str) -> list[Instance]:
    task = TaskManager(include_path=tasks, include_defaults=False).load([name])["tasks"][name]
    task.build_all_requests()
    return list(task.instances)


def answers(lm: Any, tasks: Path, name: str) -> Any:
    asked = requests(tasks, name)
    return getattr(lm, asked[0].request_type)(asked, disable_tqdm=True)


@pytest.mark.parametrize("name", ["choose", "answer"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_all_of_the_budget_is_plain_hflm(
    model: Any, tokenizer: Any, tasks: Path, name: str, batch_size: int
) -> None:
    plain = HFLM(tiny(), tokenizer=tokenizer, batch_size=batch_size)
    ungated = gateskip.attach(tiny(), gateskip.GateConfig(kind="unit", compensation="none"))
    whole = GateSkipLM(ungated, tokenizer, batch_size=batch_size)
    assert answers(whole, tasks, name) == answers(plain, tasks, name)
    assert whole.skip_rate == 0.0
    assert whole.macs_saved == 0.0
    dense, full = harness_evaluate(
        model, tokenizer, [name], budgets=[Budget(keep=1.0)], include_path=tasks,
        batch_size=batch_size,
    )  # fmt: skip
    task = TaskManager(include_path=tasks, include_defaults=False).load([name])
    found = evaluate(plain, task, log_samples=False)
    assert found is not None
    theirs = found["results"][name]
    for metric, value in dense.metrics.items():
        assert value == theirs[f"{metric},none"]
        assert dense.stderr[metric] == theirs[f"{metric}_stderr,none"]
    assert (dense.n, dense.skip_rate, full.skip_rate) == (12, 0.0, 0.0)
    assert not model.training


@pytest.mark.parametrize("name", ["choose", "answer"])
def test_batches_change_nothing(model: Any, tokenizer: Any, tasks: Path, name: str) -> None:
    alone, four = (
        GateSkipLM(model, tokenizer, keep=0.5, batch_size=size) for size in (1, 4)
    )  # fmt: skip
    one, other = answers(alone, tasks, name), answers(four, tasks, name)
    if name == "choose":
        assert [a for a, _ in one] == pytest.approx([a for a, _ in other], abs=1e-4)
        assert [greedy for _, greedy in one] == [greedy for _, greedy in other]
    else:
        assert one == other
        assert len({len(answer.split()) for answer in one}) > 1, "answers end apart"
    assert alone.skip_rate == pytest.approx(four.skip_rate, abs=1e-9)
    assert alone.macs_saved == pytest.approx(four.macs_saved, abs=1e-9)


@pytest.mark.parametrize("name", ["choose", "answer"])
def test_the_ledger_is_the_trace_of_single_requests(
    model: Any, tokenizer: Any, tasks: Path, name: str
) -> None:
    lm = GateSkipLM(model, tokenizer, compute=0.7, batch_size=4)
    found = answers(lm, tasks, name)
    with gateskip.budget(model, compute=0.7), gateskip.trace(model) as trace:
        alone = answers(HFLM(model, tokenizer=tokenizer, batch_size=1), tasks, name)
    assert len(found) == len(alone)
    assert lm.skip_rate == pytest.approx(trace.ledger.skip_rate, abs=1e-9)
    # Between trace and ledger stand rows of zeros that execution adds.
    exact = Ledger.of(call.without_padding() for call in trace.calls)
    assert lm.macs_saved == pytest.approx(1 - exact.compute, abs=1e-9)
    lm.reset()
    assert lm.skip_rate == lm.macs_saved == 0.0


def test_a_budget_changes_the_recorded_skip_rate(model: Any, tokenizer: Any, tasks: Path) -> None:
    gateskip.set_budget(model, keep=0.9)  # the model's own does not count
    budgets = [Budget(keep=1.0), Budget(keep=0.75), Budget(keep=0.5), Budget(compute=0.8)]
    rows = harness_evaluate(
        model, tokenizer, ["choose", "answer"], budgets=budgets, include_path=tasks, batch_size=4,
        limit=6, seed=3,
    )  # fmt: skip
    assert [(row.task, row.arm, row.budget) for row in rows] == [
        (task, arm, budget)
        for task in ("choose", "answer")
        for arm, budget in [("dense", ""), *(("gateskip", str(b)) for b in budgets)]
    ]
    for task in ("choose", "answer"):
        _, full, more, less, compute = (row for row in rows if row.task == task)
        assert full.skip_rate == 0.0
        assert full.macs_saved < 0, "net of gates"
        assert 0 < more.skip_rate < less.skip_rate
        assert more.macs_saved < less.macs_saved
        assert compute.skip_rate > 0
        assert (more.keep, more.compute, compute.keep, compute.compute) == (0.75, None, None, 0.8)
        assert (full.n, full.seed, compute.model) == (6, 3, "")
    assert rows[0].seed is None
    assert rows[0].version == 2.5
    assert set(rows[0].metrics) == set(rows[0].stderr) == {"acc", "acc_norm"}
    assert [
        HarnessRow(**row) for row in json.loads(json.dumps([*map(dataclasses.asdict, rows)]))
    ] == rows


def test_arms(tokenizer: Any, tasks: Path) -> None:
    model = with_table(gated())
    given = {"include_path": tasks, "batch_size": 4, "limit": 4}
    rows = harness_evaluate(
        model, tokenizer, ["choose"], budgets=[Budget(keep=0.5)], arm="control", **given
    )  # fmt: skip
    assert [row.arm for row in rows] == ["dense", "control"]
    assert rows[0].metrics == rows[1].metrics
    harness.state_of(model).backbone_trained = True
    with pytest.raises(ConfigError, match="reference="):
        harness_evaluate(model, tokenizer, ["choose"], **given)
    (row,) = harness_evaluate(
        model, tokenizer, ["choose"], budgets=[Budget(keep=0.5)], dense=False, **given
    )  # fmt: skip
    assert row.arm == "gateskip"
    rows = harness_evaluate(model, tokenizer, ["choose"], reference=tiny(), **given)
    assert [row.arm for row in rows] == ["dense"]


def test_generators_go_on_where_they_were(model: Any, tokenizer: Any, tasks: Path) -> None:
    before = random.getstate()
    harness_evaluate(model, tokenizer, ["choose"], include_path=tasks, limit=2)
    assert random.getstate() == before


def test_the_python_of_the_page_on_evaluation(
    model: Any, tokenizer: Any, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    code = code.replace('["arc_easy", "piqa"]', '["choose", "answer"], include_path=tasks')
    exec(compile(code, "evaluation.md", "exec"), {**globals(), **locals()})
    assert len(capsys.readouterr().out.splitlines()) == 4, "nothing but the page's own output"


@pytest.fixture
def saved(model: Any, tokenizer: Any, tmp_path: Path) -> Path:
    """base/ with a tokenizer, gates/ for it."""
    tiny().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    gateskip.save(model, tmp_path / "gates")
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # of lm-eval, which looks at the environment
def test_by_name_in_lm_eval(saved: Path, tasks: Path) -> None:
    found = {}
    for compute in (0.9, 0.7):
        results = simple_evaluate(
            "gateskip", f"gates={saved / 'gates'},base={saved / 'base'},compute={compute}",
            tasks=["choose"], batch_size=4, limit=6, device="cpu", bootstrap_iters=0,
            task_manager=TaskManager(include_path=tasks, include_defaults=False),
        )  # fmt: skip
        assert results is not None
        found[compute] = results["config"]["gateskip"]  # type: ignore[typeddict-item]
        assert found[compute]["budget"] == {"compute": compute}
        assert results["results"]["choose"]["sample_len"] == 6
    assert found[0.9]["skip_rate"] < found[0.7]["skip_rate"]
    assert found[0.9]["macs_saved"] < found[0.7]["macs_saved"]
    assert found[0.7]["versions"]["gateskip"] == gateskip.__version__
    assert json.loads(json.dumps(found[0.7])) == found[0.7]


def test_errors_come_first(
    model: Any, tokenizer: Any, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(given: Any = model, names: Any = ("choose",), **options: Any) -> None:
        harness_evaluate(given, tokenizer, names, **({"include_path": tasks} | options))

    own = functools.partial(TaskManager, include_defaults=False)  # the others take seconds to list
    monkeypatch.setattr(harness, "TaskManager", lambda **given: own(**given | own.keywords))
    monkeypatch.setattr(harness, "evaluate", lambda *args, **options: pytest.fail("work began"))
    with pytest.raises(AttachError):
        run(tiny())
    with pytest.raises(BudgetError, match="floor"):
        run(budgets=[Budget(keep=0.01)])
    with pytest.raises(BudgetError, match="calibrate"):
        run(gated(), budgets=[Budget(keep=0.5)])
    with pytest.raises(ConfigError, match=r"'chose' is unknown .* Did you mean 'choose'"):
        run(names=["chose"])
    with pytest.raises(ConfigError, match="names no task"):
        run(names=[])
    with pytest.raises(ConfigError, match="not a folder"):
        run(include_path=tasks / "none")
    with pytest.raises(ConfigError, match="batch_size=0"):
        run(batch_size=0)
    with pytest.raises(ConfigError, match="limit=0"):
        run(limit=0)
    with pytest.raises(ConfigError, match="arm='random'"):
        run(arm="random")
    with pytest.raises(ConfigError, match="exactly one of pretrained"):
        GateSkipLM()
    with pytest.raises(BudgetError, match="exactly one of"):
        GateSkipLM(model, tokenizer, keep=0.5, compute=0.5)
    with pytest.raises(BudgetError, match="floor"):
        GateSkipLM(model, tokenizer, keep=0.01)


def test_a_task_without_its_data(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    lost = CHOICE.replace("DATA", str(tmp_path / "none.jsonl")).replace("CACHE", str(tmp_path))
    (tmp_path / "choose.yaml").write_text(lost)
    with pytest.raises(DataError, match="tasks choose cannot be loaded"):
        harness_evaluate(model, tokenizer, ["choose"], include_path=tmp_path)


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    monkeypatch.delitem(sys.modules, "gateskip.evaluation.harness")
    with pytest.raises(ConfigError, match=r"pip install gateskip\[eval\]"):
        importlib.import_module("gateskip.evaluation.harness")


def test_command(saved: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["eval", str(saved / "gates"), "--base", str(saved / "base")]
    options = ["--tasks", "choose, answer", "--include-path", str(tasks), "--limit", "4"]
    result = CliRunner().invoke(
        app, [*given, *options, "--batch-size", "4", "--keep", "0.7", "--json", "-"]
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["header"]["lm_eval"]
    rows = [HarnessRow(**row) for row in found["rows"]]
    assert [(row.task, row.arm, row.n) for row in rows] == [
        ("choose", "dense", 4), ("choose", "gateskip", 4),
        ("answer", "dense", 4), ("answer", "gateskip", 4),
    ]  # fmt: skip
    assert rows[1].skip_rate > 0
    shown = CliRunner().invoke(app, [*given, *options, "--keep", "0.7"])
    assert "acc_norm" in shown.stdout
    assert "keep=0.7" in shown.stdout
    for arguments, message in (
        ([], "exactly one of --data FILE and --tasks"),
        (["--tasks", "choose", "--data", "x.jsonl"], "exactly one of --data FILE and --tasks"),
        (["--data", "x.jsonl", "--limit", "3"], "--limit is for --tasks"),
        (["--tasks", "choose", "--max-tokens", "3"], "--max-tokens is for --data"),
        ([*options, "--keep", "0.001"], "floor"),
    ):
        with pytest.raises(SystemExit):
            main([*given, *arguments])
        lines = capsys.readouterr().err.splitlines()
        assert message in lines[-1]
        assert len(lines) == 1


#: Of lm-eval's folders: the same two documents as they are there, and in our files.
OFFICIAL: dict[str, tuple[str, str, Any, Any]] = {
    "lambada_openai": (
        "lambada", "lambada_openai", lambda n: {"text": f"He said {n} words. So do I"},
        lambda n: {"context": f"He said {n} words. So do", "continuation": "I"},
    ),
    "piqa": (
        "piqa", "piqa",
        lambda n: {"goal": f"Open {n}?", "sol1": "Pull it", "sol2": "Go", "label": 1},
        lambda n: {"query": f"Question: Open {n}?\n", "choices": ["Pull it", "Go"], "gold": 1},
    ),
    "arc_easy": (
        "arc", "arc_easy",
        lambda n: {
            "question": f"Why {n}?", "choices": {"text": ["Yes.", "No."], "label": ["A", "B"]},
            "answerKey": "B",
        },
        lambda n: {"query": f"Question: Why {n}?", "choices": ["Yes.", "No."], "gold": 1},
    ),
    "openbook_qa": (
        "openbookqa", "openbookqa",
        lambda n: {
            "question_stem": f"Snow {n} is", "answerKey": "A",
            "choices": {"text": ["wet", "dry"], "label": ["A", "B"]},
        },
        lambda n: {"query": f"Snow {n} is", "choices": ["wet", "dry"], "gold": 0},
    ),
    "winogrande": (
        "winogrande", "winogrande",
        lambda n: {
            "sentence": f"Ann saw Eve {n} times as _ hid.", "option1": "Ann", "option2": "Eve",
            "answer": "2",
        },
        lambda n: {
            "context_options": [f"Ann saw Eve {n} times as {who}" for who in ("Ann", "Eve")],
            "continuation": "hid.", "gold": 1,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFICIAL)
def test_local_tasks_ask_what_lm_eval_asks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import lm_eval.tasks

    folder, theirs, official, ours = OFFICIAL[name]
    rows = [json.dumps(ours(n)) + "\n" for n in (1, 2)]
    (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    monkeypatch.setenv("GATESKIP_EVAL_DATA", str(tmp_path))
    local = TaskManager(
        include_path=ROOT / "experiments/smollm2/tasks", include_defaults=False
    ).load([f"{name}_local"])["tasks"][f"{name}_local"]
    there = Path(lm_eval.tasks.__file__).parent / folder
    split = datasets.Dataset.from_list([official(n) for n in (1, 2)])
    splits = {"train": split, "validation": split, "test": split}
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: splits)
    task = TaskManager(include_path=there, include_defaults=False).load([theirs])["tasks"][theirs]
    for each in (local, task):
        each.build_all_requests()
        each.metrics = {m for m in each.aggregation()}
    assert sorted(str(i.args) for i in local.instances) == sorted(
        str(i.args) for i in task.instances
    )
    assert len(local.instances) == (2 if name == "lambada_openai" else 4)
    assert local.metrics == task.metrics
    for document, other in zip(
        sorted(local.eval_docs, key=str), sorted(task.eval_docs, key=str), strict=True
    ):
        results = [(-5.0, False), (-4.0, True)][: 1 if name == "lambada_openai" else 2]
        assert local.process_results(document, results) == task.process_results(other, results)
