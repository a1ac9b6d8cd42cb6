"""The generated world: linked facts of people, places, works and organisations, and the passages that state them.

- ``Facts``: what holds, as subject, relation and object, with the kind of every subject.
- ``make_facts``: a world of a size and seed.
- ``passages``: one short encyclopedia entry per subject, which states all its facts and no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from .names import SPLITS, Names
from .passages import Passage

_NAMESPACE: Final = 0xFAC75
SMALLEST_WORLD: Final = 40

PROFESSIONS: Final = (
    "architect",
    "astronomer",
    "botanist",
    "chemist",
    "explorer",
    "historian",
    "lawyer",
    "painter",
    "physician",
    "pianist",
    "sculptor",
    "surgeon",
)
MAKERS: Final = {
    "film": "director",
    "novel": "author",
    "opera": "composer",
    "play": "playwright",
    "poem": "poet",
    "symphony": "composer",
}
"""Forms of works, and what one calls who made it."""
ORGANISATIONS: Final = ("Academy", "Foundation", "Institute", "Museum", "Observatory", "Press", "Society", "Theatre")
PRODUCTS: Final = (
    "amber",
    "bells",
    "carpets",
    "cheese",
    "clocks",
    "glass",
    "lace",
    "paper",
    "salt",
    "silk",
    "tea",
    "wine",
)
CURRENCIES: Final = ("crown", "ducat", "florin", "guilder", "mark", "peso", "shilling", "taler")
SEAS: Final = ("Amber Sea", "Bay of Reeds", "Coral Sea", "Grey Ocean", "Northern Sea", "Sea of Storms")


@dataclass
class Facts:
    """Every subject with its kind and its facts; a relation of a subject has one object."""

    kinds: dict[str, str] = field(default_factory=dict)
    """``"person"``, ``"city"``, ``"country"``, ``"river"``, ``"organisation"`` or ``"work"`` by name."""
    objects: dict[str, dict[str, str]] = field(default_factory=dict)
    """Object by subject and relation: the name of another subject, or a value such as a year."""

    def of_kind(self, kind: str) -> list[str]:
        """Return the subjects of ``kind`` in the order in which they were made."""
        return [name for name, its in self.kinds.items() if its == kind]

    def triples(self) -> Iterator[tuple[str, str, str]]:
        """Yield subject, relation and object."""
        for subject, objects in self.objects.items():
            for relation, value in objects.items():
                yield subject, relation, value


def make_facts(seed: int, split: str, size: int) -> Facts:
    """Make the world of a split, of ``size`` subjects, from ``SMALLEST_WORLD`` to ``LARGEST_WORLD``."""
    return _Maker(seed, split, size).facts


class _Maker:
    def __init__(self, seed: int, split: str, size: int) -> None:
        self._random = np.random.Generator(np.random.PCG64([_NAMESPACE, seed, SPLITS.index(split)]))
        self.facts = Facts()
        names = Names(seed, split)
        countries = [names.root() + "ia" for _ in range(max(3, size // 40))]
        cities = [names.root() for _ in range(max(len(countries), size // 8))]
        rivers = [names.root() for _ in range(max(2, size // 25))]
        organisations = [f"{names.root()} {self._one(ORGANISATIONS)}" for _ in range(size // 7)]
        works = [names.title() for _ in range(size * 3 // 10)]
        others = len(countries) + len(cities) + len(rivers) + len(organisations) + len(works)
        people = dict(names.person() for _ in range(size - others))
        self._people(people, cities, organisations)
        everybody = list(people)
        for number, city in enumerate(cities):
            self._add("city", city, country=countries[number % len(countries)], river=self._one(rivers))
            self._add("city", city, founded=self._year(900, 1600), product=self._one(PRODUCTS))
            self._add("city", city, mayor=self._one(everybody))
        for number, country in enumerate(countries):
            self._add("country", country, capital=cities[number], currency=self._one(CURRENCIES))
            self._add("country", country, president=self._one(everybody))
        for river in rivers:
            self._add("river", river, sea=self._one(SEAS), length=str(int(self._random.integers(80, 1900))))
        for organisation in organisations:
            founder, head = (everybody[at] for at in self._random.choice(len(everybody), 2, replace=False))
            established = self._later(founder, 25, 50)
            self._add("organisation", organisation, seat=self._one(cities), founder=founder)
            self._add("organisation", organisation, established=established, head=head)
        for work in works:
            maker = self._one(everybody)
            self._add("work", work, form=self._one(tuple(MAKERS)), maker=maker, year=self._later(maker, 20, 55))
            self._add("work", work, patron=self._one(organisations), setting=self._one(cities))

    def _people(self, people: dict[str, str], cities: Sequence[str], organisations: Sequence[str]) -> None:
        born = {name: int(self._random.integers(1700, 1950)) for name in people}
        for name, pronoun in people.items():
            self._add("person", name, pronoun=pronoun, born=str(born[name]), birthplace=self._one(cities))
            self._add("person", name, profession=self._one(PROFESSIONS), employer=self._one(organisations))
            teachers = [other for other in people if 15 <= born[name] - born[other] <= 45]
            if teachers:
                self._add("person", name, teacher=self._one(teachers))

    def _add(self, kind: str, subject: str, **objects: str) -> None:
        self.facts.kinds[subject] = kind
        self.facts.objects.setdefault(subject, {}).update(objects)

    def _one(self, options: Sequence[str]) -> str:
        return options[int(self._random.integers(len(options)))]

    def _year(self, first: int, last: int) -> str:
        return str(int(self._random.integers(first, last + 1)))

    def _later(self, person: str, least: int, most: int) -> str:
        born = int(self.facts.objects[person]["born"])
        return self._year(born + least, born + most)


# Each subject is told by one of these; every entry of a kind names the same relations.
TEMPLATES: Final = {
    "person": (
        "{name} was {a_profession}, born in {born} in {birthplace}. {She} worked for {employer}.",
        "Born in {birthplace} in {born}, {name} was {a_profession} in the service of {employer}.",
        "{name} (born {born} in {birthplace}) was {a_profession}. {Her} employer was {employer}.",
    ),
    "teacher": ("{She} was a pupil of {teacher}.", "{She} studied under {teacher}.", "{Her} teacher was {teacher}."),
    "city": (
        "{name} is a city in {country} on the river {river}. Founded in {founded}, {name} is known for its {product}. "
        "Its mayor is {mayor}.",
        "The city of {name} lies on the river {river} in {country}. {name} was founded in {founded} and makes "
        "{product}. {mayor} is its mayor.",
    ),
    "country": (
        "{name} is a country whose capital is {capital}. {name} pays in the {currency}, and its president is "
        "{president}.",
        "The country of {name} is governed from {capital}, its capital. The president of {name} is {president} and its "
        "currency the {currency}.",
    ),
    "river": (
        "{name} is a river. The {name} is {length} kilometres long and flows into the {sea}.",
        "The {name} is a river of {length} kilometres. The {name} ends in the {sea}.",
    ),
    "organisation": (
        "{name} is based in {seat}. It was established in {established} by {founder}, and its head is {head}.",
        "{founder} founded {name} in {established}. It has its seat in {seat} and is led by {head}.",
    ),
    "work": (
        "{name} is {a_form} of {year} by {maker}. It is set in {setting} and was commissioned by {patron}.",
        "{name}, {a_form} by {maker}, appeared in {year}. {patron} commissioned it; the story takes place in "
        "{setting}.",
    ),
}


def passages(facts: Facts, seed: int, split: str) -> tuple[Passage, ...]:
    """Tell ``facts``; the order of the passages says nothing of their links."""
    random = np.random.Generator(np.random.PCG64([_NAMESPACE, seed, SPLITS.index(split), 1]))
    entries = []
    for name, objects in facts.objects.items():
        text = _tell(random, facts.kinds[name], name, objects)
        if "teacher" in objects:
            text += " " + _tell(random, "teacher", name, objects)
        entries.append((name, text))
    return tuple(Passage(str(at), *entries[old]) for at, old in enumerate(random.permutation(len(entries))))


def _tell(random: np.random.Generator, kind: str, name: str, objects: dict[str, str]) -> str:
    template = TEMPLATES[kind][int(random.integers(len(TEMPLATES[kind])))]
    she = objects.get("pronoun", "it")
    words = {"She": she.capitalize(), "Her": "Her" if she == "she" else "His"}
    words |= {f"a_{relation}": _a(objects[relation]) for relation in ("form", "profession") if relation in objects}
    text = template.format(name=name, **words, **objects)
    return text[0].upper() + text[1:]


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
