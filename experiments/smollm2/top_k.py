"""Loss of long text against the keys that attention keeps, without training.

    python experiments/smollm2/top_k.py MODEL GATES TEXT experiments/results/top_k.json

Windows of ``--length`` tokens; the dense model, and gates at a budget.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import gateskip
from gateskip.cli.output import check_json, command_line, write_json
from gateskip.data import read_texts, text_windows
from gateskip.decoding import Dense
from gateskip.errors import GateSkipError
from gateskip.evaluation.header import run_header
from gateskip.skipping.state import state_of


def main() -> int:
    """Run; 1 after an error of gateskip."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("gates")
    parser.add_argument("text", type=Path)
    parser.add_argument("json")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--keys", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--compute", type=float, default=0.85)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    try:
        check_json(options.json)
        write_json(options.json, measured(options))
    except GateSkipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


@torch.no_grad()
def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Every k, without and with gates."""
    model = gateskip.load(options.gates, base=options.model, dtype=options.dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    shape = (1, options.length)
    windows = text_windows(read_texts(options.text), tokenizer, shape, options.windows)

    def losses() -> list[float]:
        found = []
        for ids in windows:
            logits = model(ids, use_cache=False).logits[0, :-1].float()
            found.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
        return found

    rows = []
    for name in ("dense", f"compute={options.compute:g}"):
        for k in (None, *sorted(options.keys, reverse=True)):
            gateskip.set_top_k_attention(model, k)
            context: Any = (
                Dense().on(state_of(model)) if name == "dense"
                else gateskip.budget(model, compute=options.compute)
            )  # fmt: skip
            with context, gateskip.trace(model) as trace:
                found = losses()
            rows.append({
                "arm": name, "k": k, "loss": statistics.mean(found), "losses": found,
                "macs": trace.ledger.compute,
            })  # fmt: skip
            print(rows[-1] | {"losses": None})
    gateskip.set_top_k_attention(model, None)
    given = vars(options) | {"text": str(options.text)}
    return {
        "header": run_header(command_line("python experiments/smollm2/top_k.py", given)),
        "length": options.length, "windows": len(windows), "rows": rows,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
