"""Supervised fine-tuning of a chat model with gates, by TRL's SFTTrainer.

    python examples/train/sft_chat.py MODEL rows.jsonl OUT --steps 200

Rows have ``messages``. Also under ``accelerate launch --config_file examples/accelerate/ddp.yaml``.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import gateskip
from gateskip.training import GateSkipMixin, GateSkipTrainingConfig


class GatedSFTTrainer(GateSkipMixin, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer; tokens skip branches while it trains."""


def main() -> None:
    """Fit, calibrate, train, calibrate again, save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--budget", type=float, default=0.75)
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    rows: Any = load_dataset("json", data_files=given.data, split="train")

    gateskip.attach(model, gateskip.GateConfig())
    gateskip.fit(model, list(rows), tokenizer)
    gateskip.calibrate(model, list(rows), tokenizer)
    trainer = GatedSFTTrainer(
        model,
        SFTConfig(
            f"{given.out}/run", max_steps=given.steps, report_to=[], learning_rate=1e-4,
            use_cpu=not torch.accelerator.is_available(), bf16=torch.accelerator.is_available(),
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        gateskip_args=GateSkipTrainingConfig(
            backbone="lora", budget_start=given.budget, budget_end=given.budget
        ),
    )  # fmt: skip
    trainer.train()
    gateskip.training.finish(model)
    gateskip.calibrate(model, list(rows), tokenizer)
    if trainer.is_world_process_zero():
        gateskip.save(model, given.out)


if __name__ == "__main__":
    main()
