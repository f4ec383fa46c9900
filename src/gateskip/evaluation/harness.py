"""Tasks of lm-evaluation-harness under budgets, beside the dense model.

Needs lm-eval (``pip install gateskip[eval]``). Importing this registers the model ``gateskip`` with
it, for ``simple_evaluate(model="gateskip", model_args="gates=PATH,compute=0.75")``; its own command
line, with that model: ``python -m gateskip.evaluation.harness --model gateskip ...``.

Shapes: B rows, T tokens of one call, S calls of one generation.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import difflib
import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import set_seed

from gateskip.config import Budget
from gateskip.errors import ConfigError, DataError
from gateskip.evaluation.quality import check_arm
from gateskip.execution.api import dense as without_gates
from gateskip.execution.checkpoint import load
from gateskip.fitting.passes import eval_mode
from gateskip.skipping.call import Call
from gateskip.skipping.ledger import CallRecord, macs_of
from gateskip.skipping.state import override, state_of

try:
    from lm_eval.api.registry import model_registry
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from tqdm import tqdm
except ImportError as error:
    raise ConfigError(
        f"lm-eval cannot be imported ({error}); run: pip install gateskip[eval]"
    ) from error

__all__ = ["GateSkipLM", "HarnessRow", "harness_evaluate"]

SEED = 1234  # lm-eval's own, of few-shot examples and sampling
RESAMPLES = 1000  # for standard errors of what is no mean, such as perplexity


@dataclasses.dataclass(frozen=True, slots=True)
class HarnessRow:
    """One task at one budget.

    Attributes:
        model, arm, seed, keep, compute, skip_rate, macs_saved: as in ``QualityRow``; generated
            tokens count up to the end of each answer.
        task: its name; version: the task's. budget: as text, empty without one.
        metrics: by lm-eval's names, with the filter where there is one
            (``"exact_match,strict-match"``). stderr: their standard errors, or None.
        n: documents.
    """

    model: str
    arm: str
    task: str
    version: str | float | None
    seed: int | None
    budget: str
    keep: float | None
    compute: float | None
    skip_rate: float
    macs_saved: float
    metrics: dict[str, float]
    stderr: dict[str, float | None]
    n: int


def harness_evaluate(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    budgets: Sequence[Budget] = (),
    limit: int | None = None,
    include_path: str | Path | None = None,
    batch_size: int = 1,
    dense: bool = True,
    reference: nn.Module | None = None,
    arm: str | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> list[HarnessRow]:
    """Run every task on the dense model, then at every budget, on the same documents.

    Args:
        model: a gated model. tasks: names, tags or YAML files of lm-eval's or of ``include_path``.
        limit: the first so many documents of each; None takes all.
        include_path: folder of task files. batch_size: documents (or answers) at once.
        dense: False leaves the dense model out.
        reference, arm, seed: as in :func:`gateskip.evaluation.quality.evaluate`.
        progress: shows lm-eval's bars.

    Returns:
        Rows by task; a group or tag stands for its tasks.

    Raises:
        BudgetError: a budget that the model cannot take. ConfigError: an unknown task or arm, or no
        reference where one is needed. DataError: a task that cannot be loaded. All before any work.
    """
    state = state_of(model)
    arm = check_arm(model, arm, reference if dense else model)
    for wanted in budgets:
        state.resolve(wanted)
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name}={value!r} must be an integer of at least 1.")
    arms: list[tuple[str, Budget | None]] = [("dense", None)] if dense else []
    arms += [(arm, None)] if arm == "control" else [(arm, budget) for budget in budgets]
    loaded = _load_tasks(tasks, include_path)
    rows = []
    for task_name, task in loaded.items():
        for kind, budget in arms:
            plain = reference if kind == "dense" and reference is not None else model
            if progress:
                print(f"{task_name}, {budget or kind}", file=sys.stderr)
            with contextlib.ExitStack() as stack:
                stack.enter_context(eval_mode(plain))
                if budget is None and plain is model:
                    stack.enter_context(without_gates(model))
                lm = _language_model(plain, tokenizer, budget, batch_size)
                found = _run(lm, task_name, task, limit, progress)
            rows.append(_row(model, kind, budget, seed, task_name, lm, found))
    return rows


def _row(
    model: Any, kind: str, budget: Budget | None, seed: int | None, task: str, lm: Any, found: Any
) -> HarnessRow:
    metrics, stderr = _figures(found["results"][task])
    skip_rate, macs_saved = (0.0, 0.0) if budget is None else (lm.skip_rate, lm.macs_saved)
    return HarnessRow(
        model=Path(str(getattr(model.config, "_name_or_path", "") or "")).name, arm=kind,
        task=task, version=found["versions"][task], seed=None if kind == "dense" else seed,
        budget=str(budget or ""), keep=getattr(budget, "keep", None),
        compute=getattr(budget, "compute", None),
        skip_rate=skip_rate, macs_saved=macs_saved, metrics=metrics, stderr=stderr,
        n=found["n-samples"][task]["effective"],
    )  # fmt: skip


class GateSkipLM(HFLM):  # type: ignore[misc]
    """lm-eval's Hugging Face model with every request under a budget, and on a ledger.

    Args:
        pretrained: a gated model. tokenizer: None takes the base model's.
        gates, base, dtype, device: what ``gateskip.load`` takes, and where to, instead of a model.
        budget, or keep or compute: as in ``gateskip.budget``; without, the model's own.
        options: HFLM's, such as ``batch_size`` and ``max_length``.

    Results of ``simple_evaluate`` say in ``config["gateskip"]`` what :meth:`summary` does.
    """

    def __init__(
        self,
        pretrained: nn.Module | None = None,
        tokenizer: Any = None,
        *,
        gates: str | None = None,
        base: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        budget: Budget | None = None,
        keep: float | None = None,
        compute: float | None = None,
        **options: Any,
    ) -> None:
        if (pretrained is None) == (gates is None):
            raise ConfigError("give exactly one of pretrained= (a gated model) and gates=.")
        if budget is None and (keep, compute) != (None, None):
            budget = Budget(keep=keep, compute=compute)
        model: Any = pretrained
        if gates is not None:
            model = load(gates, base=base, dtype=None if dtype == "auto" else dtype)
            model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._state = state_of(model)
        self.budget = budget or self._state.default_budget or Budget(keep=1.0)
        self._state.resolve(self.budget)
        super().__init__(pretrained=model, tokenizer=tokenizer, **options)
        self.reset()

    def reset(self) -> None:
        """Begin a new ledger."""
        self._totals = torch.zeros(4, dtype=torch.float64)
        self._scored: list[CallRecord] = []
        self._lengths: list[int] = []

    @property
    def skip_rate(self) -> float:
        """Share of token×branch pairs skipped so far; padding and what follows an answer apart."""
        _, _, pairs, kept = self._settle().tolist()
        return 1.0 - kept / pairs if pairs else 0.0

    @property
    def macs_saved(self) -> float:
        """Share of decoder MACs saved so far, net, counted likewise."""
        macs, spent, _, _ = self._settle().tolist()
        return 1.0 - spent / macs if macs else 0.0

    def summary(self) -> dict[str, Any]:
        """The budget asked for, what was realised, and versions; JSON-ready."""
        import lm_eval
        import transformers

        from gateskip import __version__

        versions = {
            "gateskip": __version__, "lm_eval": lm_eval.__version__, "torch": torch.__version__,
            "transformers": transformers.__version__,
        }  # fmt: skip
        return {
            "budget": self.budget.to_json(), "skip_rate": self.skip_rate,
            "macs_saved": self.macs_saved, "versions": versions,
        }  # fmt: skip

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's, and ours; lm-eval asks once the requests are done."""
        return {**super().get_model_info(), "gateskip": self.summary()}

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._settle()
        with self._recorded(lambda record: record) as self._scored:
            return super()._model_call(inps, *args, **kwargs)

    def _select_cont_toks(
        self, logits: Tensor, contlen: int | None = None, inplen: int | None = None
    ) -> Any:
        # HFLM pads on the right and passes no mask; here it says how long each row really is.
        self._lengths.append(inplen or 0)
        return super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)

    def _settle(self) -> Tensor:
        """Totals with the last scored batch, whose rows' lengths are known by now."""
        if self._lengths:  # there are none while HFLM tries batch sizes
            self._totals += sum(_costs(record, self._lengths).sum(1) for record in self._scored)
        self._scored, self._lengths = [], []
        return self._totals

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any
    ) -> Any:
        with self._recorded(_costs) as found:
            ids_BT = super()._model_generate(context, max_length, stop, **kwargs)
        costs_S4B = torch.stack(found)
        fed = [self._answer_length(row, stop) for row in ids_BT[:, context.shape[1] :].tolist()]
        if len(fed) == len(context) == costs_S4B.shape[2]:  # no beams, where rows change places
            # The prompt's call, then one per token fed; a row's last token is fed to nobody.
            counts_SB = torch.arange(len(found))[:, None] < torch.tensor(fed)
            costs_S4B = costs_S4B * counts_SB[:, None]
        self._totals += costs_S4B.sum((0, 2))
        return ids_BT

    def _answer_length(self, tokens: list[int], stop: list[str]) -> int:
        """Tokens up to the one that ends an answer; the batch goes on until all have ended."""
        config = getattr(self.model, "generation_config", None)
        ends = getattr(config, "eos_token_id", None)
        ids = set(ends if isinstance(ends, list) else [ends])

        def ended(count: int) -> bool:
            text = self.tok_decode(tokens[:count], skip_special_tokens=False)
            return not ids.isdisjoint(tokens[:count]) or any(word in text for word in stop)

        first = bisect.bisect_left(range(1, len(tokens) + 1), True, key=ended) + 1
        return min(first, len(tokens))

    @contextlib.contextmanager
    def _recorded(self, take: Callable[[CallRecord], Any]) -> Iterator[list[Any]]:
        """The budget, and what ``take`` makes of every call."""
        recorder = _Recorder(take)
        with override(self._state, budget=self.budget, recorder=recorder):
            yield recorder.found


