"""Documents of the tasks beside this file, from JSONL files in the folder ``GATESKIP_EVAL_DATA``.

Every file is shuffled once with the seed 0, so that ``--limit 500`` are 500 documents drawn alike,
the same ones in every run, and a larger limit holds those of a smaller one.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import datasets

FOLDER = "GATESKIP_EVAL_DATA"
SEED = 0


def load(file: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The split ``test`` of a file; lm-eval passes a task's metadata as well.

    Raises:
        FileNotFoundError: the folder is not named, or has no such file.
    """
    if FOLDER not in os.environ:
        raise FileNotFoundError(f"set {FOLDER} to the folder of {file} and its like.")
    lines = Path(os.environ[FOLDER], file).read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line.strip()]
    random.Random(SEED).shuffle(rows)
    return {"test": datasets.Dataset.from_list(rows)}
