# ruff: noqa: E402
"""Two optimiser steps of a tiny model, in one process or more: ``ddp_script.py FOLDER BATCH``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch
import transformers
from transformers import TrainingArguments

import gateskip
from gateskip.skipping.state import state_of
from gateskip.training import GateSkipTrainer, GateSkipTrainingConfig, make_dataset
from models import gated, random_ids, with_table


def main(folder: Path, batch: int) -> None:
    """Write what the step changed, from rank 0, and the checkpoint."""
    transformers.logging.set_verbosity_error()
    model = with_table(gated(compensation="low_rank", protected_first=2))
    # Rows of the second half are so short that nobody of theirs may be skipped: on the second rank
    # compensation has no part in the loss.
    lengths = [20, 17, 14, 11, 2, 2, 2, 2]
    rows = make_dataset([random_ids(1, n, seed=i)[0] for i, n in enumerate(lengths)])
    run = GateSkipTrainer(
        model,
        TrainingArguments(
            str(folder / "run"), max_steps=2, per_device_train_batch_size=batch, optim="sgd",
            learning_rate=0.01, max_grad_norm=0.0, lr_scheduler_type="constant", use_cpu=True,
            save_steps=1, report_to=[], disable_tqdm=True, logging_steps=1,
            train_sampling_strategy="sequential",
        ),
        train_dataset=rows,
        gateskip_args=GateSkipTrainingConfig(
            backbone="full", train_gates=True, penalty=0.3, penalty_kind="kl", penalty_target=0.5,
            thresholds="running", budget_unit="keep", budget_start=0.6, budget_end=0.6,
        ),
    )  # fmt: skip
    run._own.running.values = dict(zip(  # type: ignore[union-attr]
        state_of(model).branches, state_of(model).policy.thresholds[2], strict=True  # type: ignore[union-attr]
    ))  # fmt: skip
    run.train()
    if run.args.process_index == 0:
        found = {name: p.detach() for name, p in model.named_parameters()}
        found["means"] = torch.tensor(run._means.to_json())  # type: ignore[union-attr]
        found["thresholds"] = torch.tensor([row[2] for row in run._own.running.to_json()])  # type: ignore[union-attr]
        names = ("gate_penalty", "budget", "skip_rate", "skip_rate_attention", "skip_rate_mlp")
        found["logs"] = torch.tensor([
            [entry[name] for name in names] for entry in run.state.log_history if "loss" in entry
        ])  # fmt: skip
        torch.save(found, folder / "found.pt")
        gateskip.save(run.finish(), folder / "gates")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