class _Recorder:
    """An ``Override.recorder`` that keeps of every call only what is asked for."""

    def __init__(self, take: Callable[[CallRecord], Any]) -> None:
        self.take, self.found = take, list[Any]()

    def record(self, call: Call) -> None:
        self.found.append(self.take(CallRecord.of(call)))


def _costs(record: CallRecord, lengths: Sequence[int] | None = None) -> Tensor:
    """Dense and spent MACs, pairs and pairs kept of each row, float64 ``[4, B]``, without padding.

    Args:
        lengths: real tokens of each row, padded on the right; None where the call knew.
    """
    valid_BT = record.valid_BT
    if lengths is not None:
        places_T = torch.arange(valid_BT.shape[1], device=valid_BT.device)
        valid_BT = valid_BT & (places_T < valid_BT.new_tensor(lengths, dtype=torch.long)[:, None])
    keep = {key: mask_BT & valid_BT for key, mask_BT in record.keep.items()}
    computed = {key: keep.get(key, valid_BT).sum(1) for key in record.computed}
    alone = dataclasses.replace(
        record, valid_BT=valid_BT, keep=keep, computed=computed, padding={}
    )  # fmt: skip
    macs_B, spent_B = macs_of(alone)
    kept_B = torch.stack([mask_BT.sum(1) for mask_BT in keep.values()]).sum(0)
    return torch.stack([macs_B, spent_B, valid_BT.sum(1) * len(keep), kept_B]).cpu()


