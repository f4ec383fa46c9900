"""``GateSkipMixin`` before a trainer of TRL, which wraps the model's forward and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from gateskip.skipping.state import state_of
from gateskip.training import GateSkipMixin, GateSkipTrainingConfig
from models import VOCAB, gated, random_ids, with_table


def words() -> Any:
    names = ["<pad>", "<s>", "</s>", *(f"w{n}" for n in range(VOCAB - 3))]
    split = Tokenizer(WordLevel({w: i for i, w in enumerate(names)}, unk_token="<pad>"))
    split.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=split, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.filterwarnings("ignore")
def test_sft_trainer(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    class Trainer(GateSkipMixin, SFTTrainer):  # type: ignore[misc]
        pass

    rows = [" ".join(f"w{(7 * i + 3 * j) % 120}" for j in range(12 + i % 5)) for i in range(16)]
    model = with_table(gated(compensation="low_rank"))
    config = GateSkipTrainingConfig(
        backbone="full", train_gates=True, penalty=0.1, budget_start=0.7, budget_end=0.7,
        calibrate_every=2,
    )  # fmt: skip
    arguments = SFTConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, logging_steps=1, use_cpu=True,
        report_to=[], save_steps=2, bf16=False, learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=Dataset.from_list([{"text": row} for row in rows]),
        processing_class=words(), gateskip_args=config,
        calibration_data=[random_ids(1, 100, seed=i)[0] for i in range(12)],
    )  # fmt: skip
    first = state_of(model).policy
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert arguments.gradient_checkpointing, "TRL's default, which runs every layer twice"
    trainer.train()
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert len(entries) == 3
    assert state_of(model).policy != first, "the mixin alone finds thresholds again"
    for entry in entries:
        assert 0.05 < entry["skip_rate"] < 0.95
        assert 0 < entry["gate_penalty"] < 1
        assert entry["budget"] == pytest.approx(0.7)
    moved = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    assert any(".skip_gate." in n for n in moved)
    assert any(".q_proj." in n for n in moved)
    assert (tmp_path / "checkpoint-2" / "gateskip_config.json").is_file()
