"""Training, calibration, development and test text for the experiments on SmolLM2-135M.

    python experiments/smollm2/texts.py DATA OUT

DATA holds ``gsm8k_train.jsonl``, ``dolly_hhrlhf_small.jsonl`` and ``wikitext2_valid.txt`` under
``train/`` and, for the tests only, ``gsm8k_test.jsonl`` and ``wikitext2_test.txt`` under ``eval/``
(public sets, each under its own licence; none is part of this repository).

mix.jsonl, for training: GSM8K's first 6,973 training problems, Dolly, WikiText-2 validation but its
last 100 paragraphs, the demo's text. cal.jsonl, for thresholds: 150 other rows of these kinds.
dev_*.jsonl, for choosing recipes: the last 500 GSM8K training problems, those 100 paragraphs.
*_test.jsonl, read for figures only: parts of the two test sets.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "data" / "fit.jsonl"
DEVELOPMENT = 500  # the last problems of GSM8K's training file
PARAGRAPH = 300  # characters of the shortest paragraph used


def _rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:  # str.splitlines would split at U+2028, too
        return [json.loads(line) for line in file if line.strip()]


def _problems(path: Path) -> list[dict[str, str]]:
    return [
        {"prompt": row["question"], "completion": row["answer"], "source": "gsm8k"}
        for row in _rows(path)
    ]


def _paragraphs(path: Path) -> list[dict[str, str]]:
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    kept = [line for line in lines if len(line) >= PARAGRAPH and not line.startswith("=")]
    return [{"text": line, "source": "wikitext2"} for line in kept]


def build(data: Path) -> dict[str, list[dict[str, Any]]]:
    """All files' rows by name; the same for the same data."""
    train, test = data / "train", data / "eval"
    rng = random.Random(0)
    problems = _problems(train / "gsm8k_train.jsonl")
    problems, development = problems[:-DEVELOPMENT], problems[-DEVELOPMENT:]
    prose = _paragraphs(train / "wikitext2_valid.txt")
    prose, prose_development = prose[:-100], prose[-100:]
    chat = [
        {"prompt": row["prompt"], "completion": row["response"], "source": "dolly"}
        for row in _rows(train / "dolly_hhrlhf_small.jsonl")
    ]
    demo = _rows(DEMO)
    parts = [problems, prose, chat, demo]
    for part in parts:
        rng.shuffle(part)
    calibration = problems[:70] + prose[:40] + chat[:20] + demo[:20]
    mix = problems[70:4070] + prose[40:] + chat[20:] + demo[20:]
    for rows in (mix, calibration):
        rng.shuffle(rows)
    return {
        "mix": mix,
        "cal": calibration,
        "dev_gsm8k": development,
        "dev_wikitext2": prose_development,
        "gsm8k_test": _problems(test / "gsm8k_test.jsonl")[:200],
        "wikitext2_test": _paragraphs(test / "wikitext2_test.txt")[:120],
    }


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in build(args.data).items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
