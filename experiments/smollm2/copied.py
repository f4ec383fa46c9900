"""Loss by whether a token could be copied from its context: new, seen before, or seen after the
same token before.

    python experiments/smollm2/copied.py MODEL TEXTS RESULT gateskip_25_s0:0.7 shortgpt_25_s0 ...

MODEL is the SmolLM2 folder, TEXTS what ``texts.py`` wrote; then names of models that ``trained.py
--models`` kept, with a budget where it is not 0.75. Text is WikiText-2's test text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

import gateskip
from gateskip.data import encode, read_texts, take_tokens
from gateskip.evaluation.header import run_header
from gateskip.execution.api import dense
from gateskip.skipping.ledger import Ledger

KINDS = ("new", "seen", "copied")
LONGEST, SHORTEST = 512, 40


def kinds(ids: Sequence[int]) -> list[int]:
    """Of every token but the first, which of ``KINDS`` it is in a text.

    ``copied``: it followed the same token before, as induction heads copy (arXiv 2209.11895).
    """
    seen, pairs, found = set(ids[:1]), set(), []
    for before, token in itertools.pairwise(ids):
        found.append(2 if (before, token) in pairs else int(token in seen))
        pairs.add((before, token))
        seen.add(token)
    return found


@torch.no_grad()
def measured(model: Any, texts: Sequence[Tensor]) -> dict[str, dict[str, float]]:
    """Tokens, mean loss and share of right guesses by kind."""
    total = torch.zeros(3, len(KINDS), dtype=torch.float64)
    for ids in texts:
        logits = model(ids[None]).logits[0, :-1].float()
        loss = functional.cross_entropy(logits, ids[1:], reduction="none")
        right = (logits.argmax(-1) == ids[1:]).float()
        kind = torch.tensor(kinds(ids.tolist()))
        total.index_add_(1, kind, torch.stack([torch.ones_like(loss), loss, right]).double())
    count, loss, right = total
    return {
        name: {"tokens": int(count[n]), "loss": float(loss[n] / count[n]),
               "right": float(right[n] / count[n])}
        for n, name in enumerate(KINDS)
    }  # fmt: skip


def row_of(model: Any, name: str, compute: float, texts: Sequence[Tensor]) -> dict[str, Any]:
    """A model at a budget, or without gates where it is the control."""
    if name.startswith("control"):
        with dense(model):
            return {"model": name, "macs_saved": 0.0} | measured(model, texts)
    with gateskip.budget(model, compute=compute), gateskip.trace(model) as trace:
        found = measured(model, texts)
    saved = 1.0 - Ledger.of(call.without_padding() for call in trace.calls).compute
    return {"model": name, "compute": compute, "macs_saved": saved} | found


def main() -> None:
    """All models named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("names", nargs="+", metavar="NAME[:COMPUTE]")
    parser.add_argument("--models", type=Path, default=Path("build/smollm2/models"))
    parser.add_argument("--max-tokens", type=int, default=12_000)
    parser.add_argument("--threads", type=int, default=None, help="of torch")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    samples = encode(read_texts(options.texts / "wikitext2_test.jsonl"), tokenizer, LONGEST)
    long = [sample for sample in samples if sample.ids.shape[0] >= SHORTEST]
    texts = [sample.ids for sample in take_tokens(long, options.max_tokens)]
    rows = []
    for given in options.names:
        name, _, compute = given.partition(":")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = gateskip.load(options.models / name, base=options.model, dtype="bfloat16")
        rows.append(row_of(model.eval(), name, float(compute or 0.75), texts))
        shown = " ".join(f"{kind} {rows[-1][kind]['loss']:.3f}" for kind in KINDS)
        print(f"{given}: saved {rows[-1]['macs_saved']:.3f}; {shown}", flush=True)
    result = {"header": run_header("python experiments/smollm2/copied.py"), "rows": rows}
    part = options.result.with_suffix(".tmp")
    part.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, options.result)


if __name__ == "__main__":
    main()
