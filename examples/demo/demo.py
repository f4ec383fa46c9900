"""The main job in one go: attach, fit, calibrate, evaluate, time, generate, explain.

    make demo

Writes gates, a table as JSON and a picture into ``demo-output``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import model as demo_model
from rich.console import Console
from rich.table import Table

import gateskip
from gateskip.data import read_texts, text_windows
from gateskip.evaluation.bench import run_bench
from gateskip.evaluation.quality import QualityRow, evaluate
from gateskip.explain.plot import plot_usage
from gateskip.explain.terminal import print_usage
from gateskip.explain.usage import branch_usage

HERE = Path(__file__).resolve().parent
OUT = HERE.parents[1] / "demo-output"
PRETRAINED = HERE.parents[1] / "pretrained" / "smollm2-135m-instruct"
STEPS, TOKENS = 8, 6_000
BUDGETS = (0.95, 0.9, 0.85, 0.75, 0.6)
QUESTION = (
    "A baker has 24 rolls. She sells 9 in the morning and bakes 12 more. How many rolls are there?"
)


def main() -> None:
    """Run the demo; about eight minutes on two cores after the model is there."""
    console = Console()
    started = time.perf_counter()
    name = demo_model.prepare(console=console)
    model, tokenizer = demo_model.load(name)
    fitting, heldout = (read_texts(HERE / "data" / f"{n}.jsonl") for n in ("fit", "heldout"))

    console.rule("1. Gates, fitted and calibrated without training")
    gateskip.attach(model, gateskip.GateConfig())
    report = gateskip.fit(model, fitting[::2], tokenizer, max_tokens=24_000, progress=True)
    console.print(f"Fitted on {report.tokens} tokens in {report.seconds:.0f} s.")
    clock = time.perf_counter()
    table = gateskip.calibrate(
        model, fitting[1::2], tokenizer, max_tokens=12_000, progress=True,
        grid=(0.97, 0.93, 0.88, 0.82, 0.75, 0.65, 0.55, 0.42, 0.32, 0.25),
    )  # fmt: skip
    console.print(
        f"Calibrated in {time.perf_counter() - clock:.0f} s: every budget from compute=1 down to "
        f"compute={table.floor('compute'):.2f} can now be chosen at run time."
    )
    gateskip.save(model, OUT / "gates")

    console.rule("2. Quality against speed, on text that was not used to fit")
    budgets = [gateskip.Budget(compute=max(c, table.floor("compute"))) for c in BUDGETS]
    rows = evaluate(model, heldout, tokenizer, budgets=budgets, max_tokens=TOKENS, progress=True)
    ids = text_windows(heldout, tokenizer, (4, 512 + 24), 5)
    speed = run_bench(
        model, ids, budgets=budgets, new_tokens=24, repeats=5, compiled=False, masked=False,
        name=Path(name).name, command="make demo", progress=True,
    )  # fmt: skip
    show(console, rows, speed)
    result = {"quality": [dataclasses.asdict(row) for row in rows], "speed": speed}
    write_json(result, OUT / "table.json")  # again below: an interrupt keeps what there is

    console.rule("3. What training adds")
    shipped = trained(console, name, heldout, tokenizer, rows)
    result["quality_trained"] = [dataclasses.asdict(row) for row in shipped]
    write_json(result, OUT / "table.json")
    train_a_minute(console, OUT / "gates", name, fitting, tokenizer)

    console.rule("4. The same answer at each budget")
    answer(console, model, tokenizer, budgets)

    console.rule("5. Which token used which branch")
    with gateskip.budget(model, compute=budgets[2].compute):
        inputs = tokenizer(heldout[0]["prompt"] + "\n" + heldout[0]["completion"],
                           return_tensors="pt")["input_ids"]  # fmt: skip
        usage = branch_usage(model, inputs)
    tokens = [tokenizer.decode([i]) for i in inputs[0].tolist()]
    plot_usage(usage, tokens, OUT / "usage.png")
    print_usage(usage, tokens, console)

    where = os.path.relpath(OUT)
    console.rule(f"Done in {time.perf_counter() - started:.0f} s")
    console.print(f"Wrote {where}/gates, {where}/table.json and {where}/usage.png. Go on with:")
    data = os.path.relpath(HERE / "data" / "heldout.jsonl")
    for command in (
        f"gateskip generate {where}/gates --compute 0.9 --prompt 'What is 3 + 4?'",
        f"gateskip eval {where}/gates --data {data} --compute 0.9 --compute 0.8",
        f"gateskip explain {where}/gates --compute 0.85 --text 'Bees make honey.' --png bees.png",
        f"gateskip bench {where}/gates --data {data}",
        "gateskip fit YOUR-MODEL --data YOUR.jsonl --out my-gates",
        "gateskip train YOUR-MODEL --data YOUR.jsonl --out my-trained-gates",
    ):
        console.print(f"  .venv/bin/{command}", highlight=False, soft_wrap=True)


def show(console: Console, rows: list[QualityRow], speed: dict[str, Any]) -> None:
    """One table: quality, net MACs, prefill and decode time as ratios to dense."""
    ratio = {
        (r["phase"], r["compute"]): r["speedup_vs_dense"]
        for r in speed["rows"]
        if r["arm"] == "gated_compacted"
    }
    dtype = str(demo_model.fast_dtype()).removeprefix("torch.")
    table = Table(title=f"Dense Hugging Face model = 1.00×, same run, {dtype}, gates included")
    for column in ("budget", "MACs, net", "loss", "perplexity", "agrees", "prefill", "decode"):
        table.add_column(column, justify="right")
    for row in rows:
        dense = row.compute is None
        table.add_row(
            "dense" if dense else f"{row.compute:.2f}",
            f"{1 - row.macs_saved:.1%}", f"{row.loss:.3f}", f"{row.perplexity:.2f}",
            f"{row.agreement:.1%}",
            "1.00×" if dense else f"{ratio['prefill', row.compute]:.2f}×",
            "1.00×" if dense else f"{ratio['decode', row.compute]:.2f}×",
        )  # fmt: skip
    console.print(table)


def trained(
    console: Console, name: str, heldout: list[Any], tokenizer: Any, fitted: list[QualityRow]
) -> list[QualityRow]:
    """Held-out loss of the gates in ``pretrained``, beside the ones fitted just now."""
    try:
        model = gateskip.load(PRETRAINED, base=name, dtype=demo_model.fast_dtype())
    except gateskip.CheckpointError as error:
        console.print(f"The trained gates do not belong to this copy of the model: {error}")
        return []
    budgets = [gateskip.Budget(compute=c) for c in (0.9, 0.75, 0.6)]
    rows = evaluate(
        model, heldout, tokenizer, budgets=budgets, max_tokens=TOKENS, progress=True,
        reference=demo_model.load(name)[0],
    )  # fmt: skip
    closed = {row.compute: row.loss for row in fitted if row.compute is not None}
    table = Table(title=f"Trained gates of {os.path.relpath(PRETRAINED)}, the same held-out text")
    for column in ("compute", "MACs, net", "loss fitted", "loss trained"):
        table.add_column(column, justify="right")
    for row in rows[1:]:
        assert row.compute is not None
        table.add_row(f"{row.compute:.2f}", f"{1 - row.macs_saved:.1%}",
                      f"{closed[row.compute]:.3f}", f"{row.loss:.3f}")  # fmt: skip
    console.print(table)
    return rows


def train_a_minute(
    console: Console, gates: Path, name: str, fitting: list[Any], tokenizer: Any
) -> None:
    """A few steps from the gates fitted just now, to show that training works here."""
    from transformers import TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from gateskip.training import GateSkipTrainer, GateSkipTrainingConfig, make_dataset
    from gateskip.training.progress import TrainingProgress

    trainer = GateSkipTrainer(
        gateskip.load(gates, base=name, dtype=demo_model.fast_dtype()),
        TrainingArguments(
            str(OUT / "training"), max_steps=STEPS, per_device_train_batch_size=8, seed=0,
            learning_rate=1e-3, save_strategy="no", logging_steps=STEPS // 2, report_to=[],
            disable_tqdm=True, train_sampling_strategy="group_by_length",
            dataloader_pin_memory=False,
        ),
        train_dataset=make_dataset(fitting, tokenizer),
        processing_class=tokenizer,
        gateskip_args=GateSkipTrainingConfig(
            budget_start=0.75, budget_end=0.75, compensation_learning_rate=1e-3
        ),
        callbacks=[TrainingProgress(console)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    clock = time.perf_counter()
    trainer.train()
    first, last = (e for e in trainer.state.log_history if "loss" in e)
    console.print(
        f"Trained {STEPS} steps at compute=0.75 in {time.perf_counter() - clock:.0f} s, "
        f"{last['skip_rate']:.0%} of token×branch pairs skipped: training loss of the first half "
        f"{first['loss']:.3f}, of the second {last['loss']:.3f}."
    )


def answer(console: Console, model: Any, tokenizer: Any, budgets: list[gateskip.Budget]) -> None:
    """Greedy answers to one question."""
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(chat, return_tensors="pt", add_special_tokens=False)
    console.print(f"[bold]{QUESTION}[/bold]")
    for budget in (gateskip.Budget(compute=1.0), *budgets):
        with gateskip.trace(model) as trace:
            out = model.generate(
                **inputs, max_new_tokens=60, do_sample=False, gateskip_budget=budget
            )
        text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        console.print(
            f"[cyan]{budget}[/cyan] ({1 - trace.ledger.compute:.1%} of MACs saved): "
            f"{' '.join(text.split())}",
            highlight=False,
        )


def write_json(result: object, path: Path) -> None:
    """Write JSON through a temporary name."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
