"""Every action that a game's rules allow in any situation that can be reached, found once when the game is loaded.

- ``ground``: facts and actions reachable when nothing is ever taken away (the delete relaxation).
- ``Ground``: one such action.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

Fact = tuple[str, ...]
"""Predicate and ids."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A predicate with variables: each is its number in the rule and the types that it may take."""

    name: str
    variables: tuple[int, ...]
    types: tuple[frozenset[str], ...]


@dataclass(frozen=True, slots=True)
class Schema:
    """A rule over typed variables; different variables stand for different things."""

    name: str
    template: str
    """Command with ``{n}`` for variable n."""
    size: int
    """Number of variables."""
    constants: tuple[tuple[int, str], ...]
    """Variables that always stand for one thing."""
    before: tuple[Pattern, ...]
    after: tuple[Pattern, ...]
    free: int
    """Free and taken places in the player's hands that it needs, and how many more are free afterwards."""
    used: int
    frees: int


@dataclass(frozen=True, slots=True)
class Ground:
    """A rule with things in the places of its variables."""

    schema: Schema
    binding: tuple[str, ...]
    before: tuple[Fact, ...]
    after: tuple[Fact, ...]


def ground(
    schemas: Sequence[Schema], facts: Iterable[Fact], types: Mapping[str, str]
) -> tuple[list[Ground], set[Fact]]:
    """Return the reachable actions, in a fixed order, and the reachable facts.

    Args:
        schemas: the rules.
        facts: what holds at the start.
        types: the type of each id.
    """
    waiting = deque(sorted(facts))
    queued = set(waiting)
    by_name: defaultdict[str, list[Fact]] = defaultdict(list)
    by_argument: defaultdict[tuple[str, int, str], list[Fact]] = defaultdict(list)
    uses: defaultdict[str, list[tuple[Schema, tuple[Pattern, ...]]]] = defaultdict(list)
    for schema in schemas:
        for first in range(len(schema.before)):
            pattern = schema.before[first]
            uses[pattern.name].append((schema, _plan(schema, first)))
    found: dict[tuple[str, tuple[str, ...]], Ground] = {}

    def matches(pattern: Pattern, binding: list[str | None]) -> Collection[Fact]:
        best: list[Fact] = by_name[pattern.name]
        for place, variable in enumerate(pattern.variables):
            value = binding[variable]
            if value is not None:
                candidates = by_argument[pattern.name, place, value]
                if len(candidates) < len(best):
                    best = candidates
        return best

    while waiting:
        fact = waiting.popleft()
        by_name[fact[0]].append(fact)
        for place, value in enumerate(fact[1:]):
            by_argument[fact[0], place, value].append(fact)
        for schema, plan in uses[fact[0]]:
            binding: list[str | None] = [None] * schema.size
            for variable, value in schema.constants:
                binding[variable] = value
            for bound in _join(plan, 0, binding, (fact,), matches, types):
                if (schema.name, bound) in found:
                    continue
                after = tuple(_instance(pattern, bound) for pattern in schema.after)
                found[schema.name, bound] = Ground(
                    schema, bound, tuple(_instance(pattern, bound) for pattern in schema.before), after
                )
                for new in after:
                    if new not in queued:
                        queued.add(new)
                        waiting.append(new)
    return [found[key] for key in sorted(found)], queued


def _plan(schema: Schema, first: int) -> tuple[Pattern, ...]:
    """Return the preconditions in the order to join them: ``first``, then whichever has most variables bound."""
    rest = [pattern for place, pattern in enumerate(schema.before) if place != first]
    plan = [schema.before[first]]
    bound = {*plan[0].variables, *(variable for variable, _ in schema.constants)}
    while rest:
        best = max(rest, key=lambda pattern: sum(variable in bound for variable in pattern.variables))
        rest.remove(best)
        plan.append(best)
        bound |= set(best.variables)
    return tuple(plan)


def _join(
    plan: Sequence[Pattern],
    depth: int,
    binding: list[str | None],
    candidates: Collection[Fact],
    matches: Callable[[Pattern, list[str | None]], Collection[Fact]],
    types: Mapping[str, str],
) -> Iterator[tuple[str, ...]]:
    """Yield every complete binding under which all patterns of ``plan`` from ``depth`` on match."""
    pattern = plan[depth]
    for fact in candidates:
        if len(fact) != len(pattern.variables) + 1:
            continue
        fresh: list[int] = []
        for variable, allowed, value in zip(pattern.variables, pattern.types, fact[1:], strict=True):
            known = binding[variable]
            if known is None:
                if types[value] not in allowed or value in binding:
                    break
                binding[variable] = value
                fresh.append(variable)
            elif known != value:
                break
        else:
            if depth + 1 < len(plan):
                yield from _join(plan, depth + 1, binding, matches(plan[depth + 1], binding), matches, types)
            else:
                yield tuple(value or "" for value in binding)
        for variable in fresh:
            binding[variable] = None


def _instance(pattern: Pattern, binding: tuple[str, ...]) -> Fact:
    return (pattern.name, *(binding[variable] for variable in pattern.variables))
