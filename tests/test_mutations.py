"""Checks that cannot fail prove nothing: each is shown to fail when its subject is broken.

A check is a function that passes on the library as it is and fails under one mutation.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import gateskip
from gateskip import kernels
from gateskip.execution import attention_branch, mlp_branch
from gateskip.retrofit.attach import layers_of
from gateskip.skipping import state as state_module
from gateskip.skipping.call import Call
from gateskip.skipping.state import GateSkipState, override, replay, state_of
from models import LAYERS, gated, medians, padded, random_ids, through_cache, with_table

Patch = pytest.MonkeyPatch


class Case:
    """One gated model with thresholds at the median, shared by the checks."""

    def __init__(self) -> None:
        self.model = with_table(gated("qwen2", compensation="low_rank"))
        self.state = state_of(self.model)
        self.thresholds = medians(self.model)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


@torch.no_grad()
def compacted_is_masked(case: Case) -> bool:
    """I2, in prefill, in batched decoding and in decoding at batch 1."""
    model, state = case.model, case.state
    same = True
    for batch, backend in itertools.product((1, 3), ("torch", kernels.backend())):
        ids, mask, positions = padded(batch, 12, "left")
        with (
            override(state, thresholds=case.thresholds),
            kernels.using(backend),
            gateskip.trace(model) as own,
        ):
            fast = through_cache(model, ids, mask, positions, 1)
        decisions = [call.keep for call in own.calls]
        with replay(state, decisions), gateskip.execution(model, "masked"):
            slow = through_cache(model, ids, mask, positions, 1)
        valid = mask.bool()
        same = same and torch.allclose(fast[valid], slow[valid], atol=1e-5, rtol=1e-5)
    return same


@torch.no_grad()
def padding_is_not_counted(case: Case) -> bool:
    """No padding is kept, and the ledger's pairs kept are pairs of valid tokens."""
    ids, mask, positions = padded(3, 14, "left")
    with override(case.state, thresholds=case.thresholds), gateskip.trace(case.model) as trace:
        case.model(ids, attention_mask=mask, position_ids=positions)
    kept = [masks[0] for masks in trace.keep.values()]
    return not any(bool((keep & ~mask.bool()).any()) for keep in kept)


@torch.no_grad()
def keeps_exactly_what_was_asked(case: Case) -> bool:
    """A threshold at the k-th largest score keeps the k tokens with the largest scores."""
    model, ids, asked = case.model, random_ids(1, 24, seed=8), 12
    layer = model.model.layers[0]
    gate = layer.self_attn.skip_gate
    u = layer.input_layernorm(model.model.embed_tokens(ids))
    scores = (gate.logits(u).mean(-1) - gate.score_shift) / gate.score_scale
    order = scores[0].argsort(descending=True)
    key = (0, "attention")
    # Halfway between two ranks, where rounding cannot decide.
    middle = float(scores[0, order[asked - 1]] + scores[0, order[asked]]) / 2
    expected = torch.zeros(24, dtype=torch.bool)
    expected[order[:asked]] = True
    expected[0] = True  # protected
    rows = dict.fromkeys(case.state.branches, -1e9) | {key: middle}
    table = case.state.policy
    assert table is not None
    with pytest.MonkeyPatch.context() as patch:
        row = tuple(rows[b] for b in case.state.branches)
        patch.setattr(case.state, "policy", table_of(table, row))
        with gateskip.budget(model, keep=0.5), gateskip.trace(model) as trace:
            model(ids)
    return torch.equal(trace.keep[key][0][0], expected)


def table_of(table: Any, row: tuple[float, ...]) -> Any:
    """A table that has the same thresholds at every grid point."""
    return dataclasses.replace(table, thresholds=(row,) * len(table.keep))


def budgets_stay_in_their_thread(case: Case) -> bool:
    """Two threads enter different budgets, wait for each other, and then run."""
    ids, budgets = random_ids(1, 20), (0.9, 0.35)

    def run(budget: float, barrier: threading.Barrier, results: dict[float, float]) -> None:
        with gateskip.budget(case.model, keep=budget), gateskip.trace(case.model) as trace:
            barrier.wait(60)
            with torch.no_grad():
                case.model(ids)
            barrier.wait(60)
        results[budget] = trace.ledger.skip_rate

    alone: dict[float, float] = {}
    for budget in budgets:
        run(budget, threading.Barrier(1), alone)
    together: dict[float, float] = {}
    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=run, args=(b, barrier, together)) for b in budgets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert alone[0.9] != alone[0.35]
    return alone == together


@torch.no_grad()
def ledger_is_what_ran(case: Case) -> bool:
    """I6: rows of the ledger are the rows that entered q_proj, o_proj and down_proj."""
    model, rows, handles = case.model, {}, []
    for index, layer in enumerate(layers_of(model, case.state.family)):
        for kind, name in (
            ("attention", "self_attn.q_proj"), ("attention", "self_attn.o_proj"),
            ("mlp", "mlp.down_proj"),
        ):  # fmt: skip

            def count(_: Any, inputs: Any, label: Any = (index, kind, name)) -> None:
                rows[label] = rows.get(label, 0) + inputs[0].shape[:-1].numel()

            handles.append(layer.get_submodule(name).register_forward_pre_hook(count))
    ids, mask, positions = padded(3, 12, "left")
    try:
        with override(case.state, thresholds=case.thresholds), gateskip.trace(model) as trace:
            through_cache(model, ids, mask, positions, 1)
    finally:
        for handle in handles:
            handle.remove()
    assert {label[0] for label in rows} == set(range(LAYERS))
    return all(
        count == sum(int(call.computed[(index, kind)].sum()) for call in trace.calls)
        for (index, kind, _), count in rows.items()
    )


