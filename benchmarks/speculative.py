"""Speculative decoding beside plain decoding: ``python benchmarks/speculative.py --help``.

For every kind of text and every budget of the target: drafts × lengths, timed against plain
decoding on the same kernels, alternated, medians; acceptance, tokens per pass, MACs, and the share
of prompts whose tokens are plain decoding's (in bfloat16 a near-tie may fall the other way; the
largest gap of logits at the first difference is given). Beside it what bounds it: the time of a
pass over 1 to 9 tokens, and of a drafted token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, DynamicCache

import gateskip
from gateskip.cli.output import check_json, command_line, write_json
from gateskip.config import Budget
from gateskip.data import Sample, encode, read_texts
from gateskip.decoding import ExitLayer, LookupDraft
from gateskip.decoding.policies import as_policy
from gateskip.errors import DataError, GateSkipError
from gateskip.evaluation.header import run_header
from gateskip.execution.memory import rewind
from gateskip.execution.timing import keep_freed_memory
from gateskip.skipping.state import state_of

WIDTHS = (1, 2, 3, 4, 5, 6, 9, 13, 17)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gates", required=True, help="folder that gateskip.save wrote")
    parser.add_argument("--model", help="base model; default: the one saved with the gates")
    parser.add_argument(
        "--texts", nargs="+", required=True, metavar="KIND=FILE",
        help="prompts; KIND=FILE:SOURCE takes rows of one source",
    )  # fmt: skip
    parser.add_argument("--json", required=True, help="file for the result")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--target", type=float, nargs="+", default=[1.0, 0.75], help="keep")
    parser.add_argument("--draft-keep", type=float, nargs="*", default=[0.5, 0.3])
    parser.add_argument("--draft-tokens", nargs="+", default=["1", "2", "4", "auto"])
    parser.add_argument(
        "--store", nargs="*", default=[], metavar="KIND=FILE",
        help="texts to look drafts of a kind up in, as of --texts",
    )  # fmt: skip
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of texts without an answer")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def rows_of(where: str) -> list[Any]:
    """Rows of FILE, or of one SOURCE in it."""
    name, _, source = where.partition(":")
    rows = read_texts(name)
    if source:
        rows = [row for row in rows if isinstance(row, dict) and row.get("source") == source]
    return list(rows)


def prompts_of(where: str, tokenizer: Any, count: int, length: int) -> list[torch.Tensor]:
    """Id tensors ``[1, T]``, spread over all rows; a long text gives several.

    Raises:
        DataError: too few rows, or too short a text.
    """
    samples = encode(rows_of(where), tokenizer, 1 << 20)
    if len(samples) < count:
        ids = torch.cat([sample.ids for sample in samples])
        starts = range(0, ids.shape[0] - length, max((ids.shape[0] - length) // count, 1))
        found = [ids[at : at + length] for at in starts]
    else:
        found = [_cut(sample, length) for sample in samples[:: len(samples) // count]]
    if len(found) < count:
        raise DataError(f"{where} has {len(found)} prompts; give at most that many to --prompts.")
    return [ids[None] for ids in found[:count]]


def _cut(sample: Sample, length: int) -> torch.Tensor:
    first = int(sample.scored.to(torch.uint8).argmax())
    return sample.ids[:first] if first > 1 else sample.ids[:length]


def clock(step: Callable[[], Any], repeats: int = 7) -> float:
    """Median milliseconds."""
    found = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        step()
        found.append(time.perf_counter() - started)
    return 1e3 * statistics.median(found[1:])


@torch.no_grad()
def bounds(model: Any, ids: torch.Tensor, keeps: list[float]) -> dict[str, Any]:
    """Milliseconds of passes over several tokens, and of drafted ones, after ``ids``."""
    state, cache = state_of(model), DynamicCache(config=model.config)
    model(ids, cache=cache, use_cache=True, logits_to_keep=1)

    def passing(new: int) -> Callable[[], None]:
        fed = ids[:, :new].clone()
        places = torch.arange(ids.shape[1], ids.shape[1] + new)[None]

        def step() -> None:
            model(fed, cache=cache, use_cache=True, logits_to_keep=new, position_ids=places)
            rewind(cache, new)

        return step

    passes = {new: clock(passing(new)) for new in WIDTHS}
    drafts = {}
    tried: list[Any] = [*keeps, *(ExitLayer(n) for n in (2, 6, 12))]
    for draft in tried:
        with as_policy("draft", draft).on(state):
            drafts[str(draft)] = clock(passing(1))
    return {"pass_ms": passes, "draft_ms": drafts}


@torch.no_grad()
def first_gap(model: Any, a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Gap between the two best logits where two continuations part; None where they do not."""
    same = min(a.shape[1], b.shape[1])
    parts = (a[0, :same] != b[0, :same]).nonzero()
    if not parts.numel():
        return None
    at = int(parts[0])
    top = model(a[:, :at], use_cache=True, logits_to_keep=1).logits[0, -1].float().topk(2).values
    return float(top[0] - top[1])


