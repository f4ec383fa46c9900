"""Gates on the Hugging Face hub: what :func:`gateskip.save` writes, as a repository.

The base model is not uploaded; the repository names it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from gateskip.errors import OutputError
from gateskip.execution.checkpoint import save
from gateskip.retrofit.checkpoint import read_checkpoint
from gateskip.retrofit.hub import first_line

__all__ = ["push_to_hub"]

FILES = ("gateskip_*", "README.md", "*.png")


def push_to_hub(
    source: nn.Module | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload gates",
) -> str:
    """Upload gates, thresholds and their card to a hub repository, which is made if need be.

    Args:
        source: a gated model, or a folder that :func:`gateskip.save` wrote.
        repo_id: ``"user/name"``.
        private: whether a new repository is private; None takes the account's default.
        token: None takes the one of ``hf auth login``.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: the folder has no gates. OutputError: the hub did not take it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    if isinstance(source, nn.Module):
        with tempfile.TemporaryDirectory() as folder:
            save(source, folder)
            return push_to_hub(
                folder, repo_id, private=private, token=token, revision=revision,
                commit_message=commit_message,
            )  # fmt: skip
    read_checkpoint(Path(source))  # whole, before anything is sent
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit: Any = api.upload_folder(
            repo_id=repo_id, folder_path=str(source), allow_patterns=list(FILES),
            revision=revision, commit_message=commit_message,
        )  # fmt: skip
    except LocalTokenNotFoundError as error:
        raise OutputError(
            f"repo_id={repo_id!r}: no token to write with; run `hf auth login`, or pass token=."
        ) from error
    except HFValidationError as error:
        raise OutputError(f"repo_id={repo_id!r} is no repository name: {error}.") from error
    except (HfHubHTTPError, OSError) as error:
        raise OutputError(
            f"repo_id={repo_id!r}: the hub did not take the gates ({first_line(error)}); what is "
            "saved locally stays."
        ) from error
    return str(commit.commit_url)
