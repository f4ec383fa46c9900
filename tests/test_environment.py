"""What importing the package does to its process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

NAME = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


@pytest.mark.parametrize("given", [None, "77"])
def test_room_for_programs_unless_the_user_says_otherwise(given: str | None) -> None:
    environment = {k: v for k, v in os.environ.items() if k != NAME}
    if given:
        environment[NAME] = given
    code = f"import gateskip, os; gateskip.attach; print(os.environ.get('{NAME}'))"
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == (given or "8192")
