"""``--push-to-hub`` of commands that make gates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["PushOption", "check_repository", "push"]

PushOption = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="USER/NAME", help="Upload the result, and its card."),
]


def check_repository(name: str | None) -> None:
    """Raise OutputError, before any work, where a name is none or nobody is logged in."""
    if name is None:
        return
    from gateskip.retrofit.hub import check_target

    check_target(name)


def push(console: Any, folder: Path, name: str | None) -> None:
    """Upload, and say where to."""
    if name is None:
        return
    import gateskip

    console.print(f"Pushed to {gateskip.push_to_hub(folder, name)}")
