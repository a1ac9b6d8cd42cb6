"""TextWorld's context-sensitive grammar, parsed by TextWorld once and derived quickly.

- ``Entity``: what a grammar's expressions can read of an object.
- ``Scene``: the facts and entities that a derivation reads.
- ``Grammar``: command templates and feedback rules of every action, and ``derive``.
- ``compile_grammar``: the grammar of a text, memoised: all games share one but for the task sentence.

The stock implementation re-parses every start symbol, template and query with TatSu and deep-copies the symbols. Here
each is compiled once; the derivations are the same character by character.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from textworld.envs.pddl import logic as pddl_logic
from textworld.envs.pddl import textgen
from textworld.logic import Rule, Type, TypeHierarchy

from ...errors import UsageError
from .facts import Binding, Facts, Query

Types = tuple[tuple[str, tuple[str, ...]], ...]
"""PDDL types with their supertypes, in the order of the domain."""
_Expression = Callable[[Mapping[str, "Entity"]], object]


@dataclass(frozen=True, slots=True)
class Entity:
    """An object as the grammar sees it."""

    id: str
    type: str
    name: str
    """Display name, e.g. ``"potato 1"``."""
    definite: str = "the"
    indefinite: str = "a"

    def __str__(self) -> str:
        """The display name: what ``{o}`` becomes in a template."""
        return self.name


@dataclass(frozen=True, slots=True)
class Scene:
    """What a derivation reads."""

    facts: Facts
    entities: Mapping[str, Entity]


@dataclass(frozen=True, slots=True)
class _Terminal:
    text: str

    def derive(self, grammar: Grammar, scene: Scene, binding: Binding, out: list[str]) -> None:
        out.append(self.text)


@dataclass(frozen=True, slots=True)
class _Nonterminal:
    name: str

    def derive(self, grammar: Grammar, scene: Scene, binding: Binding, out: list[str]) -> None:
        for symbol in grammar.expand(self.name, scene, binding):
            symbol.derive(grammar, scene, binding, out)


@dataclass(frozen=True, slots=True)
class _Evaluated:
    expression: _Expression

    def derive(self, grammar: Grammar, scene: Scene, binding: Binding, out: list[str]) -> None:
        variables = {name: scene.entities[value] for (name, _), value in binding.items()}
        out.append(str(self.expression(variables)))


@dataclass(frozen=True, slots=True)
class _Conditional:
    symbol: _Symbol
    query: Query | None

    def bindings(self, scene: Scene, binding: Binding) -> Sequence[Binding]:
        return [binding] if self.query is None else list(self.query.solutions(scene.facts, dict(binding)))

    def derive(self, grammar: Grammar, scene: Scene, binding: Binding, out: list[str]) -> None:
        for solution in self.bindings(scene, binding):
            self.symbol.derive(grammar, scene, solution, out)


@dataclass(frozen=True, slots=True)
class _List:
    items: _Conditional

    def derive(self, grammar: Grammar, scene: Scene, binding: Binding, out: list[str]) -> None:
        solutions = self.items.bindings(scene, binding)
        if not solutions:
            _Nonterminal("list_empty").derive(grammar, scene, binding, out)
        last = len(solutions) - 1
        for at, solution in enumerate(solutions):
            if at:
                separator = "list_last_separator" if at == last else "list_separator"
                _Nonterminal(separator).derive(grammar, scene, binding, out)
            self.items.symbol.derive(grammar, scene, solution, out)


_Symbol = _Terminal | _Nonterminal | _Evaluated | _Conditional | _List
Symbols = tuple[_Symbol, ...]


class Grammar:
    """A compiled grammar."""

    def __init__(self, text: str, types: Types) -> None:
        """Parse ``text`` (a ``.twl2`` file's content) with TextWorld, for a domain with ``types``."""
        self._types = TypeHierarchy()
        for name, supertypes in types:
            if name not in {known.name for known in self._types}:
                self._types.add(Type(name, supertypes))
        actions, grammar = pddl_logic._parse_and_convert(text, rule_name="pddlStart")
        self._rules: dict[str, list[tuple[Query | None, Symbols]]] = {
            name: [(self._query(rule.condition) if rule.condition else None, self._compile(rule.rhs)) for rule in rules]
            for name, rules in grammar._rules.items()
        }
        self.intro = self.parse("#intro#")
        self.templates: dict[str, Symbols] = {name: self.parse(action.template) for name, action in actions.items()}
        self.feedback: dict[str, Symbols] = {name: self.parse(action.feedback_rule) for name, action in actions.items()}

    def parse(self, text: str) -> Symbols:
        """Compile a start text such as ``"#intro#"``."""
        return self._compile(textgen._parse_and_convert(text, rule_name="symbols"))

    def derive(self, symbols: Symbols, scene: Scene, binding: Binding) -> str:
        """Return the text that ``symbols`` derive to in ``scene``."""
        out: list[str] = []
        for symbol in symbols:
            symbol.derive(self, scene, binding, out)
        return "".join(out)

    def expand(self, name: str, scene: Scene, binding: Binding) -> Symbols:
        """Return the right-hand side of the first rule of ``name`` whose condition holds."""
        for condition, symbols in self._rules.get(name, ()):
            if condition is None or next(condition.solutions(scene.facts, dict(binding)), None) is not None:
                return symbols
        raise UsageError(f"the game's grammar has no applicable rule for '#{name}#'")

    def reads(self, symbols: Symbols) -> set[str]:
        """Return the predicates that deriving ``symbols`` can read."""
        seen: set[str] = set()
        found: set[str] = set()
        stack: list[_Symbol] = list(symbols)
        while stack:
            symbol = stack.pop()
            if isinstance(symbol, _List):
                stack += [
                    symbol.items,
                    *map(_Nonterminal, ("list_empty", "list_separator", "list_last_separator")),
                ]
            elif isinstance(symbol, _Conditional):
                stack.append(symbol.symbol)
                found |= symbol.query.predicates if symbol.query else set()
            elif isinstance(symbol, _Nonterminal) and symbol.name not in seen:
                seen.add(symbol.name)
                for condition, rhs in self._rules.get(symbol.name, ()):
                    found |= condition.predicates if condition else set()
                    stack += rhs
        return found

    def _compile(self, symbols: Sequence[textgen.Symbol]) -> Symbols:
        return tuple(self._symbol(symbol) for symbol in symbols)

    def _symbol(self, symbol: textgen.Symbol) -> _Symbol:
        match symbol:
            case textgen.TerminalSymbol():
                return _Terminal(str(symbol))
            case textgen.NonterminalSymbol():
                return _Nonterminal(str(symbol))
            case textgen.EvalSymbol():
                return _Evaluated(_expression(symbol.expression))
            case textgen.ListSymbol():
                return _List(self._conditional(symbol.symbol))
            case textgen.ConditionalSymbol():
                return self._conditional(symbol)
        raise UsageError(f"unknown symbol in the game's grammar: {symbol!r}")

    def _conditional(self, symbol: textgen.ConditionalSymbol) -> _Conditional:
        return _Conditional(self._symbol(symbol.expression), self._query(symbol.given) if symbol.given else None)

    def _query(self, text: str) -> Query:
        atoms = []
        for predicate in Rule.parse_conjunctive_query(text).preconditions:
            types = [self._types.get(name) for name in predicate.signature.types]
            signatures = tuple(
                (predicate.signature.name, tuple(subtype.name for subtype in subtypes))
                for subtypes in self._types.multi_subtypes(types)
            )
            atoms.append((signatures, tuple((parameter.name, parameter.type) for parameter in predicate.parameters)))
        return Query(atoms)


@lru_cache(maxsize=8)
def compile_grammar(text: str, types: Types) -> Grammar:
    """Return the compiled grammar of ``text``; the most recent few are kept."""
    return Grammar(text, types)


def _expression(text: str) -> _Expression:
    """Compile an expression such as ``o.indefinite + ' ' + o.name``.

    Only names, attributes of entities, string constants, ``+`` and ``or`` are understood: a data file never runs code.
    """

    def build(node: ast.expr) -> _Expression:
        match node:
            case ast.Constant(value=value):
                return lambda _: value
            case ast.Name(id=name):
                return lambda variables: variables[name]
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if attribute in Entity.__slots__:
                return lambda variables: getattr(variables[name], attribute)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                first, second = build(left), build(right)
                return lambda variables: first(variables) + second(variables)  # type: ignore[operator]
            case ast.BoolOp(op=ast.Or(), values=values):
                options = [build(value) for value in values]
                return lambda variables: next(
                    (found for option in options if (found := option(variables))), options[-1](variables)
                )
        raise UsageError(f"the game's grammar has an expression that is not supported: {text!r}")

    try:
        return build(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as error:
        raise UsageError(f"the game's grammar has an expression that does not parse: {text!r}") from error
