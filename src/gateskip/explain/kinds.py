"""Do skips go by the kind of token? Rates by kind and layer, with a permutation test.

Texts differ, tokens at different places are skipped at different rates and with different spread,
neighbours resemble each other, and a chat template puts the same tokens at the same places: each
makes a plain table say more than there is. So kinds are compared within a text and at the same
place, and the null gives every text the kinds of another one, place by place.

Shapes: T tokens of a text, N of all texts, K kinds.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from torch import nn

from gateskip.data import encode, take_tokens
from gateskip.errors import ConfigError, DataError
from gateskip.evaluation.statistics import holm
from gateskip.explain.usage import branch_usage

__all__ = ["FUNCTION_WORDS", "KINDS", "KindReport", "KindRow", "skips_by_kind", "token_kinds"]

KINDS = (
    "beginning", "special", "space", "punctuation", "number", "function word", "word",
    "inside a word",
)  # fmt: skip
#: Words of English that carry grammar.
FUNCTION_WORDS = frozenset(
    "a an the this that these those and or but nor so yet if because while although though since "
    "unless until as than of in on at by for with without from to into onto over under between "
    "among through during before after above below up down out off about against i you he she it "
    "we they me him her us them my your his its our their mine yours hers ours theirs who whom "
    "whose which what where when why how am is are was were be been being do does did have has had "
    "having will would shall should can could may might must not no there here each every any some "
    "all both either neither".split()
)
LEAST_TOKENS = 1_000
LEAST_AT_A_PLACE = 20
ALIKE = 10  # texts of about one length, which change kinds


@dataclasses.dataclass(frozen=True, slots=True)
class KindRow:
    """One kind of token.

    Attributes:
        tokens: how many. skip_rate: share of token×branch pairs skipped, in [0, 1].
        difference: to all other tokens, within a text and at the same place; above 0 where it is
            skipped more.
        p: of the permutation test, two-sided; None where all tokens are of the kind, or too few.
        p_holm: corrected for the number of kinds.
        by_layer: skip rate of each gated layer.
    """

    kind: str
    tokens: int
    skip_rate: float
    difference: float | None
    p: float | None
    p_holm: float | None
    by_layer: dict[int, float]


@dataclasses.dataclass(frozen=True, slots=True)
class KindReport:
    """Skips of some texts by kind of token.

    Attributes:
        explained: share of the variance of tokens' skip rates, within a text and at the same place,
            that kinds explain, in [0, 1].
    """

    texts: int
    tokens: int
    skip_rate: float
    explained: float
    rows: tuple[KindRow, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return dataclasses.asdict(self)


def token_kinds(
    ids: Sequence[int], tokenizer: Any, words: Collection[str] = FUNCTION_WORDS
) -> list[str]:
    """The kind of every token of a text, of :data:`KINDS`.

    Args:
        words: lower-case function words; English ones by default.
    """
    special = set(tokenizer.all_special_ids)
    pieces = _pieces(ids, tokenizer)
    found: list[str] = []
    for index, (token, piece) in enumerate(zip(ids, pieces, strict=True)):
        begins = index == 0 or not piece[:1].isalnum() or not pieces[index - 1][-1:].isalnum()
        after = pieces[index + 1] if index + 1 < len(pieces) else " "
        ends = not after[:1].isalnum()
        bare = piece.strip()
        if index == 0:
            kind = "beginning"
        elif int(token) in special:
            kind = "special"
        elif not bare:
            kind = "space"
        elif not any(letter.isalnum() for letter in bare):
            kind = "punctuation"
        elif any(letter.isdigit() for letter in bare):
            kind = "number"
        elif not begins:
            kind = "inside a word"
        elif ends and bare.lower() in words:
            kind = "function word"
        else:
            kind = "word"
        found.append(kind)
    return found


def _pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text that every token adds, with the space before it: some decoders drop that of what
    they are given first."""
    found = []
    for index, token in enumerate(ids):
        before = tokenizer.decode([int(ids[index - 1])]) if index else ""
        both = tokenizer.decode([int(t) for t in ids[max(index - 1, 0) : index + 1]])
        alone = not both.startswith(before)  # a part of a character
        found.append(tokenizer.decode([int(token)]) if alone else both[len(before) :])
    return found


