"""A progress bar with loss, penalty, budget and realised skip rates."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

__all__ = ["TrainingProgress"]

SHOWN = (
    ("loss", "loss", "{:.3f}"),
    ("gate_penalty", "penalty", "{:.3f}"),
    ("budget", "budget", "{:.2f}"),
    ("skip_rate_attention", "attention skipped", "{:.0%}"),
    ("skip_rate_mlp", "mlp skipped", "{:.0%}"),
)


class TrainingProgress(TrainerCallback):  # type: ignore[misc]
    """One line that says where training stands; the Trainer's own bar is to be off."""

    def __init__(self, console: Console) -> None:
        self.bar = Progress(
            TextColumn("Training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"), console=console, transient=True,
        )  # fmt: skip
        self.task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.start()
        self.task = self.bar.add_task(
            "", total=state.max_steps, completed=state.global_step, figures=""
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if self.task is None or not logs or "loss" not in logs:
            return
        figures = [f"{label} {form.format(logs[n])}" for n, label, form in SHOWN if n in logs]
        self.bar.update(self.task, figures=" · ".join(figures))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Stop drawing, also after an error."""
        self.bar.stop()
