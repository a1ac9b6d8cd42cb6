"""Names for the generated world, no two of which share a root.

- ``Names``: names of people, places, organisations and works; splits draw from disjoint parts.
- ``LARGEST_WORLD``: passages per split for which the names last.
"""

from __future__ import annotations

from itertools import product
from typing import Final

import numpy as np

LARGEST_WORLD: Final = 4000
SPLITS: Final = ("train", "valid", "test")
_NAMESPACE: Final = 0x5EA7C4


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# No part ends as an English suffix does, so that stemming keeps all roots apart.
_STARTS: Final = _words(
    "Al Bar Bel Bran Cal Cor Dal Dor Dun El Fal Fen Gal Gar Hal Har Ivar Jor Kal Kel Lan Lor Mal Mar Mor Nal Nor Ol "
    "Or Pel Quin Ral Ros Sal Sel Tal Tar Tol Ul Val Var Vel Ven Wal Wes Yor Zan Zel"
)
_MIDDLES: Final = ("", "a", "e", "i", "o", "an", "en", "or")
_ENDS: Final = _words(
    "bek dan den dor fel gan grim kas kun lan lok mar mond nak nor pol ran rik ron sen tan tek thor van vek vin vor "
    "wick zar"
)
_WOMEN: Final = _words(
    "Ada Alma Berta Clara Dora Edith Elsa Flora Greta Hanna Ida Irma Julia Karin Lena Maria Nora Olga Rosa Vera"
)
_MEN: Final = _words(
    "Adam Anton Bruno Carl David Emil Felix Georg Hugo Ivan Jakob Konrad Leo Martin Oscar Paul Robert Simon Victor "
    "Walter"
)
_ADJECTIVES: Final = _words(
    "Amber Ancient Bitter Black Blind Blue Broken Copper Crimson Crystal Distant Empty Fallen Final Frozen Gentle "
    "Golden Green Grey Hidden Hollow Iron Ivory Last Lonely Lost Marble Narrow Pale Quiet Red Sacred Scarlet Secret "
    "Silent Silver Sleeping Stolen White Wooden"
)
_NOUNS: Final = _words(
    "Anchor Bell Bridge Candle Castle Clock Crown Dancer Desert Door Dream Falcon Feast Forest Garden Gate Harbour "
    "Island Lamp Letter Lion Mask Mirror Moon Mountain Oak Orchard Palace Raven Road Rose Sailor Shadow Shore Song "
    "Star Stranger Tower Valley Window"
)
_ENDINGS: Final = ("", " of Winter", " by Night")


class Names:
    """Names in a random order; each is drawn once, and no two splits of a seed share a root or a title."""

    def __init__(self, seed: int, split: str) -> None:
        """Take the part of ``split``; ``seed`` orders all names."""
        part = SPLITS.index(split)
        everything = np.random.Generator(np.random.PCG64([_NAMESPACE, seed]))
        roots = list(dict.fromkeys("".join(parts) for parts in product(_STARTS, _MIDDLES, _ENDS)))
        titles = [f"The {a} {n}{e}" for a, n, e in product(_ADJECTIVES, _NOUNS, _ENDINGS)]
        self._roots = [roots[at] for at in everything.permutation(len(roots))][part :: len(SPLITS)]
        self._titles = [titles[at] for at in everything.permutation(len(titles))][part :: len(SPLITS)]
        self._random = np.random.Generator(np.random.PCG64([_NAMESPACE, seed, part]))

    def root(self) -> str:
        """Return a name of a place."""
        return self._roots.pop()

    def title(self) -> str:
        """Return a title of a work."""
        return self._titles.pop()

    def person(self) -> tuple[str, str]:
        """Return a person's name and ``"she"`` or ``"he"``."""
        pronoun, first = (("she", _WOMEN), ("he", _MEN))[int(self._random.integers(2))]
        return f"{first[int(self._random.integers(len(first)))]} {self.root()}", pronoun
