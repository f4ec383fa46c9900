"""Makes the demo's data: word problems of ours, and text that the model writes from our prompts.

    python examples/demo/write_texts.py

Writes ``data/fit.jsonl`` and ``data/heldout.jsonl``; every fifth prompt is held out.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import torch
from model import load, prepare
from rich.progress import track
from word_problems import generate, write_jsonl

FORMS = (
    "Explain to a beginner {}.", "Write a short story that involves {}.",
    "List five useful facts about {}.", "Write a friendly letter to a neighbour about {}.",
    "Write a conversation between two friends about {}.", "Give step-by-step advice on {}.",
    "Describe a day in the life of someone who works with {}.",
    "Compare two opinions about {}.",
)  # fmt: skip
TOPICS = (
    "growing vegetables on a balcony", "how tides work", "repairing an old bicycle",
    "night trains across the mountains", "baking bread", "the history of maps", "learning to swim",
    "small town libraries", "measuring the weather", "keeping bees", "writing clear programs",
    "the human heart", "saving money for a journey", "playing chess with children",
    "recycling in a city", "the planets of the solar system", "choosing a musical instrument",
    "lighthouses", "first aid at home", "how vaccines protect people", "desert animals",
    "making pottery", "public parks", "the invention of paper", "solar power",
)  # fmt: skip
BATCH, NEW_TOKENS, SEED = 25, 160, 0
HERE = Path(__file__).parent / "data"


def write_by_model() -> list[dict[str, str]]:
    """Sampled answers of the dense model (temperature 0.8, top-p 0.95), one per prompt."""
    model, tokenizer = load(prepare())
    tokenizer.padding_side = "left"
    prompts = [form.format(topic) for topic, form in product(TOPICS, FORMS)]
    torch.manual_seed(SEED)
    rows = []
    for start in track(range(0, len(prompts), BATCH), description="Writing texts"):
        some = prompts[start : start + BATCH]
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True
            )
            for p in some
        ]
        inputs = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
        out = model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.8, top_p=0.95,
            top_k=0,
        )  # fmt: skip
        texts = tokenizer.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for prompt, text in zip(some, texts, strict=True):
            if len(text.split()) >= 20:
                rows.append({"prompt": prompt, "completion": text.strip()})
    return rows


def main() -> None:
    """Write both files; of the texts that were kept, every fifth is held out."""
    problems = generate(600, seed=0)
    held = generate(150, seed=1, avoid=frozenset(row["prompt"] for row in problems))
    written = write_by_model()
    groups = {
        "fit.jsonl": (problems, [row for i, row in enumerate(written) if i % 5 != 4]),
        "heldout.jsonl": (held, [row for i, row in enumerate(written) if i % 5 == 4]),
    }
    for name, (solved, texts) in groups.items():
        rows = [row | {"source": "word_problems"} for row in solved]
        rows += [row | {"source": "model_written"} for row in texts]
        # Interleave, so that any first part of the file has both kinds.
        rows = [rows[i * 7919 % len(rows)] for i in range(len(rows))]
        write_jsonl(rows, HERE / name)


if __name__ == "__main__":
    main()
