"""How fast the lab's arms are, into their results; see ``timed.py``.

python experiments/lab/timing.py experiments/results/lab build/lab/models
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from language import problems, tokenizer
from model import DENSE, SMALL, TEST_SEED
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from timed import Timed, add_options, time_all

#: All prompts are cut to so many tokens; the shortest has 37.
PROMPT, NEW, WINDOWS = 36, 48, 3


def windows(batch: int) -> torch.Tensor:
    """Ids of problems with their answers, int64 ``[windows, batch, PROMPT + NEW]``."""
    words, found = tokenizer(), []
    for row in problems(TEST_SEED, 20 * batch * WINDOWS):
        ids = words(row["prompt"] + row["completion"])["input_ids"]
        if len(ids) >= PROMPT + NEW:
            found.append(ids[: PROMPT + NEW])
        if len(found) == batch * WINDOWS:
            break
    return torch.tensor(found).view(WINDOWS, batch, PROMPT + NEW)


def main(arguments: list[str] | None = None) -> None:
    """All arms that have a model and no time yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, batch=16)
    parser.add_argument("--dense", default=str(DENSE))
    parser.add_argument("--smaller", default=str(SMALL))
    options = parser.parse_args(arguments)

    def plain(folder: str) -> Any:
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    timed = Timed(
        dense=lambda: plain(options.dense), smaller=lambda: plain(options.smaller),
        windows=windows, prompt=PROMPT, new=NEW, gates={"kind": "scalar"},
    )  # fmt: skip
    time_all(timed, options)


if __name__ == "__main__":
    main()
