"""The benchmark from files: saved gates, real text, several dtypes, one result.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gateskip.config import Budget, one_of
from gateskip.data import text_windows
from gateskip.errors import CheckpointError, ConfigError
from gateskip.evaluation.bench import run_bench
from gateskip.execution.checkpoint import load

__all__ = ["bench_gates"]

DTYPES = ("bfloat16", "float32", "float16")


def bench_gates(
    gates: str | Path,
    base: str | Path | None = None,
    *,
    budgets: Sequence[Budget],
    texts: Sequence[Any] | None = None,
    batch: int = 4,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    repeats: int = 5,
    compiled: bool = True,
    seed: int = 0,
    command: str = "",
    progress: bool = False,
) -> dict[str, Any]:
    """Load saved gates in every dtype and time them with :func:`run_bench`, on the same tokens.

    Args:
        gates: what ``gateskip.save`` wrote, calibrated. base: its base model, or the saved name.
        texts: real text (see ``gateskip.data``), at least ``batch * (prompt_tokens + new_tokens)``
            tokens; with more, repeats run on different text. None takes random ids and warns, since
            they are skipped unlike text.
        batch, prompt_tokens: of prefill; decoding runs at batch 1 after such a prompt.
        new_tokens: decoding steps per measurement.
        seed: of random ids.
        repeats, compiled, command, progress: as in :func:`run_bench`.

    Returns:
        ``{"header": {...}, "rows": [...]}`` with the rows of all dtypes.

    Raises:
        ConfigError: a size below 1, an unknown dtype or none. DataError: too little text.
        BudgetError: a budget that the gates cannot take. CheckpointError: gates or base damaged.
    """
    sizes = {"batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    for name, value in (sizes | {"repeats": repeats}).items():
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1.")
    if not dtypes:
        raise ConfigError("dtypes=() times nothing; name 'bfloat16', 'float32' or both.")
    for dtype in dtypes:
        one_of("dtypes", dtype, DTYPES)
    result: dict[str, Any] = {"header": {}, "rows": []}
    notes: list[str] = []
    ids: Tensor | None = None
    for dtype in dtypes:
        model = load(gates, base=base, dtype=dtype)
        if ids is None:
            shape = (batch, prompt_tokens + new_tokens)
            ids = _ids(model, base, texts, shape, repeats, seed)
        name = Path(str(base or model.config._name_or_path)).name
        found = run_bench(
            model, ids.to(model.device), budgets=budgets, new_tokens=new_tokens, repeats=repeats,
            compiled=compiled, name=name, command=command, progress=progress,
        )  # fmt: skip
        notes += [f"{dtype}: {note}" for note in found["header"]["notes"]]
        result["header"] = result["header"] or found["header"]
        result["rows"] += found["rows"]
        del model
    if texts is None:
        notes.append("random token ids, no text")
    result["header"] |= {"seed": seed, "notes": notes}
    return result


def _ids(
    model: Any,
    base: str | Path | None,
    texts: Sequence[Any] | None,
    shape: tuple[int, int],
    most: int,
    seed: int,
) -> Tensor:
    if texts is None:
        warnings.warn(
            "no texts, so random token ids are timed; they are not skipped as text is.",
            stacklevel=3,
        )
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(model.config.vocab_size, (most, *shape), generator=generator)
    from transformers import AutoTokenizer

    name = str(base or model.config._name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"base model {name!r} has no tokenizer that loads.") from error
    return text_windows(texts, tokenizer, shape, most)
