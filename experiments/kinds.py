"""Which kinds of token skip: saved gates beside the null, with the permutation test.

    python experiments/kinds.py experiments/results/kinds_smollm2_135m.json \\
        --gates pretrained/smollm2-135m-instruct --model build/demo/SmolLM2-135M-Instruct \\
        --fit examples/demo/data/fit.jsonl --data examples/demo/data/heldout.jsonl

`random` skips at the same budget and knows nothing of tokens: what the test finds for it is what
the test invents.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import gateskip
from gateskip import methods
from gateskip.data import read_texts
from gateskip.evaluation.header import run_header
from gateskip.explain.kinds import skips_by_kind


def main() -> None:
    """Both, at every budget; prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--gates", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--fit", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--compute", type=float, nargs="+", default=[0.85, 0.75, 0.6])
    parser.add_argument("--max-tokens", type=int, default=20_000)
    options = parser.parse_args()
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    plain = AutoModelForCausalLM.from_pretrained(options.model).eval()
    texts = read_texts(options.data)
    models = {
        "gateskip": gateskip.load(options.gates, options.model).eval(),
        "random": methods.apply("random", plain, read_texts(options.fit), tokenizer),
    }
    rows = []
    for name, model in models.items():
        for compute in options.compute:
            with gateskip.budget(model, compute=compute):
                found = skips_by_kind(model, texts, tokenizer, max_tokens=options.max_tokens)
            rows.append({"method": name, "compute": compute} | found.to_json())
            for row in found.rows:
                gap = "" if row.difference is None else f"{100 * row.difference:+6.1f}"
                p = "" if row.p_holm is None else f"{row.p_holm:.4f}"
                print(f"{name:9} {compute:.2f} {row.kind:14} {row.skip_rate:6.1%} {gap:7} {p}")
    command = f"python experiments/kinds.py {options.out.name}"
    text = json.dumps({"header": run_header(command), "rows": rows}, indent=1)
    part = options.out.with_suffix(".tmp")
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, options.out)


if __name__ == "__main__":
    main()
