"""Tokens a second and memory of training: plain, with gates at budget 1, and skipping at 0.8.

    python benchmarks/training_cost.py --gates GATES --data TRAIN.jsonl --json FILE

Plain is Hugging Face's ``Trainer`` on the same base model, backbone, batches and dtype. Arms
take turns, each in a process of its own for its peak memory; a figure is the median of all steps.
Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ARMS = ("plain", "gated", "skipping")
WARM_UP = 3  # of the steps: the first products of a shape build programs


def measure(arm: str, options: dict[str, Any]) -> dict[str, Any]:
    """Steps of one arm, in this process."""
    import resource

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    import gateskip
    from gateskip.data import read_texts
    from gateskip.training import Collator, GateSkipTrainer, GateSkipTrainingConfig, make_dataset

    warnings.simplefilter("ignore")
    gated = gateskip.load(options["gates"], dtype=options["dtype"])
    name = gated.config._name_or_path
    tokenizer = AutoTokenizer.from_pretrained(name)
    dataset = make_dataset(read_texts(options["data"]), tokenizer, options["max_length"])
    full = options["backbone"] == "full"
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=options["steps"], per_device_train_batch_size=options["batch_size"],
            learning_rate=1e-5, save_strategy="no", logging_strategy="no", report_to=[],
            disable_tqdm=True, seed=0, bf16=full, train_sampling_strategy="group_by_length",
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer: Any
        if arm == "plain":
            model = AutoModelForCausalLM.from_pretrained(
                name, dtype=getattr(torch, options["dtype"])
            )
            if not full:
                from peft import LoraConfig, inject_adapter_in_model

                linear = sorted(
                    {
                        n.rpartition(".")[2]
                        for n, m in model.model.named_modules()
                        if isinstance(m, torch.nn.Linear)
                    }
                )
                lora: Any = {"r": 8, "lora_alpha": 16, "target_modules": linear}
                inject_adapter_in_model(LoraConfig(**lora), model)
                for n, p in model.named_parameters():
                    p.requires_grad_(".lora_" in n)
                    if ".lora_" in n:
                        p.data = p.data.float()
            del gated
            collate = Collator(tokenizer.pad_token_id or 0)
            trainer = Trainer(model, arguments, train_dataset=dataset, data_collator=collate)
        else:
            budget = 1.0 if arm == "gated" else 0.8
            config = GateSkipTrainingConfig(
                backbone=options["backbone"], budget_start=budget, budget_end=budget
            )
            trainer = GateSkipTrainer(
                gated, arguments, train_dataset=dataset, processing_class=tokenizer,
                gateskip_args=config,
            )  # fmt: skip
        seconds: list[float] = []
        tokens: list[int] = []
        original = trainer.training_step

        def step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            tokens.append(int(inputs["attention_mask"].sum()))
            begin = time.perf_counter()
            out = original(model, inputs, *args, **kwargs)
            seconds.append(time.perf_counter() - begin)
            return out

        trainer.training_step = step
        trainer.train()
    rates = [n / s for n, s in zip(tokens[WARM_UP:], seconds[WARM_UP:], strict=True)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"arm": arm, "tokens_per_second": statistics.median(rates), "peak_rss_bytes": peak}


def _child(arm: str, options: dict[str, Any], path: str) -> None:
    Path(path).write_text(json.dumps(measure(arm, options)))


def main() -> None:
    """Run all arms and write one result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gates", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--backbone", choices=("lora", "full"), default="lora")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json")
    args = parser.parse_args()
    options = vars(args) | {"dtype": "float32" if args.backbone == "full" else "bfloat16"}
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    spawn = multiprocessing.get_context("spawn")
    for _ in range(args.repeats):
        for arm in ARMS:
            with tempfile.TemporaryDirectory() as folder:
                path = str(Path(folder) / "result.json")
                process = spawn.Process(target=_child, args=(arm, options, path))
                process.start()
                process.join()
                if process.exitcode:
                    raise SystemExit(f"error: arm {arm} failed.")
                found[arm].append(json.loads(Path(path).read_text()))
    from gateskip.evaluation.header import run_header

    rows = []
    for arm, runs in found.items():
        rate = statistics.median(r["tokens_per_second"] for r in runs)
        rows.append(
            {
                "arm": arm,
                "backbone": args.backbone,
                "speedup_vs_plain": rate
                / statistics.median(r["tokens_per_second"] for r in found["plain"]),
                "peak_rss_bytes": max(r["peak_rss_bytes"] for r in runs),
            }
        )
        print(
            f"{arm:9} {rows[-1]['speedup_vs_plain']:.2f}x plain, "
            f"{rows[-1]['peak_rss_bytes'] / 2**30:.2f} GiB"
        )
    if args.json:
        command = f"python benchmarks/training_cost.py --backbone {args.backbone}"
        header = run_header(command) | {"steps": args.steps, "repeats": args.repeats}
        path = Path(args.json)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps({"header": header, "rows": rows}, indent=2) + "\n")
        os.replace(temporary, path)


if __name__ == "__main__":
    main()
