"""The lab's language: word problems of several steps of arithmetic, with worked steps.

    python experiments/lab/language.py 5

A problem names several people, gives each some things, moves things about, and asks for one of
them. The answer works through the lines: it repeats each one, says what that person has after it,
and ends with the number. Who writes it has to look lines up, to tell whether a line is about that
person, and to keep a running total. Words are tokens, and so are the numbers up to 49.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any

NAMES = ("Ann", "Bob", "Cem", "Dee", "Eva", "Finn")
THINGS = ("apples", "books", "coins", "dolls", "eggs", "forks")
WORDS = (
    "has", "finds", "loses", "gives", "doubles", "the", "number", "How", "many", "does", "have",
    "now", "then", "later", "today", ".", "?", ":", ",", ";", "so",
)  # fmt: skip
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
LARGEST = 49  # of all numbers
CHANGE = 5  # of a number in one event, doubling apart
PEOPLE = (2, 3)  # the fewest and the most of a problem
EVENTS = (3, 6)  # likewise
LABELS = tuple(f"#{n}" for n in range(1, PEOPLE[1] + EVENTS[1] + 1))  # of lines
VOCABULARY = (*SPECIAL, *map(str, range(LARGEST + 1)), *NAMES, *THINGS, *WORDS, *LABELS)
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
    people = rng.sample(NAMES, rng.randint(*PEOPLE))
    thing = rng.choice(THINGS)
    asked = rng.choice(people)
    counts: dict[str, int] = {}
    lines, work = [], []
    for number in range(len(people) + rng.randint(*steps)):
        if number < len(people):
            opening: tuple[str, ...] = ()
            counts[people[number]] = rng.randint(2, 12)
            line = f"{people[number]} has {counts[people[number]]} {thing}"
        else:
            opening = rng.choice(OPENINGS)
            line = _event(rng, people, counts)
        lines.append(" ".join((*opening, LABELS[number], line, ".")))
        work.append(f"{LABELS[number]} {line} , {asked} {counts.get(asked, 0)}")
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
