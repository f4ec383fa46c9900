"""Training text for people who have none: a model's own answers to prompts.

Rows go to the file batch by batch, whole lines at a time, so that an interrupt leaves what was
done; each batch has its own seed, so that a run that was interrupted and went on wrote the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from gateskip.data import read_texts
from gateskip.errors import ConfigError, DataError, OutputError
from gateskip.retrofit.devices import device_of

__all__ = ["generate_data", "read_prompts"]


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a text file, one on each line, or of ``.jsonl`` rows.

    A row's prompt is its ``prompt``, its ``text``, or its first user message.

    Raises:
        DataError: no such file, a malformed row, or no prompt.
    """
    path = Path(path)
    if path.suffix in (".jsonl", ".json"):
        prompts = [_prompt(row) for row in read_texts(path)]
    elif path.is_file():
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    else:
        raise DataError(f"prompts={str(path)!r} is not a file; give a .txt or .jsonl file.")
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise DataError(f"prompts={str(path)!r} has no prompt.")
    return prompts


def _prompt(row: Any) -> str:
    if isinstance(row, str):
        return row.strip()
    if "messages" in row:
        said = [m["content"] for m in row["messages"] if m.get("role") == "user"]
        return str(said[0]).strip() if said else ""
    return str(row["prompt"] if "prompt" in row else row["text"]).strip()


def generate_data(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    out: str | Path,
    *,
    samples: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_p: float = 0.95,
    batch_size: int = 8,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> int:
    """Write ``samples`` answers to every prompt as rows of ``prompt`` and ``completion``.

    Args:
        model: a Hugging Face causal LM, gated or not; a gated one answers at its budget.
        tokenizer: with a chat template prompts are a user's messages.
        out: a ``.jsonl`` file for ``gateskip train``.
        temperature: 0 answers greedily. top_p: share of the probability that is sampled from.
        resume: go on with the rows that are in ``out``. overwrite: begin again.

    Returns:
        Rows written now.

    Raises:
        OutputError: ``out`` is there already, or not writable. DataError: it has other prompts.
        ConfigError: an option out of range.
    """
    out = Path(out)
    for name, value in (
        ("samples", samples), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size),
    ):  # fmt: skip
        if value < 1:
            raise ConfigError(f"{name}={value!r} must be at least 1.")
    if temperature < 0.0 or not 0.0 < top_p <= 1.0:
        raise ConfigError(
            f"temperature={temperature!r} must not be negative, top_p={top_p!r} within (0, 1]."
        )
    if out.exists() and not (resume or overwrite):
        raise OutputError(
            f"out={str(out)!r} exists; pass resume=True (--resume) to go on with it, or "
            "overwrite=True (--overwrite)."
        )
    if not out.parent.is_dir():
        raise OutputError(f"out={str(out)!r}: folder {str(out.parent)!r} does not exist.")
    wanted = [prompt for prompt in prompts for _ in range(samples)]
    done = _repair(out, wanted, batch_size) if resume and out.exists() else 0
    if done == 0:
        out.write_bytes(b"")
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("Generating", total=len(wanted), completed=done)
        for start in range(done, len(wanted), batch_size):
            batch = wanted[start : start + batch_size]
            answers = _answers(
                model, tokenizer, batch, seed * 1_000_003 + start,
                {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p},
            )  # fmt: skip
            rows = [
                json.dumps({"prompt": p, "completion": a}, ensure_ascii=False)
                for p, a in zip(batch, answers, strict=True)
            ]
            _append(out, "".join(row + "\n" for row in rows))
            bar.advance(task, len(batch))
    return len(wanted) - done


def _repair(out: Path, wanted: Sequence[str], batch_size: int) -> int:
    """Cut a file back to its last whole batch; the number of its rows."""
    lines = out.read_bytes().split(b"\n")[:-1]  # what follows the last newline is no whole line
    whole = len(lines) // batch_size * batch_size
    if len(lines) >= len(wanted):
        whole = len(lines)
    if whole > len(wanted):
        raise DataError(
            f"out={str(out)!r} has {whole} rows, more than the {len(wanted)} asked for."
        )
    for number, (line, prompt) in enumerate(zip(lines[:whole], wanted, strict=False), 1):
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError):
            row = None
        if not isinstance(row, Mapping) or row.get("prompt") != prompt:
            raise DataError(
                f"{out}, line {number}: not the answer to prompt {prompt[:40]!r}; it was made "
                "with other prompts or samples. Use the same, or overwrite=True (--overwrite)."
            )
    with out.open("r+b") as file:
        file.truncate(sum(len(line) + 1 for line in lines[:whole]))
    return whole


def _append(out: Path, text: str) -> None:
    try:
        with out.open("ab") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(
            f"out={str(out)!r} could not be written: {error}; --resume goes on with it."
        ) from error


def _answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], seed: int, options: dict[str, Any]
) -> list[str]:
    texts = list(prompts)
    chat = bool(getattr(tokenizer, "chat_template", None))
    if chat:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
    rows = [tokenizer(text, add_special_tokens=not chat)["input_ids"] for text in texts]
    end = model.generation_config.eos_token_id
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = end[0] if isinstance(end, list) else end
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), 0 if pad is None else int(pad))
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, length - len(tokens) :] = torch.tensor(tokens)
        mask[row, length - len(tokens) :] = 1
    if options["temperature"] == 0.0:
        options = {"max_new_tokens": options["max_new_tokens"], "do_sample": False}
    else:
        options = options | {"do_sample": True, "top_k": 0}
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        new: Tensor = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), pad_token_id=pad, **options
        )[:, length:]
    decoded: list[str] = tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in decoded]