def run(options: argparse.Namespace) -> None:
    """Time everything, print and write it."""
    check_json(options.json)
    keep_freed_memory()
    path = Path(options.json)
    done = json.loads(path.read_text()) if path.is_file() else {"rows": [], "gaps": {}}
    model = gateskip.load(options.gates, base=options.model, dtype=options.dtype)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(str(options.model or model.config._name_or_path))
    lengths = [int(t) if t.isdigit() else t for t in options.draft_tokens]
    done["header"] = run_header(command_line("python benchmarks/speculative.py", vars(options)))
    done["header"]["dtype"] = options.dtype
    console = Console()
    stores = dict(text.split("=", 1) for text in options.store)
    for kind, where in (text.split("=", 1) for text in options.texts):
        prompts = prompts_of(where, tokenizer, options.prompts, options.prompt_tokens)
        for keep in options.target:
            if any(r["text"] == kind and r["target"] == keep for r in done["rows"]):
                continue
            gateskip.set_budget(model, **Budget(keep=keep).to_json())
            policies: list[Any] = ["lookup"]
            if kind in stores:
                policies.append(LookupDraft.of(rows_of(stores[kind]), tokenizer))
            found = gateskip.tune_draft(
                model, prompts, draft_keep=options.draft_keep, draft_tokens=lengths,
                draft_policies=policies, new_tokens=options.new_tokens,
                max_prompts=len(prompts), repeats=options.repeats,
            )  # fmt: skip
            table = Table(title=f"{kind}, target keep={keep:g}", box=SIMPLE)
            for column in ("draft", "length", "speed", "accepted", "tokens/pass", "MACs", "same"):
                table.add_column(column, justify="left" if column == "draft" else "right")
            for each in found.to_json()["tried"]:
                done["rows"].append({"text": kind, "target": keep, **each})
                settings = each["settings"]
                draft = settings.get("draft_policy", settings.get("draft_keep", "none"))
                table.add_row(
                    str(draft), str(settings.get("draft_tokens", "")), f"{each['speedup']:.2f}×",
                    f"{each['acceptance']:.0%}", f"{each['tokens_per_pass']:.2f}",
                    f"{each['macs']:.2f}×", f"{each['same']:.0%}",
                )  # fmt: skip
            console.print(table)
            gaps = []
            for ids in prompts:
                given = {"max_new_tokens": options.new_tokens, "do_sample": False,
                         "attention_mask": torch.ones_like(ids)}  # fmt: skip
                plain = model.generate(ids, **given)
                other = gateskip.generate_speculative(model, ids, draft_policy="lookup", **given)
                gap = first_gap(model, plain, other)
                if gap is not None:
                    gaps.append(gap)
            done["gaps"][f"{kind} {keep:g}"] = gaps
            write_json(options.json, done)
        gateskip.set_budget(model, keep=1.0)
        if "bounds" not in done:
            done["bounds"] = bounds(model, torch.cat(prompts, 1)[:, :256], options.draft_keep)
            write_json(options.json, done)
            console.print(done["bounds"])


def main() -> int:
    """Run; 1 after an error of gateskip."""
    try:
        run(parse())
    except GateSkipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
