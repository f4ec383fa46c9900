"""Loss, perplexity and next-token agreement at any budget, beside the dense model.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import Tensor, nn

from gateskip.config import Budget, one_of
from gateskip.data import Batch, encode, take_tokens, to_batches
from gateskip.errors import ConfigError
from gateskip.execution.api import dense, trace
from gateskip.fitting.passes import eval_mode
from gateskip.retrofit.devices import device_of
from gateskip.skipping.ledger import Ledger
from gateskip.skipping.state import override, state_of

__all__ = ["Evaluation", "QualityRow", "check_arm", "evaluate"]

ARMS = ("gateskip", "control", "random")


@dataclasses.dataclass(frozen=True, slots=True)
class QualityRow:
    """Quality at one budget.

    Attributes:
        model: the base model's name. arm: ``"dense"``, ``"gateskip"``, ``"control"`` (the trained
            backbone without gates), ``"random"`` or another method. data: what the text is called.
            seed: of the training, or None. keep, compute: the budget asked for, or None.
        skip_rate: realised share of token×branch pairs skipped.
        macs_saved: realised share of decoder MACs saved, net of everything.
        loss: mean negative log-likelihood per scored token, nats. perplexity: exp(loss).
        agreement: share of scored tokens whose most likely token is the dense model's.
        tokens: scored tokens.
    """

    model: str
    arm: str
    data: str
    seed: int | None
    keep: float | None
    compute: float | None
    skip_rate: float
    macs_saved: float
    loss: float
    perplexity: float
    agreement: float
    tokens: int


def evaluate(
    model: nn.Module,
    data: Any,
    tokenizer: Any = None,
    *,
    budgets: Sequence[Budget] = (),
    max_length: int = 512,
    max_tokens: int | None = None,
    batch_tokens: int = 2048,
    reference: nn.Module | None = None,
    arm: str | None = None,
    name: str = "",
    seed: int | None = None,
    progress: bool = False,
) -> list[QualityRow]:
    """The dense model, then the gated model at every budget, on the same tokens.

    Args:
        model: a gated model. data: texts, rows or id tensors (see ``gateskip.data``); of a prompt
            and its completion only the completion is scored.
        budgets: what to evaluate. max_tokens: tokens used; None uses all.
        reference: the dense model, where training changed ``model``'s backbone; else ``model``
            itself without gates.
        arm: ``"control"`` for the trained backbone without gates and skipping, instead of budgets;
            None says ``"gateskip"``, ``"random"`` or another method, as the model is.
        name, seed: for the rows.

    Raises:
        BudgetError: a budget that the model cannot take, before any work. DataError: bad data.
        ConfigError: another arm than the model is, or no reference where one is needed.
    """
    run = Evaluation(
        model, data, tokenizer, max_length=max_length, max_tokens=max_tokens,
        batch_tokens=batch_tokens, reference=reference, arm=arm, name=name, seed=seed,
    )  # fmt: skip
    if run.arm != "control":
        for budget in budgets:
            state_of(model).resolve(budget)
    with Progress(disable=not progress, transient=True) as bar:
        arms = 1 if run.arm == "control" else len(budgets)
        task = bar.add_task("Evaluating", total=(1 + arms) * len(run.batches))
        run.advance = lambda: bar.advance(task)
        rows = [run.dense()]
        if run.arm == "control":
            return [*rows, run.control()]
        return rows + [run.at(budget) for budget in budgets]


def check_arm(model: nn.Module, arm: str | None, reference: nn.Module | None) -> str:
    """The arm that a gated model is to be: as asked, or as the model is.

    Raises:
        ConfigError: another arm than the model is, or no reference where one is needed.
    """
    state = state_of(model)
    chosen = arm or state.method
    one_of("arm", chosen, tuple(dict.fromkeys((*ARMS, state.method))))
    if chosen not in ("control", state.method):
        raise ConfigError(
            f"arm={chosen!r}, but the model skips by {state.method!r} "
            f"(importance={state.config.importance!r})."
        )
    if reference is None and (state.tuned or state.backbone_trained):
        raise ConfigError(
            "training changed this model's backbone, so it is not the dense model any more; "
            "pass that one as reference=."
        )
    return chosen


class Evaluation:
    """The arms of :func:`evaluate` one at a time, on the same tokens; the dense one runs once.

    Args, errors: as there.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        tokenizer: Any = None,
        *,
        max_length: int = 512,
        max_tokens: int | None = None,
        batch_tokens: int = 2048,
        reference: nn.Module | None = None,
        arm: str | None = None,
        name: str = "",
        seed: int | None = None,
    ) -> None:
        self.arm = check_arm(model, arm, reference)
        self.model, self.reference = model, reference
        self.name, self.seed = name, seed
        samples = take_tokens(encode(data, tokenizer, max_length), max_tokens)
        self.batches = to_batches(samples, batch_tokens)
        self.advance: Callable[[], None] = lambda: None
        self._dense: tuple[QualityRow, list[Tensor]] | None = None

    def dense(self) -> QualityRow:
        """The model before training, without gates."""
        return self._reference()[0]

    def control(self) -> QualityRow:
        """The trained backbone without gates and skipping."""
        best = self._reference()[1]
        with eval_mode(self.model), dense(self.model):
            loss, _, tokens, (agreed, _) = self._run(self.model, None, best)
        return self._row("control", None, loss, agreed / tokens, tokens, None)

    def at(self, budget: Budget) -> QualityRow:
        """The gated model at a budget."""
        best = self._reference()[1]
        with eval_mode(self.model):
            loss, _, tokens, (agreed, ledger) = self._run(self.model, budget, best)
        return self._row(self.arm, budget, loss, agreed / tokens, tokens, ledger)

    def _reference(self) -> tuple[QualityRow, list[Tensor]]:
        if self._dense is None:
            model, reference = self.model, self.reference
            with (
                eval_mode(model),
                eval_mode(reference) if reference is not None else dense(model),
            ):
                plain = model if reference is None else reference
                loss, best, tokens, _ = self._run(plain, None, None)
            self._dense = self._row("dense", None, loss, 1.0, tokens, None), best
        return self._dense

    def _run(self, model: Any, budget: Budget | None, best: Sequence[Tensor] | None) -> Any:
        return _arm(model, self.batches, budget, best, self.advance)

    def _row(self, kind: str, *figures: Any) -> QualityRow:
        base = str(getattr(self.model.config, "_name_or_path", "") or "")
        seed = None if kind == "dense" else self.seed
        return _row((base, kind, self.name, seed), *figures)