def _language_model(model: Any, tokenizer: Any, budget: Budget | None, batch_size: int) -> Any:
    logger = logging.getLogger(HFLM.__module__)
    logger.disabled = True  # it warns that the model is an object
    try:
        if budget is None:
            return HFLM(model, tokenizer=tokenizer, batch_size=batch_size)
        return GateSkipLM(model, tokenizer, budget=budget, batch_size=batch_size)
    finally:
        logger.disabled = False


def _run(lm: Any, name: str, task: Any, limit: int | None, progress: bool) -> Any:
    """lm-eval's results of one task; every arm draws the same examples and samples."""
    given: Any = {"tasks": {name: task}, "groups": {}}
    with _seeded(), _bars(progress):
        task.set_fewshot_seed(SEED)
        return evaluate(lm, given, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False)


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Fixed generators within the block; afterwards they go on where they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        set_seed(SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """lm-eval has no switch for all of its bars, and prints to standard output, which is ours."""
    begin = tqdm.__init__
    if not shown:
        tqdm.__init__ = lambda bar, *a, **options: begin(bar, *a, **(options | {"disable": True}))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        tqdm.__init__ = begin


def _figures(found: dict[str, Any]) -> tuple[dict[str, float], dict[str, float | None]]:
    """(metrics, standard errors) of lm-eval's ``"acc,none"`` and ``"acc_stderr,none"``."""
    metrics: dict[str, float] = {}
    stderr: dict[str, float | None] = {}
    for key, value in found.items():
        metric, comma, by = key.partition(",")
        if not comma:  # the task's name and the like
            continue
        known = isinstance(value, int | float)
        name = metric.removesuffix("_stderr") + ("" if by == "none" else f",{by}")
        if metric.endswith("_stderr"):
            stderr[name] = float(value) if known else None
        elif known:
            metrics[name] = float(value)
    return metrics, stderr


def _load_tasks(names: Sequence[str], include_path: str | Path | None) -> dict[str, Any]:
    """Tasks by name."""
    if not names:
        raise ConfigError("tasks=() names no task.")
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"include_path={str(include_path)!r} is not a folder of task files.")
    manager, files = None, [name for name in names if Path(name).is_file()]
    wanted = {*names} - {*files}
    if include_path is not None:  # first alone: lm-eval's own 14,000 take seconds to list
        manager = TaskManager(include_path=include_path, include_defaults=False)
    if manager is None or not wanted <= {*manager.all_subtasks, *manager.all_tags}:
        manager = TaskManager(include_path=include_path)
    for name in sorted(wanted - {*manager.all_tasks}):
        close = difflib.get_close_matches(name, manager.all_tasks, n=1)
        where = "lm-eval" if include_path is None else f"lm-eval and {str(include_path)!r}"
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"task {name!r} is unknown to {where}.{hint}")
    try:
        with _seeded():  # some tasks shuffle choices as they load
            loaded: dict[str, Any] = manager.load(list(dict.fromkeys(names)))["tasks"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"tasks {', '.join(names)} cannot be loaded: {error}") from error
    return loaded


if "gateskip" not in model_registry:
    model_registry.register("gateskip", target="gateskip.evaluation.harness:GateSkipLM")

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
