"""What all commands share on the way out: consoles, JSON to a file or to standard output."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from gateskip.errors import OutputError

__all__ = ["STDOUT", "JsonOption", "check_json", "command_line", "console_for", "write_json"]

STDOUT = "-"

JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE|-", help="Also write the result as JSON; - is stdout."),
]


def check_json(target: str | None) -> None:
    """Raise OutputError where ``target`` could not be written, before any work is done."""
    if target is None or target == STDOUT:
        return
    path = Path(target)
    if path.is_dir():
        raise OutputError(f"--json {target!r} is a folder; name a file.")
    if not path.parent.is_dir():
        raise OutputError(f"--json {target!r}: folder {str(path.parent)!r} does not exist.")


def command_line(program: str, options: dict[str, Any]) -> str:
    """A command for a result's header; of paths the last part, since folders differ by machine."""
    words = [program]
    for name, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if value is None or value is False or not values:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += [
                Path(v).name if "/" in str(v) or isinstance(v, Path) else str(v) for v in values
            ]
    return " ".join(words)


def console_for(target: str | None) -> Console:
    """Where people read: standard output, or standard error while JSON takes that."""
    return Console(stderr=target == STDOUT, highlight=False)


def write_json(target: str | None, data: Any) -> None:
    """Write ``data`` to a file, whole or not at all, or to standard output; None does nothing.

    Numbers that JSON lacks (infinite, not a number) become null.

    Raises:
        OutputError: the file cannot be written; an old one stays as it was.
    """
    if target is None:
        return
    text = json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if target == STDOUT:
        sys.stdout.write(text)
        return
    path = Path(target)
    # Opened plainly, so that the file gets the usual permissions, not mkstemp's private ones.
    temporary = path.with_name(f".{path.name}-{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OutputError(f"--json {target!r} could not be written: {error}.") from error


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
