"""``push_to_hub``: a gated model, or a folder of gates, to the Hugging Face hub with its card.

The base model is not uploaded; the repository names it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import nn

from gateskip.errors import CheckpointError
from gateskip.execution.card import card_of
from gateskip.execution.checkpoint import save
from gateskip.retrofit.hub import check_target, upload

__all__ = ["push_to_hub"]


def push_to_hub(
    model: nn.Module | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload gates",
) -> str:
    """Upload gates, thresholds and what training changed in the backbone; not the base model.

    Args:
        model: a gated model, or a folder that :func:`gateskip.save` wrote.
        repo_id: ``user/name``; made where it does not exist.
        private: of a new repository; None takes the owner's default.
        token: None takes the one that ``hf auth login`` or ``HF_TOKEN`` left.

    Returns:
        The commit's address. ``gateskip.load(repo_id)`` reads what was uploaded.

    Raises:
        AttachError: the model is not gated. CheckpointError: the folder holds no gates.
        OutputError: no token, not allowed, or the hub cannot be reached.
    """
    check_target(repo_id, token)
    with tempfile.TemporaryDirectory() as temporary:
        if isinstance(model, nn.Module):
            folder = Path(temporary) / repo_id.rpartition("/")[2]
            save(model, folder)
        else:
            folder = Path(model)
            if not folder.is_dir():
                raise CheckpointError(
                    f"path={str(folder)!r} is no folder; give a gated model or a folder of gates."
                )
        if not (folder / "README.md").is_file():
            card_of(folder)
        return upload(folder, repo_id, private=private, token=token, commit_message=commit_message)
