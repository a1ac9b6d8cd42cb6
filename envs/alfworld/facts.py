"""Facts of a world as sorted, indexed, immutable tables, and conjunctive queries over them.

- ``Fact``, ``Signature``: a typed ground atom; the predicate and types that a table holds.
- ``Table``: the rows of one signature, sorted as TextWorld sorts propositions.
- ``Facts``: every table of one state; ``changed`` shares all tables that an action leaves alone.
- ``Query``: a conjunction with the semantics of TextWorld's ``State.all_assignments``.

TextWorld keeps its own set of facts beside the planner's state: an action that deletes an atom adds its ``not_`` form,
and only then does ``not_...`` hold. The grammar reads these facts, so they are kept the same way here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping

Row = tuple[str, ...]
Signature = tuple[str, tuple[str, ...]]
Fact = tuple[Signature, Row]
Placeholder = tuple[str, str]
"""Name and type."""
Binding = dict[Placeholder, str]


class Table:
    """Sorted rows of one signature, with an index per column built on first use."""

    __slots__ = ("_columns", "rows")

    def __init__(self, rows: tuple[Row, ...]) -> None:
        """Hold ``rows``, which must be sorted and distinct."""
        self.rows = rows
        self._columns: dict[int, dict[str, list[Row]]] = {}

    def where(self, column: int, value: str) -> Iterable[Row]:
        """Return the rows with ``value`` in ``column``, in order."""
        index = self._columns.get(column)
        if index is None:
            index = self._columns[column] = {}
            for row in self.rows:
                index.setdefault(row[column], []).append(row)
        return index.get(value, ())

    def with_row(self, row: Row) -> Table:
        """Return this table with ``row`` in it."""
        at = bisect_left(self.rows, row)
        if at < len(self.rows) and self.rows[at] == row:
            return self
        return Table((*self.rows[:at], row, *self.rows[at:]))

    def without_row(self, row: Row) -> Table:
        """Return this table with ``row`` not in it."""
        at = bisect_left(self.rows, row)
        if at == len(self.rows) or self.rows[at] != row:
            return self
        return Table((*self.rows[:at], *self.rows[at + 1 :]))


EMPTY = Table(())


class Facts:
    """The facts of one state."""

    __slots__ = ("tables",)

    def __init__(self, tables: Mapping[Signature, Table]) -> None:
        """Hold ``tables``; use ``Facts.of`` to build them from facts."""
        self.tables = tables

    @classmethod
    def of(cls, facts: Iterable[Fact]) -> Facts:
        """Build the tables of ``facts``."""
        rows: dict[Signature, set[Row]] = {}
        for signature, row in facts:
            rows.setdefault(signature, set()).add(row)
        return cls({signature: Table(tuple(sorted(found))) for signature, found in rows.items()})

    def __contains__(self, fact: Fact) -> bool:
        """Whether ``fact`` holds."""
        signature, row = fact
        rows = self.tables.get(signature, EMPTY).rows
        at = bisect_left(rows, row)
        return at < len(rows) and rows[at] == row

    def changed(self, effects: Iterable[tuple[Fact, bool]]) -> Facts:
        """Return the facts after ``effects``, pairs of an atom and whether it becomes true, applied in order."""
        tables = dict(self.tables)
        for (signature, row), holds in effects:
            added, removed = (signature, negated(signature)) if holds else (negated(signature), signature)
            tables[removed] = tables.get(removed, EMPTY).without_row(row)
            tables[added] = tables.get(added, EMPTY).with_row(row)
        return Facts(tables)


def negated(signature: Signature) -> Signature:
    """Return the signature of TextWorld's ``not_`` form."""
    return ("not_" + signature[0], signature[1])


class Query:
    """A conjunction of predicates over placeholders.

    Distinct placeholders stand for distinct entities. Solutions come in the order of the sorted facts, first predicate
    outermost: the order in which TextWorld lists things.
    """

    __slots__ = ("_atoms",)

    def __init__(self, atoms: Iterable[tuple[tuple[Signature, ...], tuple[Placeholder, ...]]]) -> None:
        """Take, per predicate, the signatures that can match it (its parameters' subtypes) and its placeholders."""
        self._atoms = tuple(atoms)

    @property
    def predicates(self) -> set[str]:
        """The names of the predicates that the query reads."""
        return {signature[0] for signatures, _ in self._atoms for signature in signatures}

    def solutions(self, facts: Facts, binding: Binding) -> Iterator[Binding]:
        """Yield every extension of ``binding`` under which all predicates hold, each a new dict."""
        return self._match(facts, binding, set(binding.values()), 0)

    def _match(self, facts: Facts, binding: Binding, used: set[str], depth: int) -> Iterator[Binding]:
        if depth == len(self._atoms):
            yield dict(binding)
            return
        signatures, placeholders = self._atoms[depth]
        bound = next((at for at, name in enumerate(placeholders) if name in binding), None)
        for signature in signatures:
            table = facts.tables.get(signature)
            if table is None:
                continue
            rows = table.rows if bound is None else table.where(bound, binding[placeholders[bound]])
            for row in rows:
                fresh: list[Placeholder] = []
                for placeholder, value in zip(placeholders, row, strict=True):
                    known = binding.get(placeholder)
                    if known is None:
                        if value in used:
                            break
                        binding[placeholder] = value
                        used.add(value)
                        fresh.append(placeholder)
                    elif known != value:
                        break
                else:
                    yield from self._match(facts, binding, used, depth + 1)
                for placeholder in fresh:
                    used.discard(binding.pop(placeholder))
