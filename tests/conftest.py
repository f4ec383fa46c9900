"""Fixed threads and seeds for every test."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)  # tiny models: threads only wait for each other


@pytest.fixture(autouse=True)
def _fixed() -> None:
    torch.manual_seed(0)
