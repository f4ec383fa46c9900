"""Train the lab's dense model from scratch: a Llama of about a million parameters.

    python experiments/lab/model.py experiments/lab/dense_1m_s0 --size 1m --seed 0

Stop it at any time and run it again: it goes on from its checkpoint. Prints the exact match of
greedily generated answers to problems of another seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from language import VOCABULARY, answer_of, problems, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint, set_seed

from gateskip.data import Sample, encode

#: Layers, hidden, inner, query heads, key/value heads.
SIZES = {"03m": (6, 64, 192, 4, 2), "1m": (8, 96, 320, 4, 2), "3m": (12, 128, 512, 4, 2)}


def dense_of(size: str) -> Path:
    """Where the dense model of a size is."""
    return Path(__file__).parent / f"dense_{size}_s0"


#: The models that experiments start from, as committed: bfloat16 weights, computed in float32.
DENSE, SMALL = dense_of("1m"), dense_of("03m")
TRAIN_SEED, TEST_SEED = 1_000, 7  # seeds of problems
LONGEST = 256


def build(size: str, seed: int) -> LlamaForCausalLM:
    """A fresh model."""
    layers, hidden, inner, heads, kv_heads = SIZES[size]
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=hidden, intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.06,
        rope_theta=500.0,
        pad_token_id=0, bos_token_id=1,
        eos_token_id=2, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def collate(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Right-padded ids, mask and labels; prompts have no loss."""
    shape = (len(samples), max(sample.ids.shape[0] for sample in samples))
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, -100)
    for row, sample in enumerate(samples):
        n = sample.ids.shape[0]
        ids[row, :n], mask[row, :n] = sample.ids, 1
        labels[row, :n] = torch.where(sample.scored, sample.ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def exact_match(model: Any, rows: list[dict[str, str]], batch: int = 250) -> float:
    """Share of problems whose greedily generated answer ends with the right number."""
    words, right = tokenizer(), 0
    for begin in range(0, len(rows), batch):
        part = rows[begin : begin + batch]
        prompts = ["<bos> " + row["prompt"] for row in part]
        given = words(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        out = model.generate(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"],
            max_new_tokens=120, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        texts = words.batch_decode(out[:, given["input_ids"].shape[1] :])
        right += sum(
            answer_of(text.split("<eos>")[0]) == answer_of(row["completion"])
            for text, row in zip(texts, part, strict=True)
        )
    return right / len(rows)


class _Speed(TrainerCallback):
    """Says where training is."""

    def __init__(self) -> None:
        self.begun = time.time()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            spent = time.time() - self.begun
            print(
                f"step {state.global_step} loss {float(logs['loss']):.4f} {spent:.0f} s", flush=True
            )


def train(out: Path, size: str, seed: int, steps: int, batch: int, rate: float) -> Any:
    """A trained model, saved with its tokenizer; what exists is loaded."""
    if (out / "config.json").is_file():
        return LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    model = build(size, seed)
    samples = encode(problems(TRAIN_SEED + seed, steps * batch), tokenizer(), LONGEST)
    work = Path("build/lab") / (out.name + ".work")
    arguments = TrainingArguments(
        output_dir=str(work), max_steps=steps, per_device_train_batch_size=batch,
        learning_rate=rate, lr_scheduler_type="cosine", warmup_steps=steps // 20,
        weight_decay=0.01, adam_beta2=0.98, logging_steps=100, save_steps=max(steps // 8, 1),
        save_total_limit=1, seed=seed, report_to=[], remove_unused_columns=False, use_cpu=True,
        disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=samples, data_collator=collate,  # type: ignore[arg-type]
        callbacks=[_Speed()],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)) if work.is_dir() else None)
    model.eval()
    part = out.with_name(out.name + ".part")
    model.to(torch.bfloat16).save_pretrained(part)  # half the size
    tokenizer().save_pretrained(part)
    part.rename(out)
    shutil.rmtree(work)
    return LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def main() -> None:
    """Train, then test by generation."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=sorted(SIZES), default="1m")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--problems", type=int, default=500)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    model = train(args.out, args.size, args.seed, args.steps, args.batch_size, args.learning_rate)
    trained = time.time() - begun
    found = exact_match(model, list(problems(TEST_SEED, args.problems)))
    size = sum(p.numel() for p in model.parameters())
    print(json.dumps({"parameters": size, "seconds": round(trained), "exact_match": found}))


if __name__ == "__main__":
    main()