def skips_by_kind(
    model: nn.Module,
    data: Any,
    tokenizer: Any,
    *,
    max_tokens: int = 20_000,
    max_length: int = 512,
    words: Collection[str] = FUNCTION_WORDS,
    draws: int = 2_000,
    of_another_text: bool = False,
    seed: int = 0,
) -> KindReport:
    """Skip rates by kind of token at the budget in force.

    p is the share of draws (each text gets the kinds of another one of about its length) whose
    difference is at least as far from 0, the one found counted among them, so never below
    1 / (draws + 1). A text's first token, which is never skipped, is in no test.

    Args:
        data: texts, rows or id tensors (see ``gateskip.data``). draws: of the permutation test.
        of_another_text: a negative control: tokens have the kinds of another text, so that
            whatever is found is chance.

    Raises:
        ConfigError: no tokenizer. DataError: fewer than 1,000 tokens, fewer than ten texts, or
        none of the tokens skips.
    """
    if tokenizer is None:
        raise ConfigError("tokenizer=None, but kinds of tokens are read from their text; give it.")
    samples = take_tokens(encode(data, tokenizer, max_length), max_tokens)
    samples = [sample for sample in samples if sample.ids.shape[0] > 2]
    count = sum(sample.ids.shape[0] for sample in samples)
    if count < LEAST_TOKENS or len(samples) < ALIKE:
        raise DataError(
            f"data has {count} tokens in {len(samples)} texts; give at least {LEAST_TOKENS} in "
            f"{ALIKE}."
        )
    rates, layers, kinds, places = [], [], [], []
    numbers: tuple[int, ...] = ()
    for sample in samples:
        usage = branch_usage(model, sample.ids[None])
        numbers = usage.layers
        skipped_TB = 1.0 - usage.kept_TN.double().numpy()
        rates.append(skipped_TB.mean(1))
        by_layer = [
            skipped_TB[:, [i for i, (found, _) in enumerate(usage.branches) if found == layer]]
            for layer in numbers
        ]
        layers.append(np.stack([part.mean(1) for part in by_layer], 1))
        names = token_kinds(sample.ids.tolist(), tokenizer, words)
        kinds.append(np.array([KINDS.index(name) for name in names]))
        places.append(np.arange(len(names)))
    if of_another_text:
        kinds = _exchanged(kinds, np.random.default_rng([seed, 1]), strangers=True)
        known = [found >= 0 for found in kinds]  # what the other text is too short for is left out
        rates, layers, kinds, places = (
            [values[mask] for values, mask in zip(part, known, strict=True)]
            for part in (rates, layers, kinds, places)
        )
    rate_N, kind_N = np.concatenate(rates), np.concatenate(kinds)
    layer_NL = np.concatenate(layers)
    if not rate_N.any():
        raise DataError("no token skips anything; choose a budget: gateskip.budget(model, keep=…).")
    left = _at_the_same_place(rates, places)
    tested = [found[1:] for found in kinds]
    found_K, null_DK = _differences(left, tested, draws, seed)
    p_K = [
        None if np.isnan(value) else float((1 + (abs(null) >= abs(value)).sum()) / (1 + draws))
        for value, null in zip(found_K, null_DK.T, strict=True)
    ]
    corrected = iter(holm([p for p in p_K if p is not None]))
    rows = []
    for index, name in enumerate(KINDS):
        own_N = kind_N == index
        p = p_K[index]
        p_holm = None if p is None else next(corrected)
        if own_N.any():
            rows.append(
                KindRow(
                    name, int(own_N.sum()), float(rate_N[own_N].mean()),
                    None if p is None else float(found_K[index]), p, p_holm,
                    dict(zip(numbers, layer_NL[own_N].mean(0).tolist(), strict=True)),
                )
            )  # fmt: skip
    return KindReport(
        len(samples), int(rate_N.shape[0]), float(rate_N.mean()),
        _explained(np.concatenate(left), np.concatenate(tested)), tuple(rows),
    )  # fmt: skip


