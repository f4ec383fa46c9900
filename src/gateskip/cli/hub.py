"""``--push-to-hub`` of commands that make gates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gateskip.errors import ConfigError

__all__ = ["PushOption", "check_repository", "push"]

PushOption = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="USER/NAME", help="Upload the result, and its card."),
]


def check_repository(name: str | None) -> None:
    """Raise ConfigError, before any work, where a name is none or nobody is logged in."""
    if name is None:
        return
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"push_to_hub={name!r} is no repository name: {error}.") from error
    if get_token() is None:
        raise ConfigError(f"push_to_hub={name!r} needs a token; run `hf auth login` first.")


def push(console: Any, folder: Path, name: str | None) -> None:
    """Upload, and say where to."""
    if name is None:
        return
    import gateskip

    console.print(f"Pushed to {gateskip.push_to_hub(folder, name)}")
