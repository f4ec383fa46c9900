"""The lab's language: word problems of several steps of arithmetic, with worked steps.

    python experiments/lab/language.py 5

A problem names several people, gives each some things, moves things about, and asks for one of
them. The answer works through the events: it repeats each one, says what that person has after it,
and ends with the number. Who writes it has to copy, to tell whether a line is about that person,
and to keep a running total. Words are tokens, and so are the numbers up to 49.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any

NAMES = ("Ann", "Bob", "Cem", "Dee", "Eva", "Finn")
THINGS = ("apples", "books", "coins", "dolls", "eggs", "forks")
WORDS = (
    "finds", "loses", "gives", "doubles", "the", "number", "How", "many", "does", "have", "now",
    "then", "later", "today", ".", "?", ":", "=", ";", "so",
)  # fmt: skip
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
LARGEST = 49  # of all numbers
CHANGE = 5  # of a number in one event, doubling apart
LABELS = tuple(f"#{n}" for n in range(1, 7))  # of events
VOCABULARY = (*SPECIAL, *map(str, range(LARGEST + 1)), *NAMES, *THINGS, *WORDS, *LABELS)
EVENTS = (3, len(LABELS))  # the fewest and the most of a problem
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<bos> {{ m.content }}"
    "{% else %}{{ m.content }} <eos>{% endif %}{% endfor %}"
)
OPENINGS = (("then",), ("later",), ("today",), ())


def problem(rng: random.Random, steps: tuple[int, int] = EVENTS) -> dict[str, str]:
    """One problem: ``prompt`` and ``completion``.

    Args:
        steps: the fewest and the most events.
    """
    people = rng.sample(NAMES, rng.randint(2, 3))
    thing = rng.choice(THINGS)
    counts = {name: rng.randint(2, 12) for name in people}
    asked = rng.choice(people)
    lines = [f"{name} {count} {thing} ." for name, count in counts.items()]
    work = [f"{asked} {counts[asked]}"]
    for label in LABELS[: rng.randint(*steps)]:
        line = _event(rng, people, counts)
        lines.append(" ".join((*rng.choice(OPENINGS), label, line, ".")))
        work.append(f"{label} {line} = {counts[asked]}")
    prompt = " ".join((*lines, f"How many {thing} does {asked} have now ? so :"))
    return {"prompt": prompt, "completion": " " + " ; ".join((*work, f"so {counts[asked]} ."))}


def _event(rng: random.Random, people: list[str], counts: dict[str, int]) -> str:
    """What happens; ``counts`` follow."""
    who = rng.choice(people)
    kinds = ["finds"] if counts[who] < LARGEST else []
    with_room = [name for name in people if name != who and counts[name] < LARGEST]
    if counts[who] > 2:
        kinds += ["loses", "gives"] if with_room else ["loses"]
    if counts[who] * 2 <= LARGEST // 2:
        kinds.append("doubles")
    kind = rng.choice(kinds)
    if kind == "finds":
        n = rng.randint(1, min(CHANGE, LARGEST - counts[who]))
        counts[who] += n
        line = f"{who} finds {n}"
    elif kind == "loses":
        n = rng.randint(1, min(CHANGE, counts[who] - 1))
        counts[who] -= n
        line = f"{who} loses {n}"
    elif kind == "doubles":
        counts[who] *= 2
        line = f"{who} doubles the number"
    else:
        other = rng.choice(with_room)
        n = rng.randint(1, min(CHANGE, counts[who] - 1, LARGEST - counts[other]))
        counts[who] -= n
        counts[other] += n
        line = f"{who} gives {other} {n}"
    return line


def problems(seed: int, count: int, steps: tuple[int, int] = EVENTS) -> Iterator[dict[str, str]]:
    """``count`` problems, always the same for a seed; ``steps`` as of :func:`problem`."""
    rng = random.Random(seed)
    for _ in range(count):
        yield problem(rng, steps)


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
