"""How fast the arms of ``trained.py --models`` are, into their results; see ``timed.py``.

    python experiments/smollm2/timing.py experiments/results/smollm2 build/smollm2/models MODEL

Text is the demo's held-out one, in windows of 512 tokens and 32 that are fed one by one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from timed import Timed, add_options, time_all
from trained import GATES

from gateskip.data import encode, read_texts

DATA = Path(__file__).resolve().parents[2] / "examples" / "demo" / "data" / "heldout.jsonl"
PROMPT, NEW, WINDOWS = 512, 32, 3


def main(arguments: list[str] | None = None) -> None:
    """All arms that have a model and no time yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, batch=1)
    parser.add_argument("model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options = parser.parse_args(arguments)
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    text = torch.cat([s.ids for s in encode(read_texts(DATA), tokenizer, 4096)])

    def windows(batch: int) -> torch.Tensor:
        wanted = WINDOWS * batch * (PROMPT + NEW)
        assert text.shape[0] >= wanted, f"batch={batch} needs {wanted} tokens of {DATA.name}"
        return text[:wanted].view(WINDOWS, batch, PROMPT + NEW)

    timed = Timed(
        dense=lambda: AutoModelForCausalLM.from_pretrained(
            options.model, dtype=getattr(torch, options.dtype)
        ).eval(),
        windows=windows, prompt=PROMPT, new=NEW,
        gates={"kind": GATES["kind"]},
    )  # fmt: skip
    time_all(timed, options)


if __name__ == "__main__":
    main()
