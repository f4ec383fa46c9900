"""Methods side by side: one model, one text to fit on, one to be tested on, the same budgets.

What needs no training is made here, each method on a fresh copy of the model; gates that were
trained are loaded from folders. The dense model runs once.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import Tensor, nn

from gateskip.calibration.thresholds import calibrate
from gateskip.config import Budget, GateConfig, one_of
from gateskip.data import encode, split_samples, take_tokens
from gateskip.errors import AttachError, BudgetError, ConfigError, UnsupportedError
from gateskip.evaluation.quality import Evaluation
from gateskip.evaluation.statistics import Estimate, estimate
from gateskip.execution.api import attach
from gateskip.execution.checkpoint import load
from gateskip.fitting.closed_form import fit
from gateskip.methods import METHODS, apply
from gateskip.methods.base import bare
from gateskip.methods.table import TableMethod
from gateskip.retrofit.checkpoint import read_checkpoint
from gateskip.retrofit.fingerprint import check_fingerprint
from gateskip.skipping.state import state_of

__all__ = [
    "OURS",
    "CompareGroup",
    "CompareRow",
    "beaten_by_random",
    "check_methods",
    "compare",
    "grouped",
]

Maker = Callable[[], nn.Module]

#: Gates fitted in closed form: attach, fit, calibrate.
OURS = "gateskip"
DENSE = "dense"
#: What the options and the model's layout decide, so that other methods can go on.
REFUSALS = (AttachError, ConfigError, UnsupportedError)


@dataclasses.dataclass(frozen=True, slots=True)
class CompareRow:
    """One method at one budget, or why it could not be measured.

    Attributes:
        method: its name, or that of the folder of gates; ``"dense"`` for the model itself. seed: of
            a method that has one. budget: as text; empty for the dense model, and for a method that
            does not take the model.
        skip_rate, macs_saved, loss, perplexity, agreement, tokens: as in ``QualityRow``, realised.
        loss_over_dense: loss less the dense model's.
        error: why all of these are None, or None.
    """

    method: str
    seed: int | None
    budget: str
    skip_rate: float | None = None
    macs_saved: float | None = None
    loss: float | None = None
    loss_over_dense: float | None = None
    perplexity: float | None = None
    agreement: float | None = None
    tokens: int | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class CompareGroup:
    """The seeds of a method at one budget.

    Attributes:
        macs_saved, loss_over_dense, agreement: means over the seeds. loss: with interval.
    """

    method: str
    budget: str
    macs_saved: float
    loss: Estimate
    loss_over_dense: float
    agreement: float


def compare(
    model: nn.Module,
    data: Any,
    fit_data: Any,
    tokenizer: Any = None,
    *,
    methods: Sequence[str] = (OURS, "random"),
    budgets: Sequence[Budget],
    gates: Mapping[str, str | Path] | None = None,
    seeds: Sequence[int] = (0,),
    config: GateConfig | None = None,
    fit_tokens: int | None = 30_000,
    max_tokens: int | None = None,
    max_length: int = 512,
    progress: bool = False,
) -> list[CompareRow]:
    """The dense model, then every method at every budget, on the same tokens.

    Args:
        model: a plain causal LM; it stays as it is. data: text to be tested on. fit_data: other
            text (see ``gateskip.data``), of at least 3,000 tokens: gates are fitted on two thirds,
            and on the last third, every third text, all methods find their orders and thresholds.
        methods: registered names, and ``"gateskip"``, gates fitted in closed form.
        budgets: of all methods. gates: folders of saved gates by the name to show.
        seeds: of methods that draw; the others run once.
        config: of the gates of ``"gateskip"`` and of methods that begin with its scores.
        fit_tokens: tokens of ``fit_data`` used. max_tokens, max_length: as in ``evaluate``.

    Returns:
        Rows in the order dense, methods, gates; a method that does not take the model, or a budget
        that it does not reach, has a row with the reason.

    Raises:
        ConfigError: an unknown method or one named twice, no budget, no seed; before any work.
        AttachError: the model is gated. DataError: bad data or too little of it.
        CheckpointError: gates that are damaged or of another model.
    """
    gates = gates or {}
    check_methods(methods, tuple(gates))
    for what, given in (("budgets", budgets), ("seeds", seeds)):
        if not given:
            raise ConfigError(f"{what}=() measures nothing; give at least one.")
    # Twice the same would count as two seeds.
    budgets, seeds = list(dict.fromkeys(budgets)), list(dict.fromkeys(seeds))
    for path in gates.values():
        base = read_checkpoint(Path(path))[0].get("base")
        if base is not None:  # else loading says what is wrong
            check_fingerprint(base, model, str(path))
    probe = copy.deepcopy(model)
    bare(probe)
    samples = take_tokens(encode(fit_data, tokenizer, max_length), fit_tokens)
    to_fit, to_calibrate = ([s.ids for s in part] for part in split_samples(samples, 3))
    run = Evaluation(probe, data, tokenizer, max_tokens=max_tokens, max_length=max_length)
    del probe
    makers = [*_makers(model, (to_fit, to_calibrate), methods, seeds, config or GateConfig())]
    for name, path in gates.items():
        makers.append((name, None, functools.partial(_loaded, path, model)))
    batches = len(run.batches)
    with Progress(disable=not progress, transient=True) as bar:
        # Making a method ready counts as much as one budget.
        total = batches * (1 + len(makers) * (1 + len(budgets)))
        task = bar.add_task("Evaluating the dense model", total=total)
        run.advance = lambda: bar.advance(task)
        dense = run.dense()
        rows = [_row(DENSE, None, "", dense, dense.loss)]
        for number, (name, seed, make) in enumerate(makers, 1):
            bar.update(task, description=name)
            rows += _rows(run, (name, seed, make), budgets, dense.loss)
            bar.update(task, completed=batches * (1 + number * (1 + len(budgets))))
    return rows


def check_methods(methods: Sequence[str], gates: Sequence[str] = ()) -> None:
    """Raise ConfigError for an unknown name, one that comes twice, or nothing to compare."""
    for name in methods:
        one_of("method", name, (OURS, *METHODS.names()))
    names = [*methods, *gates]
    for name in names:
        if names.count(name) > 1 or name == DENSE:
            raise ConfigError(
                f"{name!r} is the name of two rows; name it once, or rename a folder."
            )
    if not names:
        raise ConfigError("methods=() compares nothing; name some.")


def _makers(
    model: nn.Module,
    texts: tuple[Sequence[Tensor], Sequence[Tensor]],
    methods: Sequence[str],
    seeds: Sequence[int],
    config: GateConfig,
) -> Iterator[tuple[str, int | None, Maker]]:
    """(name, seed, what makes the model ready) of every method and seed."""
    to_fit, to_calibrate = texts
    fitted: list[nn.Module] = []

    def gated() -> nn.Module:
        """A copy of the model with fitted gates; fitted once."""
        if not fitted:
            fresh = attach(copy.deepcopy(model), config)
            fit(fresh, to_fit, max_tokens=None)
            fitted.append(fresh)
        return copy.deepcopy(fitted[0])

    def ours() -> nn.Module:
        found = gated()
        calibrate(found, to_calibrate)
        return found

    def theirs(name: str, options: dict[str, int]) -> nn.Module:
        if METHODS.get(name).trained:
            raise ConfigError(
                f"it needs training: gateskip train-method MODEL {name} --budget ..., then name "
                "that folder in gates (--gates)."
            )
        tables = issubclass(METHODS.get(name), TableMethod)
        return apply(name, gated() if tables else copy.deepcopy(model), to_calibrate, **options)

    for name in methods:
        if name == OURS:
            yield name, None, ours
            continue
        fields = {field.name for field in dataclasses.fields(METHODS.get(name))}
        for seed in seeds if "seed" in fields else (None,):
            options = {} if seed is None else {"seed": seed}
            yield name, seed, functools.partial(theirs, name, options)


def _loaded(path: str | Path, model: nn.Module) -> nn.Module:
    found: nn.Module = load(path, base=copy.deepcopy(model))
    return found


def _rows(
    run: Evaluation, what: tuple[str, int | None, Maker], budgets: Sequence[Budget], dense: float
) -> list[CompareRow]:
    """Of one method and seed; ``run`` keeps its text and what the dense model said of it."""
    name, seed, make = what
    try:
        run.model = make()
    except REFUSALS as error:
        return [CompareRow(name, seed, "", error=f"{name}: {error}")]
    for _ in run.batches:
        run.advance()
    rows = []
    for budget in budgets:
        try:
            state_of(run.model).resolve(budget)
        except BudgetError as error:
            rows.append(CompareRow(name, seed, str(budget), error=f"{name}: {error}"))
            continue
        rows.append(_row(name, seed, str(budget), run.at(budget), dense))
    return rows


def _row(name: str, seed: int | None, budget: str, found: Any, dense: float) -> CompareRow:
    return CompareRow(
        method=name, seed=seed, budget=budget, skip_rate=found.skip_rate,
        macs_saved=found.macs_saved, loss=found.loss, loss_over_dense=found.loss - dense,
        perplexity=found.perplexity, agreement=found.agreement, tokens=found.tokens,
    )  # fmt: skip


def grouped(rows: Sequence[CompareRow]) -> list[CompareGroup]:
    """Means over seeds, in the order of the rows; rows with an error are left out."""
    groups: dict[tuple[str, str], list[CompareRow]] = {}
    for row in rows:
        if row.error is None:
            groups.setdefault((row.method, row.budget), []).append(row)

    def mean(found: Sequence[CompareRow], field: str) -> float:
        return over_seeds(found, field).mean

    def over_seeds(found: Sequence[CompareRow], field: str) -> Estimate:
        return estimate([getattr(row, field) for row in found])

    return [
        CompareGroup(
            method=method, budget=budget, macs_saved=mean(found, "macs_saved"),
            loss=over_seeds(found, "loss"), loss_over_dense=mean(found, "loss_over_dense"),
            agreement=mean(found, "agreement"),
        )
        for (method, budget), found in groups.items()
    ]  # fmt: skip


def beaten_by_random(groups: Sequence[CompareGroup]) -> list[CompareGroup]:
    """What random skipping matches: it saves as much at no more loss, at whatever budget."""
    random = [group for group in groups if group.method == "random"]
    return [
        group
        for group in groups
        if group.method not in ("random", DENSE)
        and any(r.macs_saved >= group.macs_saved and r.loss.mean <= group.loss.mean for r in random)
    ]