def _arm(
    model: Any,
    batches: Sequence[Batch],
    budget: Budget | None,
    best: Sequence[Tensor] | None,
    advance: Any,
) -> tuple[float, list[Tensor], int, tuple[int, Ledger | None]]:
    """(mean loss, most likely ids per batch, scored tokens, (agreements, ledger))."""
    loss, tokens, agreed = 0.0, 0, 0
    found: list[Tensor] = []
    device = device_of(model)
    with contextlib.ExitStack() as stack:
        recorder = None
        if budget is not None:
            stack.enter_context(override(state_of(model), budget=budget))
            recorder = stack.enter_context(trace(model))
        for index, batch in enumerate(batches):
            out = model(
                input_ids=batch.ids.to(device), attention_mask=batch.mask.to(device),
                use_cache=False,
            )  # fmt: skip
            scored = batch.scored[:, 1:].to(device)
            logits_NV = out.logits[:, :-1][scored].float()
            target_N = batch.ids[:, 1:].to(device)[scored]
            loss += float(nn.functional.cross_entropy(logits_NV, target_N, reduction="sum"))
            top = logits_NV.argmax(-1).cpu()
            found.append(top)
            tokens += top.shape[0]
            if best is not None:
                agreed += int((top == best[index]).sum())
            advance()
    ledger = None
    if recorder is not None:  # the policy's cost: how rows are batched here is no property of it
        ledger = Ledger.of(call.without_padding() for call in recorder.calls)
    return loss / max(tokens, 1), found, tokens, (agreed, ledger)


def _row(
    what: tuple[str, str, str, int | None],
    budget: Budget | None,
    loss: float,
    agreement: float,
    tokens: int,
    ledger: Any,
) -> QualityRow:
    return QualityRow(
        model=Path(what[0]).name,
        arm=what[1],
        data=what[2],
        seed=what[3],
        keep=None if budget is None else budget.keep,
        compute=None if budget is None else budget.compute,
        skip_rate=0.0 if ledger is None else ledger.skip_rate,
        macs_saved=0.0 if ledger is None else 1.0 - ledger.compute,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        agreement=agreement,
        tokens=tokens,
    )
