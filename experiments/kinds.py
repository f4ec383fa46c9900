"""Which kinds of token skip: saved gates, beside what chance gives, with the permutation test.

    python experiments/kinds.py experiments/results/kinds_smollm2_135m.json \\
        --gates pretrained/smollm2-135m-instruct --model build/demo/SmolLM2-135M-Instruct \\
        --data examples/demo/data/heldout.jsonl

``of another text`` gives every text's tokens the kinds of another text: what the test finds there
is what the test invents.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import gateskip
from gateskip.data import read_texts
from gateskip.evaluation.header import run_header
from gateskip.explain.kinds import skips_by_kind

CONTROL = "of another text"


def main(arguments: list[str] | None = None) -> None:
    """Gates at every budget, the control at the middle one; prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--gates", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--compute", type=float, nargs="+", default=[0.85, 0.75, 0.6])
    parser.add_argument("--max-tokens", type=int, default=20_000)
    options = parser.parse_args(arguments)
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    model = gateskip.load(options.gates, options.model).eval()
    texts, rows = read_texts(options.data), []
    arms = [("gateskip", compute) for compute in options.compute]
    for name, compute in [*arms, (CONTROL, arms[len(arms) // 2][1])]:
        with gateskip.budget(model, compute=compute):
            found = skips_by_kind(
                model, texts, tokenizer, max_tokens=options.max_tokens,
                of_another_text=name == CONTROL,
            )  # fmt: skip
        rows.append({"method": name, "compute": compute} | found.to_json())
        for row in found.rows:
            gap = "" if row.difference is None else f"{100 * row.difference:+6.1f}"
            p = "" if row.p_holm is None else f"{row.p_holm:.4f}"
            print(f"{name} {compute:.2f} {row.kind:14} {row.skip_rate:6.1%} {gap:7} {p}")
    header = run_header(f"python experiments/kinds.py {options.out.name}")
    header |= {"gates": Path(options.gates).name, "data": options.data.name}
    part = options.out.with_suffix(".tmp")
    part.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    os.replace(part, options.out)


if __name__ == "__main__":
    main()
