"""Task accuracy by greedy generation: is the answer to a prompt the one of its completion?"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gateskip.config import Budget
from gateskip.errors import ConfigError, DataError
from gateskip.execution.api import dense
from gateskip.fitting.passes import eval_mode
from gateskip.retrofit.devices import device_of
from gateskip.skipping.state import state_of

__all__ = ["LAST_NUMBER", "Question", "answers_right", "questions"]

LAST_NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
Question = tuple[str, str]
"""(prompt as the model reads it, right answer)."""


def questions(data: Sequence[Any], tokenizer: Any, pattern: str) -> list[Question]:
    """Prompts with the answers that ``pattern`` finds last in their completions.

    Raises:
        ConfigError: a pattern that is none, or no tokenizer. DataError: a row without prompt and
            completion, or whose completion has no answer.
    """
    if tokenizer is None:
        raise ConfigError("accuracy needs tokenizer=.")
    expression = _compile(pattern)
    found = []
    for index, row in enumerate(data):
        if not isinstance(row, Mapping) or not {"prompt", "completion"} <= set(row):
            raise DataError(f"data[{index}]: accuracy needs rows with 'prompt' and 'completion'.")
        answer = last_match(expression, row["completion"])
        if answer is None:
            raise DataError(f"data[{index}]: the completion has nothing that matches {pattern!r}.")
        prompt = row["prompt"] + "\n"
        if getattr(tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": row["prompt"]}]
            prompt = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        found.append((prompt, answer))
    return found


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"answer={pattern!r} is no regular expression ({error}).") from error


def last_match(expression: re.Pattern[str], text: str) -> str | None:
    """The last match in a text, of numbers without thousands separators."""
    matches = [match.group(0) for match in expression.finditer(text)]
    return matches[-1].replace(",", "").rstrip(".") if matches else None


@torch.no_grad()
def answers_right(
    model: nn.Module,
    asked: Sequence[Question],
    tokenizer: Any,
    pattern: str,
    budget: Budget | None,
    *,
    max_new_tokens: int,
    batch: int = 8,
    advance: Callable[[], None] = lambda: None,
) -> NDArray[np.float64]:
    """1 where the model's last match is the right answer, else 0, ``[N]``; None is dense."""
    expression, device = _compile(pattern), device_of(model)
    order = sorted(range(len(asked)), key=lambda n: len(asked[n][0]))
    right = np.zeros(len(asked))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    gated = "_gateskip" in vars(model)
    if gated:
        state_of(model).resolve(budget)
    context: Any = dense(model) if gated and budget is None else contextlib.nullcontext()
    options = {} if budget is None else {"gateskip_budget": budget}
    with eval_mode(model), context:
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            encoded = [tokenizer(asked[n][0], add_special_tokens=False)["input_ids"] for n in rows]
            longest = max(map(len, encoded))
            ids = torch.tensor([[pad] * (longest - len(e)) + e for e in encoded])
            mask = torch.tensor([[0] * (longest - len(e)) + [1] * len(e) for e in encoded])
            runner: Any = model
            out = runner.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), do_sample=False,
                max_new_tokens=max_new_tokens, pad_token_id=pad, **options,
            )  # fmt: skip
            for n, row in zip(rows, out[:, longest:], strict=True):
                text = tokenizer.decode(row, skip_special_tokens=True)
                right[n] = last_match(expression, text) == asked[n][1]
            advance()
    return right
