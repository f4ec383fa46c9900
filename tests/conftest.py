"""Fixed threads and seeds for every test."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _fixed() -> None:
    torch.manual_seed(0)
