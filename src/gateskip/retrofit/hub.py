"""Gates of a hub repository, as a local folder."""

from __future__ import annotations

from pathlib import Path

from gateskip.errors import CheckpointError

__all__ = ["fetch", "first_line"]


def fetch(repo_id: str, revision: str | None = None) -> Path:
    """The folder of a hub repository's gates, downloaded or from the cache.

    Raises:
        CheckpointError: there is none, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        found = snapshot_download(repo_id, revision=revision, allow_patterns=["gateskip_*"])
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"path={repo_id!r} is no local folder, and the hub did not give it "
            f"({first_line(error)}); check the name, the network and `hf auth login`."
        ) from error
    return Path(found)


def first_line(error: BaseException) -> str:
    """An error's first line, without its full stop."""
    return str(error).strip().partition("\n")[0].rstrip(".")
