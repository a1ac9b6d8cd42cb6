"""Questions that are made on the fly: arithmetic and small data problems with exactly one answer each.

- ``GeneratedTasks``: the source. ``KINDS``: the kinds of questions, those for the calculator first.

A question belongs to the split that a hash of its text falls into, so no question of one split is in another, whatever
the seed. The program that comes with each is how an expert would find the answer with tools.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, timedelta
from fractions import Fraction

from ...errors import UsageError, nearest
from .tasks import Task, TaskSource, in_split, kind_and_number, numbered

Draft = tuple[str, str, tuple[tuple[str, str], ...]]
"""Question, answer, calls."""
_TRIES = 1000
_NAMES = ("Ana", "Ben", "Chen", "Dana", "Eli", "Farah", "Goran", "Hana", "Ivan", "Jun", "Kofi", "Lena", "Mila", "Nils")
_THINGS = ("apples", "pens", "books", "cups", "lamps", "maps", "rings", "seeds", "stamps", "tiles", "bowls", "coins")
_CITIES = ("Arlen", "Borik", "Cadra", "Delmo", "Estra", "Fenwick", "Galen", "Hovik", "Istra", "Joren")
_WORDS = (  # noqa: SIM905
    "river stone cloud amber violet orange thunder window garden silver meadow lantern copper winter harbor "
    "needle candle forest island marble pepper rocket saddle temple velvet walnut yellow zephyr"
).split()


class GeneratedTasks(TaskSource):
    """Tasks of several kinds in turn, named ``kind/split-number``."""

    def __init__(self, difficulty: int, kinds: Sequence[str] | None, counts: Mapping[str, int], seed: int) -> None:
        """Take the knobs.

        Raises:
            UsageError: there is no such difficulty or kind.
        """
        if difficulty not in (1, 2, 3):
            raise UsageError(f"difficulty is 1, 2 or 3, got {difficulty!r}")
        chosen = tuple(KINDS) if kinds is None else tuple(dict.fromkeys([kinds] if isinstance(kinds, str) else kinds))
        for kind in chosen:
            if kind not in KINDS:
                raise UsageError(f"unknown kind of task {kind!r}{nearest(kind, KINDS)}")
        if not chosen:
            raise UsageError("kinds is empty; leave it out for all")
        self._difficulty, self._kinds, self._counts, self._seed = difficulty, chosen, counts, seed

    def list(self, split: str) -> Iterable[str]:
        return numbered(self._kinds, split, self._counts[split])

    def load(self, split: str, task: str) -> Task:
        kind, number = kind_and_number(task)
        generator = random.Random(f"{self._seed} {self._difficulty} {split} {kind} {number}")
        for _ in range(_TRIES):
            question, answer, calls = KINDS[kind](generator, self._difficulty)
            if in_split(question, split):
                return Task(task, question, answer, calls)
        raise AssertionError(f"no {kind} question fell into {split}")


def _expression(draw: random.Random, level: int) -> Draft:
    text = str(draw.randint(2, 99))
    for _ in range(level + 1):
        sign = draw.choice("+-*")
        other = draw.randint(2, (12, 40, 99)[level - 1])
        text = f"({text}) {sign} {other}" if sign == "*" and not text.isdigit() else f"{text} {sign} {other}"
    return f"What is {text}?", str(_exact(text)), (("calculator", text),)


def _exact(text: str) -> int:
    from .calculator import calculate

    return int(calculate(text))


def _shopping(draw: random.Random, level: int) -> Draft:
    buyer, (first, second) = draw.choice(_NAMES), draw.sample(_THINGS, 2)
    many, more = draw.randint(2, 9 * level), draw.randint(2, 9 * level)
    price, other = draw.randint(2, 20 * level), draw.randint(2, 20 * level)
    cost = many * price + more * other
    paid = cost + draw.randint(1, 50)
    question = f"{buyer} buys {many} {first} for ${price} each and {more} {second} for ${other} each"
    expression = f"{many} * {price} + {more} * {other}"
    if level == 1:
        return f"{question}. How many dollars is that?", str(cost), (("calculator", expression),)
    calls = (("calculator", expression), ("calculator", f"{paid} - {cost}"))
    return f"{question}, and pays with ${paid}. How many dollars come back?", str(paid - cost), calls


def _percentage(draw: random.Random, level: int) -> Draft:
    price, percent = 20 * draw.randint(2, 60 * level), 5 * draw.randint(1, 19)
    value = Fraction(price * (100 - percent), 100)
    expression = f"{price} * (100 - {percent}) / 100"
    question = f"A price of ${price} is cut by {percent}%."
    calls: tuple[tuple[str, str], ...] = (("calculator", expression),)
    if level > 1:
        tax = 10 * draw.randint(1, 3)
        calls = (*calls, ("calculator", f"{value} * (100 + {tax}) / 100"))
        value = value * (100 + tax) / 100
        question += f" Then {tax}% tax is added."
    return f"{question} What is the new price in dollars?", _decimal(value), calls


def _travel(draw: random.Random, level: int) -> Draft:
    legs = [(10 * draw.randint(3, 12), draw.randint(1, 9)) for _ in range(level + 1)]
    told = ", then ".join(f"{hours} hours at {speed} km/h" for speed, hours in legs)
    expression = " + ".join(f"{speed} * {hours}" for speed, hours in legs)
    way = sum(speed * hours for speed, hours in legs)
    question = f"A train runs {told}. How many kilometres is that?"
    return question, str(way), (("calculator", expression),)


def _numbers(draw: random.Random, level: int) -> Draft:
    values = [draw.randint(1, 10**level * 10) for _ in range(6 + 6 * level)]
    code = f"values = {values}\n"
    median = int(statistics.median_low(values))
    asked, rest, answer = draw.choice(
        [
            ("the sum of the even numbers", "sum(v for v in values if v % 2 == 0)",
             sum(v for v in values if v % 2 == 0)),
            (f"the sum of the numbers above {median}", f"sum(v for v in values if v > {median})",
             sum(v for v in values if v > median)),
            ("the largest minus the smallest number", "max(values) - min(values)", max(values) - min(values)),
            ("the third largest different number", "sorted(set(values))[-3]", sorted(set(values))[-3]),
            ("the number of multiples of 3", "len([v for v in values if v % 3 == 0])",
             len([v for v in values if v % 3 == 0])),
            ("the sum of the squares", "sum(v * v for v in values)", sum(v * v for v in values)),
        ]
    )  # fmt: skip
    listed = ", ".join(map(str, values))
    return f"Numbers: {listed}. What is {asked}?", str(answer), (("python", f"{code}print({rest})"),)


def _letters(draw: random.Random, level: int) -> Draft:
    words = draw.sample(_WORDS, 3 + 3 * level)
    text = " ".join(words)
    letter = draw.choice("aeiorlnt")
    asked, rest, answer = draw.choice(
        [
            (f"How many times is the letter {letter} in it?", f"text.count({letter!r})", str(text.count(letter))),
            (f"How many of its words have the letter {letter}?",
             f"sum({letter!r} in word for word in text.split())", str(sum(letter in word for word in words))),
            ("Which of its words comes last in the alphabet?", "max(text.split())", max(words)),
            ("What are the first letters of its words, in order, as one word?",
             "''.join(word[0] for word in text.split())", "".join(word[0] for word in words)),
        ]
    )  # fmt: skip
    return f'Text: "{text}". {asked}', answer, (("python", f"text = {text!r}\nprint({rest})"),)


def _sequence(draw: random.Random, level: int) -> Draft:
    start, factor, step = draw.randint(1, 20), draw.randint(2, 9), draw.randint(1, 30)
    modulus, place = draw.randint(50, 100 * 10**level), 10 * draw.randint(1, 5 * level)
    value = start
    for _ in range(place - 1):
        value = (factor * value + step) % modulus
    question = (
        f"A sequence starts with {start}; each next number is {factor} times the last plus {step}, modulo {modulus}. "
        f"What is number {place} of it?"
    )
    code = f"x = {start}\nfor i in range({place - 1}):\n    x = ({factor} * x + {step}) % {modulus}\nprint(x)"
    return question, str(value), (("python", code),)


def _primes(draw: random.Random, level: int) -> Draft:
    low = draw.randint(2, 200 * level)
    high = low + draw.randint(20, 100 * level)
    primes = [n for n in range(low, high + 1) if all(n % d for d in range(2, int(n**0.5) + 1))]
    found = f"primes = [n for n in range({low}, {high + 1}) if all(n % d for d in range(2, int(n ** 0.5) + 1))]"
    asked, rest, answer = draw.choice(
        [
            ("How many primes are there", "len(primes)", len(primes)),
            ("What is the sum of the primes", "sum(primes)", sum(primes)),
        ]
    )
    question = f"{asked} from {low} to {high}?"
    return question, str(answer), (("python", f"{found}\nprint({rest})"),)


def _days(draw: random.Random, level: int) -> Draft:
    first = date(2000, 1, 1) + timedelta(days=draw.randrange(9000))
    if level == 1:
        last = first + timedelta(days=draw.randint(10, 900))
        code = f"from datetime import date\nprint((date({_args(last)}) - date({_args(first)})).days)"
        return f"How many days are there from {first} to {last}?", str((last - first).days), (("python", code),)
    days = draw.randint(50, 2000)
    last = first + timedelta(days=days)
    weekday = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
    code = f"from datetime import date, timedelta\nday = date({_args(first)}) + timedelta(days={days})\n"
    if level == 2:
        question = f"Which date is {days} days after {first}? Write it as YYYY-MM-DD."
        return question, str(last), (("python", f"{code}print(day)"),)
    question = f"Which day of the week is {days} days after {first}?"
    return question, weekday[last.weekday()], (("python", f"{code}print({list(weekday)}[day.weekday()])"),)


def _args(day: date) -> str:
    return f"{day.year}, {day.month}, {day.day}"


def _table(draw: random.Random, level: int) -> Draft:
    cities, things = draw.sample(_CITIES, 2 + level), draw.sample(_THINGS, 2 + level)
    rows = [
        (draw.choice(cities), draw.choice(things), draw.randint(1, 30), draw.randint(1, 20))
        for _ in range(4 + 4 * level)
    ]
    told = "; ".join(f"{city} {many} {thing} at ${price}" for city, thing, many, price in rows)
    first = f"rows = {rows}\ntotal = {{}}\nfor city, thing, many, price in rows:\n"
    key = draw.choice(("city", "thing")) if level > 1 else "city"
    totals: dict[str, int] = {}
    for city, thing, many, price in rows:
        name = city if key == "city" else thing
        totals[name] = totals.get(name, 0) + many * price
    first += f"    total[{key}] = total.get({key}, 0) + many * price\ntotal"
    ranked = sorted(totals.values(), reverse=True)
    if level == 3 and len(ranked) > 1:
        asked, rest = "How many dollars are the two largest totals together", "sum(sorted(total.values())[-2:])"
        answer = str(sum(ranked[:2]))
    else:
        asked, rest, answer = "How many dollars is the largest total", "max(total.values())", str(ranked[0])
    question = f"Sales: {told}. Add up the sales of each {key}. {asked}?"
    return question, answer, (("python", first), ("python", f"print({rest})"))


def _powers(draw: random.Random, level: int) -> Draft:
    base, exponent = draw.randint(3, 99), draw.randint(20, 100 * level)
    modulus = draw.randint(100, 1000 * level)
    question = f"What is the remainder of {base}^{exponent} divided by {modulus}?"
    return question, str(pow(base, exponent, modulus)), (("python", f"print(pow({base}, {exponent}, {modulus}))"),)


def _decimal(value: Fraction) -> str:
    from .calculator import calculate

    return calculate(str(value))


KINDS: Mapping[str, Callable[[random.Random, int], Draft]] = {
    "expression": _expression,
    "shopping": _shopping,
    "percentage": _percentage,
    "travel": _travel,
    "numbers": _numbers,
    "letters": _letters,
    "sequence": _sequence,
    "primes": _primes,
    "days": _days,
    "table": _table,
    "powers": _powers,
}