def _at_the_same_place(rates: Sequence[Any], places: Sequence[Any]) -> list[Any]:
    """Rates less the mean of their place and then of their text, of all tokens but the first.

    A place is one number of tokens as long as enough texts have it, else some neighbouring ones.
    What stands at one place in every text (a chat template) has no other kind beside it there, and
    so says nothing.
    """
    bin_P, bins_so_far, within = [], 0, 0
    for count in np.bincount(np.concatenate(places)):
        bin_P.append(bins_so_far)
        within += count
        if within >= LEAST_AT_A_PLACE:
            bins_so_far, within = bins_so_far + 1, 0
    bins = [np.array(bin_P)[found] for found in places]
    rate_N = np.concatenate([rate[1:] for rate in rates])
    bin_N = np.concatenate([found[1:] for found in bins])
    means = np.bincount(bin_N, rate_N) / np.maximum(np.bincount(bin_N), 1)
    left = [rate[1:] - means[found[1:]] for rate, found in zip(rates, bins, strict=True)]
    return [rate - rate.mean() for rate in left]


def _exchanged(kinds: Sequence[Any], random: Any, *, strangers: bool = False) -> list[Any]:
    """Kinds of another text for every text, place by place; −1 beyond its end.

    Texts change places with others of about their length.

    Args:
        strangers: no text keeps its own.
    """
    order = sorted(range(len(kinds)), key=lambda i: len(kinds[i]))
    bounds = [*range(0, len(order) - ALIKE + 1, ALIKE), len(order)]  # the last group is longer
    found: list[Any] = [None] * len(kinds)
    for begin, end in itertools.pairwise(bounds):
        group = order[begin:end]
        mixed = random.permutation(group)
        givers = (
            dict(zip(mixed, np.roll(mixed, 1), strict=True))
            if strangers
            else dict(zip(group, mixed, strict=True))
        )
        for taker, giver in givers.items():
            own = np.full(len(kinds[taker]), -1)
            shared = min(len(own), len(kinds[giver]))
            own[:shared] = kinds[giver][:shared]
            found[taker] = own
    return found


def _differences(
    left: Sequence[Any], kinds: Sequence[Any], draws: int, seed: int
) -> tuple[Any, Any]:
    """(mean of each kind less that of the rest ``[K]``, the same of draws ``[D, K]``); NaN where
    one of the two has fewer than two tokens, 0 in draws."""
    random, size = np.random.default_rng([seed, 0]), len(KINDS)
    rate_N = np.concatenate(left)

    def of(kind_N: Any) -> Any:
        known = kind_N >= 0
        rates, found = rate_N[known], kind_N[known]
        sum_K = np.bincount(found, rates, minlength=size)
        count_K = np.bincount(found, minlength=size)
        rest_K = len(rates) - count_K
        with np.errstate(divide="ignore", invalid="ignore"):
            gap_K = sum_K / count_K - (rates.sum() - sum_K) / rest_K
        return np.where((count_K > 1) & (rest_K > 1), gap_K, np.nan)

    null = [of(np.concatenate(_exchanged(kinds, random))) for _ in range(draws)]
    return of(np.concatenate(kinds)), np.nan_to_num(np.stack(null))


def _explained(rate_N: Any, kind_N: Any) -> float:
    """η²: the variance between kinds over the whole variance."""
    count_K = np.maximum(np.bincount(kind_N, minlength=len(KINDS)), 1)
    mean_K = np.bincount(kind_N, rate_N, minlength=len(KINDS)) / count_K
    whole = float(((rate_N - rate_N.mean()) ** 2).sum())
    between = float(((mean_K[kind_N] - rate_N.mean()) ** 2).sum())
    return between / whole if whole else 0.0
