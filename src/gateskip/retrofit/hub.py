"""Gates on the Hugging Face hub: the files of a checkpoint, up and down.

Knows nothing of models.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from gateskip.errors import CheckpointError, GateSkipError, OutputError
from gateskip.retrofit.checkpoint import read_checkpoint

__all__ = ["FILES", "check_target", "download", "is_hub_name", "upload"]

#: What belongs to gates; checkpoints of a training and other files stay at home.
FILES = (
    "gateskip_config.json",
    "gateskip_model.safetensors",
    "gateskip_backbone.safetensors",
    "README.md",
)
CLIENTS = ("httpx", "httpx2")
T = TypeVar("T")


def is_hub_name(path: str | Path) -> bool:
    """Whether ``path`` reads as ``user/name`` and is no local folder."""
    text = str(path)
    local = isinstance(path, Path) or text.startswith((".", "/", "~")) or Path(text).exists()
    return not local and text.count("/") == 1


def download(repo_id: str, *, revision: str | None = None, token: Any = None) -> Path:
    """The folder of a repository's gates, from the cache where they are there.

    Raises:
        CheckpointError: no such repository or revision, no access, or no network.
    """
    from huggingface_hub import snapshot_download

    def get() -> str:
        return snapshot_download(
            repo_id, revision=revision, token=token, allow_patterns=["gateskip_*"]
        )

    return Path(_asking(get, f"path={repo_id!r}", revision, CheckpointError))


def check_target(repo_id: str, token: str | None = None) -> None:
    """What can be known before an upload without a network.

    Raises:
        OutputError: no legal name, or no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise OutputError(f"repo_id={repo_id!r} is no name of the hub: {error}") from error
    if "/" not in repo_id:
        raise OutputError(f"repo_id={repo_id!r} names no owner; give user/name.")
    if (token or get_token()) is None:
        raise OutputError(
            f"repo_id={repo_id!r}: no token to write with; run `hf auth login`, set HF_TOKEN or "
            "pass token=."
        )


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload gates",
) -> str:
    """Upload a checkpoint folder's own files; makes the repository where there is none.

    Returns:
        The commit's address.

    Raises:
        CheckpointError: no gates there. OutputError: refused, no token, or no network.
    """
    read_checkpoint(folder)
    check_target(repo_id, token)
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="gateskip")

    def put() -> Any:
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message,
            allow_patterns=list(FILES),
        )  # fmt: skip

    return str(_asking(put, f"repo_id={repo_id!r}", None, OutputError).commit_url)


def _asking(call: Callable[[], T], what: str, revision: str | None, kind: type[GateSkipError]) -> T:
    """The hub's many errors as one of ours, with what to do about it."""
    from huggingface_hub import errors

    clients = _client_errors()
    at = "" if revision is None else f" at revision {revision!r}"
    try:
        return call()
    except errors.GatedRepoError as error:
        raise kind(
            f"{what}: its owner grants access on request; ask there, then log in."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise kind(
            f"{what} does not exist on the hub, or is private; check the name, and log in by "
            "`hf auth login` or HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise kind(f"{what} has no revision {revision!r}; name a branch, tag or commit.") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise kind(
                f"{what}: the hub refuses this token ({status}); log in by `hf auth login` with a "
                "token that may write there."
            ) from error
        raise kind(f"{what}{at}: the hub answered {status} ({_line(error)}).") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise kind(
            f"{what}{at} is no local folder, not in the cache, and the hub cannot be reached "
            f"({_line(error)}); check the network and HF_HUB_OFFLINE, or give a folder."
        ) from error
    except errors.HFValidationError as error:
        raise kind(f"{what} is no name of the hub: {_line(error)}") from error
    except clients as error:
        raise kind(_unreachable(what, error)) from error
    except RuntimeError as error:  # of a file's upload
        if not isinstance(error.__cause__, clients):
            raise
        raise kind(_unreachable(what, error.__cause__)) from error


def _unreachable(what: str, error: BaseException) -> str:
    return (
        f"{what}: the hub cannot be reached ({type(error).__name__}: {_line(error)}); check the "
        "network."
    )


def _client_errors() -> tuple[type[Exception], ...]:
    """The errors of the HTTP clients that versions of huggingface_hub use."""
    found = [name for name in CLIENTS if importlib.util.find_spec(name)]
    return tuple(importlib.import_module(name).HTTPError for name in found)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
