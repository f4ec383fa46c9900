"""Gates to a hub and back, over HTTP, and one clear error where that cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import gateskip
from gateskip.errors import AttachError, CheckpointError, OutputError
from hub import TOKEN, Hub, serving
from models import gated, random_ids, tiny, with_table

# huggingface_hub's own call of its HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving(monkeypatch, tmp_path / "cache") as found:
        yield found


def model() -> Any:
    return with_table(gated(compensation="low_rank"))


def test_there_and_back(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    first = model()
    gateskip.set_budget(first, keep=0.75)
    url = gateskip.push_to_hub(first, "someone/gates", commit_message="Gates of a test")
    assert url.startswith(f"{hub.url}/someone/gates/commit/")
    assert hub.messages == ["Gates of a test"]
    (files,) = hub.repos["someone/gates"]
    assert set(files) == {"README.md", "gateskip_config.json", "gateskip_model.safetensors"}
    assert hub.lfs_files == {"gateskip_model.safetensors"}, "tensors go by LFS, text does not"
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "gateskip"
    ids = random_ids(1, 12)
    again = gateskip.load("someone/gates", base=tiny())
    assert torch.equal(again(ids).logits, first(ids).logits)
    # A second upload is a second commit; the first stays readable by its revision.
    gateskip.set_budget(first, keep=0.5)
    gateskip.push_to_hub(first, "someone/gates")
    newest = gateskip.load("someone/gates", base=tiny())
    assert torch.equal(newest(ids).logits, first(ids).logits)
    assert not torch.equal(newest(ids).logits, again(ids).logits)
    old = gateskip.load("someone/gates", base=tiny(), revision="v0")
    assert torch.equal(old(ids).logits, again(ids).logits)


def test_a_folder_goes_without_its_checkpoints(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "trained"
    gateskip.save(model(), folder)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "gateskip_model.safetensors").write_bytes(b"large")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmine")
    gateskip.push_to_hub(folder, "someone/folder", private=True, token=TOKEN)
    (files,) = hub.repos["someone/folder"]
    assert set(files) == {"README.md", "gateskip_config.json", "gateskip_model.safetensors"}
    assert files["README.md"].endswith(b"mine"), "a card that is there stays"
    assert hub.private["someone/folder"]


def test_what_was_loaded_once_is_there_without_a_network(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    gateskip.push_to_hub(model(), "someone/gates", token=TOKEN)
    gateskip.load("someone/gates", base=tiny())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    gateskip.load("someone/gates", base=tiny())
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        gateskip.load("someone/other", base=tiny())


def test_a_fresh_process_takes_the_hub_from_its_environment(hub: Hub, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "base")
    first = model()
    gateskip.push_to_hub(first, "someone/gates", private=True, token=TOKEN)
    code = (
        "import sys, gateskip, torch; model = gateskip.load('someone/gates', base=sys.argv[1], "
        "revision='main'); torch.save(model(torch.arange(3, 15)[None]).logits, sys.argv[2])"
    )
    here = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0", "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "base", tmp_path / "logits.pt"],
        check=True, env=os.environ | here, capture_output=True,
    )  # fmt: skip
    found = torch.load(tmp_path / "logits.pt")
    assert torch.equal(found, first(torch.arange(3, 15)[None]).logits)


def test_loading_says_what_is_wrong(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="'someone/none' does not exist on the hub, or is"):
        gateskip.load("someone/none", base=tiny())
    gateskip.push_to_hub(model(), "someone/gates", private=True, token=TOKEN)
    with pytest.raises(CheckpointError, match=r"private.*hf auth login"):
        gateskip.load("someone/gates", base=tiny())
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(CheckpointError, match="no revision 'v7'"):
        gateskip.load("someone/gates", base=tiny(), revision="v7")
    hub.repos["someone/plain"] = [{"config.json": b"{}"}]
    hub.private["someone/plain"] = False
    with pytest.raises(CheckpointError, match=r"no gateskip_config.json"):
        gateskip.load("someone/plain", base=tiny())


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with serving(monkeypatch, tmp_path / "cache"):
        pass  # the address stays, nobody answers
    from huggingface_hub import constants

    closed = model()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"'someone/gates'.*cannot be reached"):
        gateskip.load("someone/gates", base=tiny())
    with pytest.raises(OutputError, match=r"repo_id='someone/gates'.*cannot be reached"):
        gateskip.push_to_hub(closed, "someone/gates", token=TOKEN)


def test_uploading_says_what_is_wrong(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no token.*hf auth login"):
        gateskip.push_to_hub(model(), "someone/gates")
    with pytest.raises(OutputError, match=r"refuses this token \(401\)"):
        gateskip.push_to_hub(model(), "someone/gates", token="hf_reads")
    with pytest.raises(OutputError, match="names no owner"):
        gateskip.push_to_hub(model(), "gates", token=TOKEN)
    with pytest.raises(OutputError, match="no name of the hub"):
        gateskip.push_to_hub(model(), "some one/gates", token=TOKEN)
    with pytest.raises(CheckpointError, match="no folder"):
        gateskip.push_to_hub(tmp_path / "none", "someone/gates", token=TOKEN)
    with pytest.raises(CheckpointError, match=r"no gateskip_config.json"):
        gateskip.push_to_hub(tmp_path, "someone/gates", token=TOKEN)
    with pytest.raises(AttachError):
        gateskip.push_to_hub(tiny(), "someone/gates", token=TOKEN)
    assert hub.repos == {}, "nothing was made"


def test_a_revision_is_for_hub_names(tmp_path: Path) -> None:
    gateskip.save(model(), tmp_path / "gates")
    with pytest.raises(CheckpointError, match="revision='main' is for a hub name"):
        gateskip.load(tmp_path / "gates", base=tiny(), revision="main")
