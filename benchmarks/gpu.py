"""Gated models on one GPU, in one call: ``python benchmarks/gpu.py --json FILE``.

First correctness: the Triton kernels against torch operations, and compacted against masked, on
tiny models. Then speed, on models of known shapes with random weights (a budget's decisions are
random models' own, calibrated): decoding of one token and prefill, dense Hugging Face beside it in
the same run. A short table comes last.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

import gateskip
from gateskip import kernels
from gateskip.execution.api import dense
from gateskip.retrofit.attach import gated_branches
from gateskip.skipping.compensation import Compensation, set_compensation
from gateskip.skipping.state import state_of

#: Layers, hidden, inner, query heads, key/value heads, head width, vocabulary.
SHAPES = {
    "smollm2-135m": (30, 576, 1536, 9, 3, 64, 49152),
    "llama-1b": (16, 2048, 8192, 32, 8, 64, 128256),
    "llama-8b": (32, 4096, 14336, 32, 8, 128, 128256),
}
TINY = (4, 64, 96, 4, 2, 16, 128)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def build(shape: tuple[int, ...], family: str, dtype: torch.dtype, device: str) -> Any:
    """A random model."""
    layers, hidden, inner, heads, kv_heads, width, vocabulary = shape
    config = AutoConfig.for_model(
        family, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width,
        vocab_size=vocabulary, max_position_embeddings=8192, tie_word_embeddings=True,
        initializer_range=0.12 if hidden < 100 else 0.02, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def random_ids(model: Any, rows: int, length: int, seed: int = 0) -> Tensor:
    """Token ids ``[rows, length]``."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)
    return ids.to(model.device)


def call(model: Any, ids: Tensor, cache: Any = None, **more: Any) -> Any:
    """The model's output, whatever transformers calls the cache."""
    names = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in names else "past_key_values"
    return model(ids, use_cache=True, **{name: cache}, **more)


def cache_of(output: Any) -> Any:
    """The cache of an output, likewise."""
    return output["cache"] if "cache" in output else output["past_key_values"]


# -- correctness ------------------------------------------------------------------------------


@torch.no_grad()
def gated_tiny(family: str, kind: str, compensation: str, device: str) -> Any:
    """A tiny gated model with decisions of its own."""
    model = build(TINY, family, torch.float32, device)
    config = gateskip.GateConfig(
        kind=kind, init_std=0.3, init_bias=1.0, rank=4, compensation=compensation,  # type: ignore[arg-type]
        compensation_rank=4,
    )  # fmt: skip
    gateskip.attach(model, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gateskip.fit(model, list(random_ids(model, 16, 128)), max_tokens=2048)
        gateskip.calibrate(model, list(random_ids(model, 16, 128, seed=1)))
    return model


@torch.no_grad()
def steps(model: Any, ids: Tensor, start: int, mask: Tensor | None, static: bool) -> Tensor:
    """Logits of the tokens after ``start``, one by one through a cache."""
    cache = StaticCache(model.config, max_cache_len=ids.shape[1] + 8) if static else None
    first = {} if mask is None else {"attention_mask": mask[:, :start]}
    cache = cache_of(call(model, ids[:, :start], cache, **first))
    out = []
    for i in range(start, ids.shape[1]):
        more = {} if mask is None else {"attention_mask": mask[:, : i + 1]}
        out.append(call(model, ids[:, i : i + 1], cache, **more).logits)
    return torch.cat(out, 1)


def differences(device: str) -> dict[str, float]:
    """Largest difference of logits by what was compared; raises where it is no rounding."""
    found: dict[str, float] = {}
    cases = [(f, "low_rank", "low_rank", b, False, False) for f in FAMILIES for b in (1, 3)]
    cases += [
        ("llama", "scalar", "mean", 1, False, False),
        ("llama", "vector", "none", 3, False, False),
    ]
    cases += [
        ("llama", "low_rank", "low_rank", 2, True, False),
        ("llama", "low_rank", "low_rank", 3, False, True),
    ]
    for family, kind, compensation, batch, static, padded in cases:
        model = gated_tiny(family, kind, compensation, device)
        ids = random_ids(model, batch, 40, seed=2)
        mask = None
        if padded:
            mask = torch.ones_like(ids)
            mask[1, :3] = mask[2, :7] = 0
        for budget in (1.0, 0.6):
            results = []
            for backend in ("torch", "triton"):
                with kernels.using(backend), gateskip.budget(model, keep=budget):
                    results.append(steps(model, ids, 20, mask, static))
            name = f"{family} {kind} {compensation} batch {batch}"
            name += (
                (" static" if static else "") + (" padded" if padded else "") + f" keep {budget}"
            )
            found[name] = float((results[0] - results[1]).abs().max())
            scale = float(results[0].abs().max())
            if not found[name] < 2e-4 * scale:
                raise SystemExit(f"{name}: logits differ by {found[name]:.2g} of {scale:.2g}")
        with torch.no_grad(), gateskip.budget(model, keep=0.6):
            own = call(model, ids).logits
            with gateskip.execution(model, "masked"):
                reference = call(model, ids).logits
        found[f"{family} prefill masked"] = float((own - reference).abs().max())
    return found


# -- speed ------------------------------------------------------------------------------------


def timed(run: Callable[[], Any], count: int = 1) -> float:
    """Milliseconds of one of ``count`` calls."""
    torch.cuda.synchronize()
    clock = time.perf_counter()
    for _ in range(count):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - clock) * 1e3 / count