def drop_skipped_kv(patch: Patch) -> None:
    """Skipped tokens leave zeros in the cache instead of their keys and values."""
    real = attention_branch.project_kv

    def dropped(*args: Any) -> Any:
        k, v = real(*args)
        return torch.zeros_like(k), torch.zeros_like(v)

    patch.setattr(attention_branch, "project_kv", dropped)


def count_padding(patch: Patch) -> None:
    """``Call.decide`` forgets which tokens are real."""
    real = Call.decide

    def forgetful(self: Call, key: Any, score_BT: torch.Tensor) -> torch.Tensor:
        valid, self.valid_BT = self.valid_BT, None
        try:
            return real(self, key, score_BT)
        finally:
            self.valid_BT = valid

    patch.setattr(Call, "decide", forgetful)


def move_thresholds(step: int) -> Callable[[Patch], None]:
    """Every decision takes the threshold one rank further up or down."""

    def mutate(patch: Patch) -> None:
        real = Call.decide

        def moved(self: Call, key: Any, score_BT: torch.Tensor) -> torch.Tensor:
            assert self.thresholds is not None
            ranked = score_BT.flatten().sort(descending=True).values
            kept = int((ranked >= self.thresholds[key]).sum())
            index = min(max(kept + step - 1, 0), ranked.numel() - 1)
            thresholds, self.thresholds = self.thresholds, {key: float(ranked[index])}
            try:
                return real(self, key, score_BT)
            finally:
                self.thresholds = thresholds

        patch.setattr(Call, "decide", moved)

    return mutate


class Global:
    """A plain global behind the interface of a context variable."""

    def __init__(self) -> None:
        self.value: Any = None

    def get(self, default: Any) -> Any:
        return default if self.value is None else self.value

    def set(self, value: Any) -> Any:
        old, self.value = self.value, value
        return old

    def reset(self, old: Any) -> None:
        self.value = old


def share_overrides(patch: Patch) -> None:
    """Overrides live in a global, so one thread's budget is every thread's."""
    patch.setattr(state_module, "_OVERRIDES", Global())


def leave_compensation_out(patch: Patch) -> None:
    """Compacted execution adds nothing for skipped tokens."""
    for module in (attention_branch, mlp_branch):
        patch.setattr(module, "compensate", lambda _branch, out, *_: out)


def multiply_instead(patch: Patch) -> None:
    """Everything is computed and multiplied with 0 or 1, yet booked as skipped."""
    real = Call.decide

    def pretending(self: Call, key: Any, score_BT: torch.Tensor) -> torch.Tensor:
        keep_BT = real(self, key, score_BT)
        self.masked = True
        self.computed[key] = keep_BT.sum(1)
        return keep_BT

    patch.setattr(Call, "decide", pretending)


def ignore_the_rows(patch: Patch) -> None:
    """The ledger forgets which rows entered the attention."""
    patch.setattr(attention_branch, "_count", lambda *_: None)


def forget_protection(patch: Patch) -> None:
    """The first token of a sequence may be skipped."""
    real = Call.__init__

    def forgetful(self: Call, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        self.protected_BT = None

    patch.setattr(Call, "__init__", forgetful)


@torch.no_grad()
def first_tokens_are_kept(case: Case) -> bool:
    """No branch skips the first valid token, whatever the thresholds."""
    ids, mask, positions = padded(3, 10, "left")
    nothing = dict.fromkeys(case.state.branches, 1e9)
    with override(case.state, thresholds=nothing), gateskip.trace(case.model) as trace:
        case.model(ids, attention_mask=mask, position_ids=positions)
    first = torch.arange(10) == mask.argmax(1, keepdim=True)
    return all(torch.equal(masks[0], first) for masks in trace.keep.values())


def reverse_grid(patch: Patch) -> None:
    """A larger budget gets the thresholds of a smaller one."""
    real = GateSkipState.resolve

    def reversed_budget(self: GateSkipState, budget: Any) -> Any:
        if budget is None or budget.full or budget.keep is None:
            return real(self, budget)
        return real(self, gateskip.Budget(keep=1.25 - budget.keep))

    patch.setattr(GateSkipState, "resolve", reversed_budget)


def larger_budgets_keep_more(case: Case) -> bool:
    """I7 on the table's thresholds."""
    rows = [case.state.resolve(gateskip.Budget(keep=keep)) for keep in (0.9, 0.6, 0.3)]
    pairs = itertools.pairwise(rows)
    return all(a[k] <= b[k] for a, b in pairs if a and b for k in case.state.branches)


MUTATIONS: list[tuple[Callable[[Case], bool], Callable[[Patch], None]]] = [
    (compacted_is_masked, drop_skipped_kv),
    (padding_is_not_counted, count_padding),
    (keeps_exactly_what_was_asked, move_thresholds(+1)),
    (keeps_exactly_what_was_asked, move_thresholds(-1)),
    (budgets_stay_in_their_thread, share_overrides),
    (compacted_is_masked, leave_compensation_out),
    (ledger_is_what_ran, multiply_instead),
    (ledger_is_what_ran, ignore_the_rows),
    (first_tokens_are_kept, forget_protection),
    (larger_budgets_keep_more, reverse_grid),
]


@pytest.mark.parametrize("check", {check: None for check, _ in MUTATIONS}, ids=lambda f: f.__name__)
def test_checks_pass(case: Case, check: Callable[[Case], bool]) -> None:
    assert check(case)


@pytest.mark.parametrize(("check", "mutate"), MUTATIONS)
def test_checks_fail_when_mutated(
    case: Case,
    check: Callable[[Case], bool],
    mutate: Callable[[Patch], None],
    monkeypatch: Patch,
) -> None:
    mutate(monkeypatch)
    assert not check(case)
