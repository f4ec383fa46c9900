"""Several processes: the same step as one, whoever skips what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import free_port, launched, two_processes

import gateskip
from models import random_ids, tiny

SCRIPT = Path(__file__).with_name("ddp_script.py")
CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of one process with 8 rows, and of two with 4 each, under ``accelerate launch``."""
    root = tmp_path_factory.mktemp("ddp")
    (root / "one").mkdir()
    (root / "two").mkdir()
    launched(SCRIPT, root / "one", 8)
    launched(*two_processes(), SCRIPT, root / "two", 4)
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
