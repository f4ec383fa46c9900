"""Saving and loading, and everything that can be wrong with a checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gateskip
from gateskip.retrofit import checkpoint
from models import gated, random_ids, tiny, with_table


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path, Path]:
    """(gated model at a budget, its base's folder, its gates' folder)."""
    base, gates = tmp_path / "base", tmp_path / "gates"
    tiny().save_pretrained(base)
    model = with_table(gated(compensation="low_rank"))
    gateskip.set_budget(model, keep=0.6)
    gateskip.save(model, gates)
    return model, base, gates


@torch.no_grad()
def test_i9_a_fresh_process_gives_identical_logits(saved: Any, tmp_path: Path) -> None:
    model, base, gates = saved
    ids = random_ids(2, 12)
    torch.save(ids, tmp_path / "ids.pt")
    code = (
        f"import gateskip, torch; torch.set_num_threads({torch.get_num_threads()}); "
        f"m = gateskip.load({str(gates)!r}, base={str(base)!r}); "
        f"ids = torch.load({str(tmp_path / 'ids.pt')!r}); "
        f"torch.save(torch.no_grad()(m)(ids).logits, {str(tmp_path / 'out.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"HF_HUB_OFFLINE": "1"})
    assert torch.equal(torch.load(tmp_path / "out.pt"), model(ids).logits)


def test_a_bfloat16_base_is_still_the_base(saved: Any) -> None:
    _, base, gates = saved
    model = gateskip.load(gates, base=base, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.skip_gate.down.dtype == torch.float32


def test_another_base_is_refused(saved: Any) -> None:
    _, _, gates = saved
    with pytest.raises(gateskip.CheckpointError, match="model_type"):
        gateskip.load(gates, base=tiny("qwen3"))
    other = tiny()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
        other.model.embed_tokens.weight.mul_(1.5)
    with pytest.raises(gateskip.CheckpointError, match="other weights"):
        gateskip.load(gates, base=other)
    with pytest.raises(gateskip.CheckpointError, match="base="):
        gateskip.load(gates, base="does/not/exist/here")


@pytest.mark.parametrize("name", [checkpoint.CONFIG_FILE, checkpoint.TENSOR_FILE])
def test_truncated_files_are_refused(saved: Any, name: str) -> None:
    _, base, gates = saved
    whole = (gates / name).read_bytes()
    (gates / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(gateskip.CheckpointError, match="damaged"):
        gateskip.load(gates, base=base)
    (gates / name).unlink()
    with pytest.raises(gateskip.CheckpointError, match="no gateskip folder"):
        gateskip.load(gates, base=base)


def test_a_newer_schema_is_refused(saved: Any) -> None:
    _, base, gates = saved
    file = gates / checkpoint.CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": 99}))
    with pytest.raises(gateskip.CheckpointError, match="upgrade"):
        gateskip.load(gates, base=base)


def test_folders_that_are_in_the_way(saved: Any) -> None:
    model, base, gates = saved
    with pytest.raises(gateskip.OutputError, match="overwrite"):
        gateskip.save(model, gates, overwrite=False)
    with pytest.raises(gateskip.OutputError, match="file"):
        gateskip.save(model, base / "config.json")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_keeps_what_was_there(
    saved: Any, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base, gates = saved
    before = {p.name: p.read_bytes() for p in gates.iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "save_file", fail)
    gateskip.set_budget(model, keep=0.4)
    expected = gateskip.OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        gateskip.save(model, gates)
    assert {p.name: p.read_bytes() for p in gates.iterdir()} == before
    assert [p.name for p in gates.parent.iterdir() if p.name.startswith(".")] == []
    gateskip.load(gates, base=base)
