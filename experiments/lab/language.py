"""The lab's language: word problems of several steps of arithmetic, with worked steps.

    python experiments/lab/language.py 5

A problem names several people, gives each some things, moves things about, and asks for one of
them. The answer works through the steps that matter, one sum after the other, and ends with the
number. Who reads it has to find the lines about that person and to keep a running total; the rest
does not matter. Words are tokens, and so are the numbers up to 99.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any

NAMES = ("Ann", "Bob", "Cem", "Dee", "Eva", "Finn")
THINGS = ("apples", "books", "coins", "dolls", "eggs", "forks")
WORDS = (
    "has", "had", "finds", "loses", "gives", "gets", "from", "to", "doubles", "the", "number", "of",
    "How", "many", "does", "have", "now", "then", "later", "and", "today", ".", "?", ":", "+", "-",
    "*", "=", ";", "so",
)  # fmt: skip
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
LARGEST = 99
VOCABULARY = (*SPECIAL, *map(str, range(LARGEST + 1)), *NAMES, *THINGS, *WORDS)
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<bos> {{ m.content }}"
    "{% else %}{{ m.content }} <eos>{% endif %}{% endfor %}"
)
OPENINGS = (("then",), ("later",), ("today",), ())


def problem(rng: random.Random, steps: tuple[int, int] = (3, 6)) -> dict[str, str]:
    """One problem: ``prompt`` and ``completion``.

    Args:
        steps: the fewest and the most events.
    """
    people = rng.sample(NAMES, rng.randint(2, 3))
    thing = rng.choice(THINGS)
    counts = {name: rng.randint(2, 20) for name in people}
    asked = rng.choice(people)
    lines = [f"{name} has {count} {thing} ." for name, count in counts.items()]
    work = [f"{asked} {counts[asked]}"]
    for _ in range(rng.randint(*steps)):
        line, sums = _event(rng, people, counts, asked)
        opening = rng.choice(OPENINGS)
        lines.append(" ".join((*opening, line, ".")))
        work += sums
    prompt = " ".join((*lines, f"How many {thing} does {asked} have now ? so :"))
    return {"prompt": prompt, "completion": " " + " ; ".join((*work, f"so {counts[asked]} ."))}


def _event(
    rng: random.Random, people: list[str], counts: dict[str, int], asked: str
) -> tuple[str, list[str]]:
    """What happens, and the sums about who is asked for; ``counts`` follow."""
    who = rng.choice(people)
    kinds = ["finds"]
    if counts[who] > 2:
        kinds += ["loses", "gives"]
    if counts[who] * 2 <= LARGEST // 2:
        kinds.append("doubles")
    kind = rng.choice(kinds)
    before = dict(counts)
    if kind == "finds":
        n = rng.randint(1, min(9, LARGEST - counts[who]))
        counts[who] += n
        line = f"{who} finds {n}"
    elif kind == "loses":
        n = rng.randint(1, min(9, counts[who] - 1))
        counts[who] -= n
        line = f"{who} loses {n}"
    elif kind == "doubles":
        counts[who] *= 2
        return f"{who} doubles the number", (
            [f"{before[who]} * 2 = {counts[who]}"] if who == asked else []
        )
    else:
        other = rng.choice([name for name in people if name != who])
        n = rng.randint(1, min(9, counts[who] - 1, LARGEST - counts[other]))
        counts[who] -= n
        counts[other] += n
        line = f"{who} gives {n} to {other}"
    change = counts[asked] - before[asked]
    if not change:
        return line, []
    sign = "+" if change > 0 else "-"
    return line, [f"{before[asked]} {sign} {abs(change)} = {counts[asked]}"]


def problems(seed: int, count: int) -> Iterator[dict[str, str]]:
    """``count`` problems, always the same for a seed."""
    rng = random.Random(seed)
    for _ in range(count):
        yield problem(rng)


def tokenizer() -> Any:
    """A fast tokenizer of the language: words at white space."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(VOCABULARY)}
    fast = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        unk_token="<unk>", padding_side="left",
    )  # fmt: skip
    found.chat_template = TEMPLATE
    return found


def answer_of(text: str) -> str | None:
    """The number after the last ``so``, or None."""
    words = text.replace("<eos>", " ").split()
    for at in range(len(words) - 2, -1, -1):
        if words[at] == "so" and words[at + 1].isdigit():
            return words[at + 1]
    return None


if __name__ == "__main__":
    for row in problems(0, int(sys.argv[1])):
        print(row["prompt"] + row["completion"])
