"""The files of a checkpoint: ``gateskip_config.json`` and ``gateskip_model.safetensors``.

Written to a temporary folder and moved into place, so an interrupt or a full disk leaves what was
there before whole. Knows nothing of what the tensors mean.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gateskip.config import SCHEMA_VERSION
from gateskip.errors import CheckpointError, OutputError

__all__ = ["check_output_folder", "read_backbone", "read_checkpoint", "write_checkpoint"]

CONFIG_FILE = "gateskip_config.json"
TENSOR_FILE = "gateskip_model.safetensors"
BACKBONE_FILE = "gateskip_backbone.safetensors"


def check_output_folder(path: str | Path, overwrite: bool) -> None:
    """Raise OutputError when ``path`` is in the way: a file, or a non-empty folder."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise OutputError(f"path={str(path)!r} is a file; name a folder.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise OutputError(
            f"path={str(path)!r} exists and is not empty; choose another or pass overwrite=True "
            "(--overwrite)."
        )


def write_checkpoint(
    path: str | Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    *,
    overwrite: bool,
    backbone: dict[str, Tensor] | None = None,
) -> None:
    """Write both files, and the weights of a backbone trained in full, into folder ``path``.

    Other files there are kept.

    Raises:
        OutputError: in the way, or not writable; what was there stays whole.
    """
    check_output_folder(path, overwrite)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary: Path | None = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        names = [TENSOR_FILE, CONFIG_FILE]
        _save_tensors(tensors, temporary / TENSOR_FILE)
        if backbone is not None:
            _save_tensors(backbone, temporary / BACKBONE_FILE)
            names.insert(0, BACKBONE_FILE)
        text = json.dumps({"schema_version": SCHEMA_VERSION} | config, indent=2)
        (temporary / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        path.mkdir(exist_ok=True)
        for name in names:
            os.replace(temporary / name, path / name)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"path={str(path)!r} could not be written: {error}.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    flat = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    save_file(flat, path, metadata={"format": "pt"})


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a checkpoint folder.

    Raises:
        CheckpointError: missing, truncated, corrupted, or of a newer schema.
    """
    for name in (CONFIG_FILE, TENSOR_FILE):
        if not (path / name).is_file():
            raise CheckpointError(f"path={str(path)!r} has no {name}; it is no gateskip folder.")
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path / CONFIG_FILE} is damaged ({error}); save again.") from error
    version = config.get("schema_version") if isinstance(config, dict) else None
    if not isinstance(version, int):
        raise CheckpointError(f"{path / CONFIG_FILE} has no schema_version; save again.")
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path / CONFIG_FILE} has schema_version {version}, newer than {SCHEMA_VERSION}; "
            "upgrade gateskip."
        )
    return config, _load_tensors(path / TENSOR_FILE)


def read_backbone(path: Path) -> dict[str, Tensor]:
    """Weights of a backbone that was trained in full. Raises CheckpointError."""
    if not (path / BACKBONE_FILE).is_file():
        raise CheckpointError(f"path={str(path)!r} has no {BACKBONE_FILE}; save again.")
    return _load_tensors(path / BACKBONE_FILE)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); save again.") from error
