"""Programs in processes of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

__all__ = ["launched", "two_processes"]


def launched(*command: object) -> None:
    """Run a Python program on the CPU; it must end well, and soon."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def two_processes() -> tuple[object, ...]:
    """``accelerate launch`` on two gloo processes; its ``--cpu`` alone would start one."""
    return (
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2,
        "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", free_port(),
    )  # fmt: skip
