"""Every worked answer is recomputed; the problems are seeded and no question comes twice."""

import importlib.util
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
SCRIPT = DEMO / "word_problems.py"
EQUATION = re.compile(r"(\d[\d +*/-]*) = (-?\d+)")


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_word_problems", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


problems = _load()


def _value(expression: str) -> float:
    """The value of digits and + - * /, read left to right with the usual precedence."""
    assert re.fullmatch(r"[\d +*/-]+", expression)
    return eval(expression, {"__builtins__": {}})


@pytest.mark.parametrize("template", problems.TEMPLATES, ids=lambda t: t.__name__)
def test_answers_follow_from_the_steps(template):
    for seed in range(500):
        question, steps, answer = template(random.Random(seed))
        results = []
        for step in steps:
            found = EQUATION.findall(step)
            assert found, f"a step without arithmetic: {step!r}"
            for left, right in found:
                assert _value(left) == int(right), step
                results.append(int(right))
        assert results[-1] == answer
        assert answer >= 0, question
        assert re.search(r"\?|Give the sum", question)


def test_same_seed_same_problems():
    assert problems.generate(100, seed=3) == problems.generate(100, seed=3)
    assert problems.generate(100, seed=3) != problems.generate(100, seed=4)


def test_no_question_twice_and_none_of_the_avoided():
    first = {row["prompt"] for row in problems.generate(600, seed=0)}
    second = {row["prompt"] for row in problems.generate(150, seed=1, avoid=frozenset(first))}
    assert len(first) == 600
    assert len(second) == 150
    assert not first & second


def test_every_template_is_listed_once():
    assert len(problems.TEMPLATES) >= 25
    assert len({t.__name__ for t in problems.TEMPLATES}) == len(problems.TEMPLATES)


def test_completion_ends_in_the_answer():
    for row in problems.generate(200, seed=5):
        assert set(row) == {"prompt", "completion"}
        last_step, mark = row["completion"].split("\n")[-2:]
        assert re.fullmatch(r"#### \d+", mark)
        assert EQUATION.findall(last_step)[-1][1] == mark.removeprefix("#### ")


def test_command_line_writes_jsonl(tmp_path):
    out = tmp_path / "deep" / "problems.jsonl"
    command = [sys.executable, str(SCRIPT), "--count", "40", "--seed", "7", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert rows == problems.generate(40, seed=7)
    assert [p.name for p in out.parent.iterdir()] == ["problems.jsonl"]