@torch.no_grad()
def decoding(
    model: Any, ids: Tensor, static: bool, new: int, forward: Any = None
) -> Callable[[], float]:
    """A function that times a decoding step after ids, ms."""
    length = ids.shape[1]
    token = ids[:, :1].clone()
    state: dict[str, Any] = {}

    def one() -> None:
        cache = state["cache"]
        if forward is None:
            call(model, token, cache)
        else:
            forward(token, cache)

    def measure() -> float:
        cache = None
        if static:
            cache = state.get("static") or StaticCache(model.config, max_cache_len=length + new + 8)
            cache.reset()
            state["static"] = cache
        state["cache"] = cache_of(call(model, ids, cache, logits_to_keep=1))
        for _ in range(3):
            one()
        return timed(one, new - 3)

    return measure


def compiled(model: Any) -> Any:
    """The dense model's step as transformers compiles it: a static cache and a CUDA graph."""
    step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)

    def forward(token: Tensor, cache: Any) -> Any:
        names = inspect.signature(model.forward).parameters
        name = "cache" if "cache" in names else "past_key_values"
        return step(token, use_cache=True, **{name: cache})

    return forward


def give_compensation(model: Any, rank: int = 32) -> None:
    """Random compensation of skipped branches, where nothing was fitted."""
    state = state_of(model)
    hidden = model.config.hidden_size
    for module in gated_branches(model, state.family).values():
        down, up = (torch.randn(s) * 0.01 for s in ((rank, hidden), (hidden, rank)))
        set_compensation(module, Compensation(torch.zeros(hidden), down, up))
    state.compensated = True


def rounding(model: Any) -> float:
    """Mean difference of a step's logits between back-ends, in their standard deviations."""
    ids = random_ids(model, 1, 65)
    found = []
    for backend in ("torch", "triton"):
        with kernels.using(backend):
            cache = cache_of(call(model, ids[:, :64], logits_to_keep=1))
            found.append(call(model, ids[:, 64:], cache).logits.float())
    return float((found[0] - found[1]).abs().mean() / found[0].std())


