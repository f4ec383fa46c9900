"""What commands share: options, atomic JSON, loading, budgets."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from gateskip.config import Budget
from gateskip.errors import ConfigError, OutputError

__all__ = [
    "BaseOption",
    "DataOption",
    "DtypeOption",
    "JsonOption",
    "OverwriteOption",
    "budgets_of",
    "emit_json",
    "load_gated",
    "one_budget",
]

JsonOption = Annotated[
    str | None, typer.Option("--json", help="Write the result as JSON to this file, or - .")
]
DataOption = Annotated[
    Path, typer.Option("--data", help="JSONL (text, prompt/completion or messages) or text file.")
]
BaseOption = Annotated[
    str | None, typer.Option("--base", help="Base model; default: the one saved with the gates.")
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="float32, bfloat16 or float16.", show_default=True)
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")
]


def emit_json(result: Any, target: str | None) -> None:
    """Write JSON to a file (through a temporary name) or, for "-", to standard output."""
    if target is None:
        return
    text = json.dumps(result, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    path = Path(target)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"json={target!r} could not be written: {error}.") from error


def one_budget(keep: float | None, compute: float | None) -> Budget | None:
    """A Budget from two options, or None where neither is given. Raises BudgetError."""
    if keep is None and compute is None:
        return None
    return Budget(keep=keep, compute=compute)


def budgets_of(keep: list[float] | None, compute: list[float] | None) -> list[Budget]:
    """Budgets of two repeatable options."""
    return [Budget(keep=k) for k in keep or []] + [Budget(compute=c) for c in compute or []]


def torch_dtype(name: str) -> Any:
    """A torch dtype by name. Raises ConfigError."""
    import torch

    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype={name!r} is not one of float32, bfloat16, float16.")
    return getattr(torch, name)


def load_gated(gates: str, base: str | None, dtype: str) -> tuple[Any, Any]:
    """(gated model, its tokenizer)."""
    chosen = torch_dtype(dtype)
    import gateskip
    from gateskip.skipping.state import state_of

    model = gateskip.load(gates, base=base, dtype=chosen)
    return model, load_tokenizer(base or state_of(model).base["name_or_path"])


def load_base(name: str, dtype: str) -> tuple[Any, Any]:
    """(dense model, its tokenizer). Raises ConfigError where there is none."""
    chosen = torch_dtype(dtype)
    from transformers import AutoConfig, AutoModelForCausalLM

    from gateskip.retrofit.attach import find_family

    try:
        find_family(AutoConfig.from_pretrained(name))
        model = AutoModelForCausalLM.from_pretrained(name, dtype=chosen).eval()
    except OSError as error:
        raise ConfigError(f"model={name!r} could not be loaded: {one_line(error)}") from error
    return model, load_tokenizer(name)


def load_tokenizer(name: str) -> Any:
    """A tokenizer. Raises ConfigError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"tokenizer of {name!r} could not be loaded: {one_line(error)}"
        ) from error


def one_line(error: BaseException) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split())[:300]
