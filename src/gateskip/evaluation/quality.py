"""Loss, perplexity and next-token agreement at any budget, beside the dense model.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
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

__all__ = ["QualityRow", "evaluate"]

ARMS = ("gateskip", "control", "random")


@dataclasses.dataclass(frozen=True, slots=True)
class QualityRow:
    """Quality at one budget.

    Attributes:
        model: the base model's name. arm: ``"dense"``, ``"gateskip"``, ``"control"`` (the trained
            backbone without gates) or ``"random"``. data: what the text is called. seed: of the
            training, or None. keep, compute: the budget asked for, or None.
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
            None says ``"gateskip"`` or ``"random"``, as the model is. name, seed: for the rows.

    Raises:
        BudgetError: a budget that the model cannot take, before any work. DataError: bad data.
        ConfigError: another arm than the model is, or no reference where one is needed.
    """
    state = state_of(model)
    arm = arm or ("random" if state.config.importance == "random" else "gateskip")
    one_of("arm", arm, ARMS)
    if arm != "control" and (arm == "random") != (state.config.importance == "random"):
        raise ConfigError(f"arm={arm!r}, but the model has importance={state.config.importance!r}.")
    if reference is None and (state.tuned or state.backbone_trained):
        raise ConfigError(
            "training changed this model's backbone, so it is not the dense model any more; pass "
            "that one as reference=."
        )
    for budget in () if arm == "control" else budgets:
        state.resolve(budget)
    samples = take_tokens(encode(data, tokenizer, max_length), max_tokens)
    batches = to_batches(samples, batch_tokens)
    rows = []
    with Progress(disable=not progress, transient=True) as bar:
        arms = 1 if arm == "control" else len(budgets)
        task = bar.add_task("Evaluating", total=(1 + arms) * len(batches))
        base = str(getattr(model.config, "_name_or_path", "") or "")

        def row(kind: str, *figures: Any) -> QualityRow:
            return _row((base, kind, name, None if kind == "dense" else seed), *figures)

        def advance() -> None:
            bar.advance(task)

        with eval_mode(model):
            with eval_mode(reference) if reference is not None else dense(model):
                plain = model if reference is None else reference
                loss, best, tokens, _ = _arm(plain, batches, None, None, advance)
            rows.append(row("dense", None, loss, 1.0, tokens, None))
            if arm == "control":
                with dense(model):
                    loss, _, tokens, (agreed, _) = _arm(model, batches, None, best, advance)
                return [*rows, row("control", None, loss, agreed / tokens, tokens, None)]
            for budget in budgets:
                loss, _, tokens, (agreed, ledger) = _arm(model, batches, budget, best, advance)
                rows.append(row(arm, budget, loss, agreed / tokens, tokens, ledger))
    return rows


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
