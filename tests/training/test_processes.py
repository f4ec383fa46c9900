"""Several processes: the same step as one, whoever skips what."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gateskip
from models import random_ids, tiny

SCRIPT = Path(__file__).with_name("ddp_script.py")
CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"


def launched(*command: object) -> None:
    """Run a program that must end well, and soon."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True,
        timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of one process with 8 rows, and of two with 4 each, under ``accelerate launch``."""
    root = tmp_path_factory.mktemp("ddp")
    (root / "one").mkdir()
    (root / "two").mkdir()
    launched(SCRIPT, root / "one", 8)
    launched(
        # --cpu alone starts one process; this is gloo on two, since no GPU is to be used.
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2,
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port(),
        SCRIPT, root / "two", 4,
    )  # fmt: skip
    return root / "one", root / "two"


def test_two_processes_take_the_step_of_one(both: tuple[Path, Path]) -> None:
    one, two = (torch.load(folder / "found.pt") for folder in both)
    assert one.keys() == two.keys()
    for name, value in one.items():
        error = float((two[name] - value).abs().max())
        assert error <= 1e-5 + 1e-4 * float(value.abs().max()), name


def test_checkpoints_are_written_once_and_load_in_one_process(both: tuple[Path, Path]) -> None:
    checkpoint = both[1] / "run" / "checkpoint-2"
    assert (checkpoint / "gateskip_training.json").is_file()
    assert (checkpoint / "rng_state_0.pth").is_file()
    assert (checkpoint / "rng_state_1.pth").is_file()
    logits: list[Any] = []
    for folder in (checkpoint, both[1] / "gates"):
        model = gateskip.load(folder, base=tiny())
        with torch.no_grad():
            logits.append(model(random_ids(1, 9)).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("deepspeed_zero2", "DEEPSPEED")],
)
def test_ready_made_configs(name: str, kind: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type.value == kind
    assert config.num_processes == 2


def test_zero_3_is_refused(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    from gateskip.errors import UnsupportedError
    from gateskip.training import GateSkipTrainer
    from models import gated, with_table

    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    arguments.deepspeed = {"zero_optimization": {"stage": 3}}
    with pytest.raises(UnsupportedError, match="zero_optimization stage 2"):
        GateSkipTrainer(with_table(gated()), arguments, train_dataset=[])


def test_fully_shard_on_two_processes(tmp_path: Path) -> None:
    launched(
        "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port(),
        SCRIPT.with_name("fsdp_script.py"), tmp_path,
    )  # fmt: skip
    assert (tmp_path / "done").is_file()
