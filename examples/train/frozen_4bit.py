"""Gates on a 4-bit model whose weights stay as they are: only what was added is trained.

    python examples/train/frozen_4bit.py MODEL rows.jsonl OUT --steps 100

Needs ``pip install gateskip[train,quant]``. The result loads onto the 4-bit and the plain model.
"""

from __future__ import annotations

import argparse

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainingArguments,
)

import gateskip
from gateskip.data import read_texts
from gateskip.training import GateSkipTrainer, GateSkipTrainingConfig, make_dataset


def main() -> None:
    """Quantise, attach, fit, calibrate, train gates and compensation, save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(
        given.model, quantization_config=nf4, dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    rows = read_texts(given.data)

    gateskip.attach(model, gateskip.GateConfig(importance="head"))
    gateskip.fit(model, rows, tokenizer)
    gateskip.calibrate(model, rows, tokenizer)
    trainer = GateSkipTrainer(
        model,
        TrainingArguments(f"{given.out}/run", max_steps=given.steps, report_to=[],
                          learning_rate=1e-3, use_cpu=not torch.accelerator.is_available()),
        train_dataset=make_dataset(rows, tokenizer),
        processing_class=tokenizer,
        gateskip_args=GateSkipTrainingConfig(
            backbone="frozen", train_gates=True, gate_learning_rate=1e-4, budget_start=0.85,
            budget_end=0.85,
        ),
    )  # fmt: skip
    trainer.train()
    gateskip.calibrate(trainer.finish(), rows, tokenizer)
    gateskip.save(model, given.out)


if __name__ == "__main__":
    main()
