"""Word problems with worked answers, made up by seeded templates of this repository.

    python examples/demo/word_problems.py --count 400 --seed 0 --out problems.jsonl

Rows have ``prompt`` and ``completion``; the completion reasons step by step and ends ``#### N``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

NAMES = (
    "Amara", "Bjorn", "Chen", "Dalia", "Edwin", "Farah", "Goran", "Hana", "Ishaan", "Jola", "Kofi",
    "Lena", "Mateo", "Noor", "Oskar", "Priya", "Quentin", "Rosa", "Sami", "Tove", "Uma", "Viktor",
    "Wanjiru", "Ximena", "Yusuf", "Zora",
)  # fmt: skip
THINGS = (
    "marbles", "stickers", "postcards", "buttons", "seashells", "pencils", "beads", "coins",
    "badges", "tickets", "ribbons", "bottle caps", "comics", "feathers",
)  # fmt: skip
FOODS = ("apples", "plums", "muffins", "rolls", "pears", "carrots", "peaches", "dumplings")
JOBS = ("walking dogs", "raking leaves", "tutoring", "washing cars", "painting fences")
PLACES = ("library", "bakery", "market", "workshop", "garden centre", "museum", "ferry")

Problem = tuple[str, list[str], int]
R = random.Random


def share_out(r: R) -> Problem:
    name, thing, n, each = r.choice(NAMES), r.choice(THINGS), r.randint(3, 12), r.randint(3, 15)
    left = r.randint(1, n - 1)
    total = n * each + left
    question = (
        f"{name} has {total} {thing} and gives {each} to each of {n} friends. "
        f"How many {thing} does {name} keep?"
    )
    steps = [
        f"The friends get {n} * {each} = {n * each} {thing} together.",
        f"{name} keeps {total} - {n * each} = {left} {thing}.",
    ]
    return question, steps, left


def two_days(r: R) -> Problem:
    place, a, factor = r.choice(PLACES), r.randint(12, 80), r.choice((2, 3, 4))
    question = (
        f"On Saturday {a} people came to the {place}. On Sunday {factor} times as many came. "
        "How many people came on the two days?"
    )
    steps = [
        f"On Sunday {factor} * {a} = {factor * a} people came.",
        f"On both days {a} + {factor * a} = {a + factor * a} people came.",
    ]
    return question, steps, a + factor * a


def wages(r: R) -> Problem:
    name, job, pay = r.choice(NAMES), r.choice(JOBS), r.randint(6, 25)
    hours, days, spent = r.randint(2, 6), r.randint(2, 6), r.randint(5, 20)
    total = pay * hours * days
    question = (
        f"{name} earns ${pay} an hour by {job}, and works {hours} hours a day for {days} days. "
        f"Afterwards {name} spends ${spent}. How many dollars are left?"
    )
    steps = [
        f"{name} works {hours} * {days} = {hours * days} hours.",
        f"That earns {hours * days} * {pay} = {total} dollars.",
        f"After spending, {total} - {spent} = {total - spent} dollars are left.",
    ]
    return question, steps, total - spent


def shopping(r: R) -> Problem:
    name, food, price, n = r.choice(NAMES), r.choice(FOODS), r.randint(2, 9), r.randint(3, 12)
    extra, note = r.randint(1, 9), r.choice((100, 150, 200))
    bill = price * n + extra
    note = note if note > bill else 150  # a bill is at most 117
    question = (
        f"{name} buys {n} {food} at ${price} each and a bag for ${extra}, and pays with ${note}. "
        "How much change comes back?"
    )
    steps = [
        f"The {food} cost {n} * {price} = {n * price} dollars.",
        f"With the bag the bill is {n * price} + {extra} = {bill} dollars.",
        f"The change is {note} - {bill} = {note - bill} dollars.",
    ]
    return question, steps, note - bill


def half_then_more(r: R) -> Problem:
    name, thing, half, more = r.choice(NAMES), r.choice(THINGS), r.randint(8, 60), r.randint(3, 30)
    question = (
        f"{name} had {2 * half} {thing}, lost half of them and then found {more} more. "
        f"How many {thing} does {name} have now?"
    )
    steps = [
        f"Half of {2 * half} is {2 * half} / 2 = {half}.",
        f"With the new ones there are {half} + {more} = {half + more} {thing}.",
    ]
    return question, steps, half + more


def trip(r: R) -> Problem:
    name, speed, hours = r.choice(NAMES), r.randint(20, 90), r.randint(2, 6)
    rest = r.randint(10, 60)
    question = (
        f"{name} drives at {speed} kilometres an hour for {hours} hours and then has "
        f"{rest} kilometres to go. How long is the whole road in kilometres?"
    )
    steps = [
        f"In {hours} hours {name} drives {speed} * {hours} = {speed * hours} kilometres.",
        f"The road is {speed * hours} + {rest} = {speed * hours + rest} kilometres long.",
    ]
    return question, steps, speed * hours + rest


def boxes(r: R) -> Problem:
    thing, per, full, loose = r.choice(THINGS), r.randint(4, 24), r.randint(3, 15), r.randint(1, 20)
    question = (
        f"A shop has {full} boxes with {per} {thing} in each, and {loose} loose {thing}. "
        f"How many {thing} are there in the shop?"
    )
    steps = [
        f"The boxes hold {full} * {per} = {full * per} {thing}.",
        f"With the loose ones there are {full * per} + {loose} = {full * per + loose}.",
    ]
    return question, steps, full * per + loose


def percent(r: R) -> Problem:
    rate, base = r.choice((10, 20, 25, 50)), 20 * r.randint(2, 20)
    place, off = r.choice(PLACES), 0
    off = base * rate // 100
    question = (
        f"A coat at the {place} costs ${base}. Today its price is {rate}% lower. "
        "What does the coat cost today, in dollars?"
    )
    steps = [
        f"The discount is {base} * {rate} / 100 = {off} dollars.",
        f"Today the coat costs {base} - {off} = {base - off} dollars.",
    ]
    return question, steps, base - off


def ages(r: R) -> Problem:
    a, b = r.sample(NAMES, 2)
    young, gap, later = r.randint(4, 20), r.randint(2, 15), r.randint(2, 12)
    question = (
        f"{a} is {young} years old and {b} is {gap} years older. "
        f"How old will {b} be in {later} years?"
    )
    steps = [
        f"Now {b} is {young} + {gap} = {young + gap} years old.",
        f"In {later} years {b} will be {young + gap} + {later} = {young + gap + later}.",
    ]
    return question, steps, young + gap + later


def reading(r: R) -> Problem:
    name, per_day, days = r.choice(NAMES), r.randint(8, 40), r.randint(3, 12)
    left = r.randint(10, 90)
    pages = per_day * days + left
    question = (
        f"{name} reads {per_day} pages of a book each day. The book has {pages} pages. "
        f"How many pages are left after {days} days?"
    )
    steps = [
        f"In {days} days {name} reads {per_day} * {days} = {per_day * days} pages.",
        f"There are {pages} - {per_day * days} = {left} pages left.",
    ]
    return question, steps, left


def savings(r: R) -> Problem:
    name, weekly, start = r.choice(NAMES), r.randint(4, 20), r.randint(5, 60)
    weeks = r.randint(3, 20)
    goal = start + weekly * weeks
    question = (
        f"{name} has ${start} and saves ${weekly} every week for a bicycle that costs ${goal}. "
        "In how many weeks can the bicycle be paid for?"
    )
    steps = [
        f"{name} still needs {goal} - {start} = {goal - start} dollars.",
        f"That takes {goal - start} / {weekly} = {weeks} weeks.",
    ]
    return question, steps, weeks


def difference(r: R) -> Problem:
    (a, b), thing = r.sample(NAMES, 2), r.choice(THINGS)
    n, factor = r.randint(5, 40), r.choice((2, 3, 5))
    question = (
        f"{a} owns {n} {thing}. {b} owns {factor} times as many. "
        f"How many more {thing} than {a} does {b} own?"
    )
    steps = [
        f"{b} owns {factor} * {n} = {factor * n} {thing}.",
        f"That is {factor * n} - {n} = {factor * n - n} more.",
    ]
    return question, steps, factor * n - n


def garden(r: R) -> Problem:
    rows, plants, dead = r.randint(4, 15), r.randint(5, 18), r.randint(2, 15)
    name, food = r.choice(NAMES), r.choice(("tomato", "bean", "pumpkin", "pepper", "onion"))
    grown = rows * plants - dead
    question = (
        f"{name} plants {rows} rows of {plants} {food} plants. {dead} of them do not survive. "
        f"How many {food} plants are growing?"
    )
    steps = [
        f"{name} plants {rows} * {plants} = {rows * plants} {food} plants.",
        f"There are {rows * plants} - {dead} = {grown} growing.",
    ]
    return question, steps, grown


def teams(r: R) -> Problem:
    size, n, girls = r.randint(4, 11), r.randint(3, 9), 0
    total = size * n
    girls = r.randint(total // 4, total // 2)
    question = (
        f"{total} pupils, {girls} of them girls, form teams of {size}. "
        "How many teams are there, plus how many boys? Give the sum of the two numbers."
    )
    steps = [
        f"There are {total} / {size} = {n} teams.",
        f"There are {total} - {girls} = {total - girls} boys.",
        f"The sum is {n} + {total - girls} = {n + total - girls}.",
    ]
    return question, steps, n + total - girls


def minutes(r: R) -> Problem:
    name, first, second = r.choice(NAMES), r.randint(10, 55), r.randint(10, 55)
    days = r.randint(2, 7)
    total = (first + second) * days
    question = (
        f"Every day {name} practises the violin for {first} minutes in the morning and {second} "
        f"minutes in the evening. How many minutes is that in {days} days?"
    )
    steps = [
        f"In a day {name} practises {first} + {second} = {first + second} minutes.",
        f"In {days} days that is {first + second} * {days} = {total} minutes.",
    ]
    return question, steps, total


def bus(r: R) -> Problem:
    start, off, on = r.randint(20, 50), r.randint(3, 15), r.randint(3, 20)
    question = (
        f"A bus leaves with {start} passengers. At the first stop {off} get off and {on} get on, "
        f"and at the second stop {on} get off. How many passengers are on the bus then?"
    )
    steps = [
        f"After the first stop there are {start} - {off} + {on} = {start - off + on} passengers.",
        f"After the second there are {start - off + on} - {on} = {start - off} passengers.",
    ]
    return question, steps, start - off


def pets(r: R) -> Problem:
    name, grams, animals = r.choice(NAMES), r.randint(20, 90), r.randint(2, 8)
    days = r.randint(3, 10)
    daily = grams * animals
    question = (
        f"Each of {name}'s {animals} rabbits eats {grams} grams of hay a day. "
        f"How many grams of hay do they eat in {days} days?"
    )
    steps = [
        f"In a day they eat {animals} * {grams} = {daily} grams.",
        f"In {days} days they eat {daily} * {days} = {daily * days} grams.",
    ]
    return question, steps, daily * days


def third(r: R) -> Problem:
    name, food, part = r.choice(NAMES), r.choice(FOODS), r.randint(4, 30)
    eaten = r.randint(1, part)
    question = (
        f"A third of the {3 * part} {food} in a crate are ripe. {name} takes {eaten} of the ripe "
        f"ones. How many ripe {food} stay in the crate?"
    )
    steps = [
        f"{3 * part} / 3 = {part} of the {food} are ripe.",
        f"After {name} took some, {part} - {eaten} = {part - eaten} ripe ones stay.",
    ]
    return question, steps, part - eaten


def tickets(r: R) -> Problem:
    adults, children, price = r.randint(2, 9), r.randint(2, 12), 2 * r.randint(3, 12)
    half = price // 2
    total = adults * price + children * half
    place = r.choice(PLACES)
    question = (
        f"A ticket for the {place} costs ${price}; children pay half. What do {adults} adults and "
        f"{children} children pay together, in dollars?"
    )
    steps = [
        f"The adults pay {adults} * {price} = {adults * price} dollars.",
        f"A child pays {price} / 2 = {half} dollars, so the children pay {children} * {half} = "
        f"{children * half} dollars.",
        f"Together they pay {adults * price} + {children * half} = {total} dollars.",
    ]
    return question, steps, total


def average(r: R) -> Problem:
    mean, spread = r.randint(10, 60), r.randint(1, 9)
    name = r.choice(NAMES)
    a, b, c = mean - spread, mean, mean + spread
    question = f"{name} throws a ball {a}, {c} and {b} metres far. What is the mean in metres?"
    steps = [
        f"The sum is {a} + {c} + {b} = {a + b + c} metres.",
        f"The mean is {a + b + c} / 3 = {mean} metres.",
    ]
    return question, steps, mean


def stairs(r: R) -> Problem:
    floors, per, times = r.randint(3, 12), r.randint(10, 24), r.randint(2, 6)
    name = r.choice(NAMES)
    total = floors * per * times
    question = (
        f"There are {per} steps to a floor, and {name} climbs {floors} floors {times} times a day. "
        "How many steps is that?"
    )
    steps = [
        f"One climb is {floors} * {per} = {floors * per} steps.",
        f"{times} climbs are {floors * per} * {times} = {total} steps.",
    ]
    return question, steps, total


def ribbon(r: R) -> Problem:
    piece, n, rest = r.randint(6, 30), r.randint(3, 12), r.randint(1, 5)
    name = r.choice(NAMES)
    length = piece * n + rest
    question = (
        f"{name} cuts a ribbon of {length} centimetres into pieces of {piece} centimetres. "
        f"{rest} centimetres are left over. How many pieces are there?"
    )
    steps = [
        f"The pieces measure {length} - {rest} = {piece * n} centimetres together.",
        f"There are {piece * n} / {piece} = {n} pieces.",
    ]
    return question, steps, n


def brew(r: R) -> Problem:
    cups, spoons, guests = r.randint(2, 5), r.randint(2, 4), r.randint(3, 12)
    name = r.choice(NAMES)
    total = cups * spoons * guests
    question = (
        f"{name} makes tea for {guests} guests. Each drinks {cups} cups, and a cup needs {spoons} "
        "spoons of tea. How many spoons of tea are needed?"
    )
    steps = [
        f"The guests drink {guests} * {cups} = {guests * cups} cups.",
        f"That needs {guests * cups} * {spoons} = {total} spoons of tea.",
    ]
    return question, steps, total


def points(r: R) -> Problem:
    a, b = r.sample(NAMES, 2)
    x, more, lost = r.randint(20, 90), r.randint(5, 40), r.randint(2, 18)
    total = x + x + more - lost
    question = (
        f"In a game {a} scores {x} points and {b} scores {more} points more, but loses {lost} for "
        "a foul. How many points do they have together?"
    )
    steps = [
        f"{b} scores {x} + {more} = {x + more} points.",
        f"After the foul {b} has {x + more} - {lost} = {x + more - lost} points.",
        f"Together they have {x} + {x + more - lost} = {total} points.",
    ]
    return question, steps, total


def tank(r: R) -> Problem:
    rate, minutes_, used = r.randint(3, 15), r.randint(5, 30), r.randint(5, 14)
    total = rate * minutes_ - used
    question = (
        f"Water runs into an empty tank at {rate} litres a minute for {minutes_} minutes. Then "
        f"{used} litres are taken out. How many litres are in the tank?"
    )
    steps = [
        f"{rate} * {minutes_} = {rate * minutes_} litres run in.",
        f"Then {rate * minutes_} - {used} = {total} litres are in the tank.",
    ]
    return question, steps, total


TEMPLATES: tuple[Callable[[R], Problem], ...] = (
    share_out, two_days, wages, shopping, half_then_more, trip, boxes, percent, ages, reading,
    savings, difference, garden, teams, minutes, bus, pets, third, tickets, average, stairs,
    ribbon, brew, points, tank,
)  # fmt: skip


def generate(count: int, seed: int, avoid: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    """``count`` different problems; the same for the same seed.

    Args:
        avoid: questions that must not occur (those of another split).
    """
    rng = random.Random(seed)
    seen = set(avoid)
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        question, steps, answer = rng.choice(TEMPLATES)(rng)
        if question in seen:
            continue
        seen.add(question)
        rows.append({"prompt": question, "completion": "\n".join([*steps, f"#### {answer}"])})
    return rows


def write_jsonl(rows: list[dict[str, str]], path: Path) -> None:
    """Write rows through a temporary name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    write_jsonl(generate(options.count, options.seed), options.out)