@torch.no_grad()
def speed(
    name: str, options: argparse.Namespace, console: Console, write: Callable[[Any], None]
) -> list[dict[str, Any]]:
    """Rows of one model."""
    model = build(SHAPES[name], "llama", torch.bfloat16, "cuda")
    gateskip.attach(model, gateskip.GateConfig(compensation="low_rank"))
    clock = time.perf_counter()
    if name not in options.fit:
        give_compensation(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in options.fit:
            gateskip.fit(model, list(random_ids(model, 8, 512)), max_tokens=4096)
        fitted = time.perf_counter() - clock
        text = list(random_ids(model, 4, 512, seed=1))
        gateskip.calibrate(model, text, grid=(0.8, 0.6, 0.4, 0.3))
    rest = time.perf_counter() - clock - fitted
    console.print(f"{name}: fit {fitted:.1f} s, calibrate {rest:.1f} s")
    console.print(
        f"  bfloat16, triton against torch: {rounding(model):.3f} of the logits' deviation"
    )
    table = state_of(model).policy
    assert table is not None
    budgets = [value for value in options.compute if value >= table.floor("compute")]
    rows: list[dict[str, Any]] = []
    for batch in options.batch:
        ids = random_ids(model, batch, options.prompt_tokens, seed=3)
        arms: dict[str, tuple[Any, ...]] = {}
        plain = decoding(model, ids, False, options.new_tokens)
        static = decoding(model, ids, True, options.new_tokens)
        arms["dense_eager"] = (None, plain)
        if batch == 1 and name in options.compiled:
            with dense(model):
                forward = compiled(model)
            arms["dense_compiled"] = (None, decoding(model, ids, True, options.new_tokens, forward))
        for budget in budgets:
            arms[f"gated {budget:g}"] = (budget, plain)
        arms["gated static 1"] = (1.0, static)
        arms["gated, torch operations 0.5"] = (0.5, plain)
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        for repeat in range(options.repeats + 1):
            for arm, (budget, measure) in arms.items():
                if budget is None:
                    with dense(model):
                        value = measure()
                else:
                    backend = "torch" if "operations" in arm else "triton"
                    with kernels.using(backend), gateskip.budget(model, compute=budget):
                        value = measure()
                if repeat:
                    times[arm].append(value)
        rows += finish(name, "decode", batch, options, arms, times, model, ids)
        write(rows)
        shown = (f"{r['arm']} {r['milliseconds']:.2f}" for r in rows if r["batch"] == batch)
        console.print(f"  decode batch {batch}: " + ", ".join(shown))
    for batch, length in options.prefill:
        ids = random_ids(model, batch, length, seed=4)

        def prefill(ids: Tensor = ids) -> float:
            return timed(lambda: call(model, ids, logits_to_keep=1))

        arms = {"dense_eager": (None, prefill)}
        arms |= {f"gated {budget:g}": (budget, prefill) for budget in budgets}
        times = {arm: [] for arm in arms}
        for repeat in range(options.repeats + 2):
            for arm, (budget, measure) in arms.items():
                if budget is None:
                    with dense(model):
                        value = measure()
                else:
                    with gateskip.budget(model, compute=budget):
                        value = measure()
                if repeat > 1:
                    times[arm].append(value)
        rows += finish(name, "prefill", batch, options, arms, times, model, ids)
    return rows


def finish(
    name: str, phase: str, batch: int, options: argparse.Namespace, arms: dict[str, Any],
    times: dict[str, list[float]], model: Any, ids: Tensor,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of one cell, with what the ledger says was spent."""
    base = statistics.median(times["dense_eager"])
    rows = []
    for arm, (budget, _) in arms.items():
        row = {"model": name, "phase": phase, "batch": batch, "tokens": ids.shape[1], "arm": arm,
               "compute": budget, "milliseconds": statistics.median(times[arm]),
               "all": times[arm]}  # fmt: skip
        row["speedup_vs_dense"] = base / row["milliseconds"]
        if budget is not None:
            with torch.no_grad(), gateskip.budget(model, compute=budget):
                cache = cache_of(call(model, ids, logits_to_keep=1)) if phase == "decode" else None
                with gateskip.trace(model) as trace:
                    call(model, ids[:, :1] if phase == "decode" else ids, cache, logits_to_keep=1)
            ledger = trace.ledger
            row["bytes_share"] = ledger.bytes_spent / ledger.bytes_dense
            row["macs_share"] = ledger.macs_spent / ledger.macs_dense
            row["gigabytes_per_s"] = ledger.bytes_spent / row["milliseconds"] / 1e6
        rows.append(row)
    return rows


def show(device: str, rows: list[dict[str, Any]], console: Console) -> None:
    """Print rows as a table."""
    table = Table(title=f"{device}, bfloat16, random weights", box=SIMPLE)
    for column in ("model", "phase", "arm", "ms", "× dense", "bytes", "MACs", "GB/s"):
        table.add_column(column, justify="left" if column in ("model", "phase", "arm") else "right")
    for row in rows:
        share = [f"{row[k]:.2f}" if k in row else "" for k in ("bytes_share", "macs_share")]
        rate = f"{row['gigabytes_per_s']:.0f}" if "gigabytes_per_s" in row else ""
        what = f"{row['phase']} {row['batch']} × {row['tokens']}"
        numbers = (f"{row['milliseconds']:.2f}", f"{row['speedup_vs_dense']:.2f}", *share, rate)
        table.add_row(row["model"], what, row["arm"], *numbers)
    console.print(table)


def main() -> int:
    """Check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="file for the result")
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--compute", type=float, nargs="+", default=[1.0, 0.75, 0.5, 0.35])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=33)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compiled", nargs="*", default=["smollm2-135m", "llama-1b"])
    parser.add_argument("--fit", nargs="*", default=list(SHAPES), help="models to fit gates of")
    parser.add_argument("--skip-checks", action="store_true")
    options = parser.parse_args()
    options.prefill = [(4, 512), (8, 1024)]
    console = Console(width=110)
    if not torch.cuda.is_available():
        print("error: no CUDA device", file=sys.stderr)
        return 1
    torch.backends.cuda.matmul.allow_tf32 = False
    import triton

    header = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "transformers": transformers.__version__, "triton": triton.__version__,
        "gateskip": gateskip.__version__, "dtype": "bfloat16",
        "command": "python benchmarks/gpu.py " + " ".join(sys.argv[1:]),
    }  # fmt: skip
    result: dict[str, Any] = {"header": header, "differences": {}, "rows": []}

    def write(more: list[dict[str, Any]] | None = None) -> None:
        if options.json:
            now = result | {"rows": result["rows"] + (more or [])}
            Path(options.json).write_text(json.dumps(now, indent=1))

    if not options.skip_checks:
        result["differences"] = differences("cuda")
        worst = max(result["differences"].items(), key=lambda pair: pair[1])
        console.print(
            f"{len(result['differences'])} comparisons, largest: {worst[0]} {worst[1]:.2g}"
        )
        write()
    for name in options.models:
        result["rows"] += speed(name, options, console, write)
        show(header["device"], [row for row in result["rows"] if row["model"] == name], console)
        gc.collect()
        torch.cuda.empty_cache()
        write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
