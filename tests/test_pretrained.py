"""The gates that this repository ships: whole, small, and described."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gateskip.config import GateConfig
from gateskip.retrofit.checkpoint import read_checkpoint
from gateskip.skipping.policy import ThresholdTable

FOLDERS = sorted((Path(__file__).resolve().parents[1] / "pretrained").iterdir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_shipped_gates(folder: Path) -> None:
    config, tensors = read_checkpoint(folder)
    gate = GateConfig.from_json(config["gate"])
    policy = ThresholdTable.from_json(config["policy"])
    layers = config["base"]["sizes"]["num_hidden_layers"]
    assert len(policy.thresholds[0]) == layers * len(gate.branches)
    assert policy.floor("compute") < 0.5
    gates = {n for n in tensors if ".skip_gate." in n}
    assert all(tensors[n].dtype == torch.float32 for n in gates)
    assert len({n.split(".skip_gate.")[0] for n in gates}) == layers * len(gate.branches)
    assert any(n.startswith("merged.") for n in tensors)
    assert sum(p.stat().st_size for p in folder.iterdir()) < 10_000_000
    card = (folder / "README.md").read_text(encoding="utf-8")
    for word in ("license", "gateskip train", "seed", "Figures", "Limits", "data"):
        assert word in card
    assert not Path(config["base"]["name_or_path"]).is_absolute()
