"""Questions over the generated world, each with one answer that takes several passages.

- ``ask``: the questions of a world.
- ``solve``: all that a chain of relations leads to, given some facts and nothing else.
- ``HOPS``: how many passages a question may take.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np

from ...errors import UsageError
from .facts import MAKERS, Facts
from .names import SPLITS
from .passages import Passage, Question

HOPS: Final = (2, 3, 4)
_NAMESPACE: Final = 0xA5C
_PATIENCE: Final = 2000
"""Draws in a row that give nothing new before a world counts as exhausted."""

# Relation to how a noun phrase continues, and how a question ends; {x} is what has been said so far.
PHRASES: Final[Mapping[str, tuple[str, str]]] = {
    "birthplace": ("the birthplace of {x}", "In which city was {x} born?"),
    "teacher": ("the teacher of {x}", "Who was the teacher of {x}?"),
    "employer": ("the employer of {x}", "Who was the employer of {x}?"),
    "born": ("", "In which year was {x} born?"),
    "profession": ("", "What was the profession of {x}?"),
    "country": ("the country of {x}", "In which country is {x}?"),
    "river": ("the river of {x}", "On which river is {x}?"),
    "mayor": ("the mayor of {x}", "Who is the mayor of {x}?"),
    "founded": ("", "In which year was {x} founded?"),
    "product": ("", "What is {x} known for making?"),
    "capital": ("the capital of {x}", "What is the capital of {x}?"),
    "president": ("the president of {x}", "Who is the president of {x}?"),
    "currency": ("", "What is the currency of {x}?"),
    "sea": ("", "Into which water does {x} flow?"),
    "length": ("", "How many kilometres long is {x}?"),
    "seat": ("the seat of {x}", "In which city is {x} based?"),
    "founder": ("the founder of {x}", "Who was the founder of {x}?"),
    "head": ("the head of {x}", "Who is the head of {x}?"),
    "established": ("", "In which year was {x} established?"),
    "maker": ("the {maker} of {x}", "Who was the {maker} of {x}?"),
    "year": ("", "In which year did {x} appear?"),
    "patron": ("the patron of {x}", "Who commissioned {x}?"),
    "setting": ("the setting of {x}", "In which city is {x} set?"),
}
_COMPARED: Final = ("maker", "founder")
"""Relations that lead to a person whose birth may be compared with another's."""


def solve(triples: Iterable[tuple[str, str, str]], start: str, relations: Sequence[str]) -> frozenset[str]:
    """Return everything that ``relations`` lead to from ``start`` by way of ``triples``."""
    reached = frozenset({start})
    known = list(triples)
    for relation in relations:
        reached = frozenset(o for s, r, o in known if r == relation and s in reached)
    return reached


def ask(
    facts: Facts, passages: Sequence[Passage], seed: int, split: str, number: int, hops: Sequence[int]
) -> tuple[Question, ...]:
    """Return ``number`` different questions; the first ones are the same whatever their number.

    Raises:
        UsageError: the world has not so many.
    """
    asker = _Asker(facts, passages, seed, split)
    return tuple(asker.ask(f"{split}-{at:05d}", hops[at % len(hops)]) for at in range(number))


class _Asker:
    def __init__(self, facts: Facts, passages: Sequence[Passage], seed: int, split: str) -> None:
        self._facts = facts
        self._texts = {passage.title: passage.text for passage in passages}
        self._subjects = list(facts.kinds)
        self._made = {
            relation: [name for name in self._subjects if relation in facts.objects[name]] for relation in _COMPARED
        }
        self._random = np.random.Generator(np.random.PCG64([_NAMESPACE, seed, SPLITS.index(split)]))
        self._asked: set[str] = set()

    def ask(self, id: str, hops: int) -> Question:
        for _ in range(_PATIENCE):
            comparison = hops == 4 and self._below(2) == 0
            question = self._comparison(id) if comparison else self._chain(id, hops)
            if question is not None and question.text not in self._asked:
                self._asked.add(question.text)
                return question
        raise UsageError(
            f"a world of {len(self._subjects)} passages has only about {len(self._asked)} questions of these hops: "
            "raise world_size or lower num_questions"
        )

    def _chain(self, id: str, hops: int) -> Question | None:
        """Walk from a random subject to a random fact, ``hops`` passages on."""
        path, relations = [self._subjects[self._below(len(self._subjects))]], list[str]()
        for left in range(hops, 0, -1):
            objects = self._facts.objects[path[-1]]
            options = [
                relation
                for relation in objects
                if relation in PHRASES and (left == 1 or objects[relation] in self._facts.kinds)
            ]
            if not options:
                return None
            relations.append(options[self._below(len(options))])
            path.append(objects[relations[-1]])
        *gold, answer = path
        if len(set(path)) < len(path) or not self._holds(gold, relations, answer):
            return None
        phrase = self._said(gold[0])
        for subject, relation in zip(gold[:-1], relations[:-1], strict=True):
            phrase = PHRASES[relation][0].format(x=phrase, maker=self._maker(subject))
        text = PHRASES[relations[-1]][1].format(x=phrase, maker=self._maker(gold[-1]))
        return Question(id, text, (answer,), tuple(gold), f"{hops} hops")

    def _comparison(self, id: str) -> Question | None:
        """Ask which of two people, known by what they made, was born first."""
        relation = _COMPARED[self._below(len(_COMPARED))]
        things = self._made[relation]
        first, second = (things[self._below(len(things))] for _ in range(2))
        one, other = (self._facts.objects[thing][relation] for thing in (first, second))
        years = [int(self._facts.objects[person]["born"]) for person in (one, other)]
        if first == second or one == other or years[0] == years[1]:
            return None
        for thing, person, year in ((first, one, years[0]), (second, other, years[1])):
            if not self._holds([thing, person], [relation, "born"], str(year)):
                return None
        said = [PHRASES[relation][0].format(x=self._said(at), maker=self._maker(at)) for at in (first, second)]
        answer = one if years[0] < years[1] else other
        text = f"Who was born first, {said[0]} or {said[1]}?"
        return Question(id, text, (answer,), (first, one, second, other), "comparison")

    def _holds(self, gold: Sequence[str], relations: Sequence[str], answer: str) -> bool:
        """Whether ``answer`` follows from the passages ``gold``, from no fewer of them, and is the only one to."""
        triples = [(s, r, o) for s in gold for r, o in self._facts.objects[s].items()]
        if solve(triples, gold[0], relations) != {answer}:
            return False
        if any(solve([t for t in triples if t[0] != left_out], gold[0], relations) for left_out in gold):
            return False
        # Neither may an earlier passage name the answer, nor a later subject but the next, by coincidence.
        texts = [self._texts[name] for name in gold]
        if any(answer in text for text in texts[:-1]):
            return False
        return all(later not in texts[at] for at, later in _beyond_next(gold))

    def _said(self, name: str) -> str:
        """How a question names what it starts from."""
        kind = self._facts.kinds[name]
        if kind == "work":
            return f"the {self._facts.objects[name]['form']} {name}"
        return f"the river {name}" if kind == "river" else name

    def _maker(self, name: str) -> str:
        return MAKERS.get(self._facts.objects[name].get("form", ""), "")

    def _below(self, n: int) -> int:
        return int(self._random.integers(n))


def _beyond_next(gold: Sequence[str]) -> list[tuple[int, str]]:
    """Return (position, name) of every passage and each later subject that the chain does not reach from it."""
    return [(at, later) for at in range(len(gold)) for later in gold[at + 2 :]]
