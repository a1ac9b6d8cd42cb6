"""A calculator: exact arithmetic on what an agent typed.

- ``calculate``: the value of an expression as text.
- ``CalculatorError``: why there is none; the message is for the agent.

Numbers are fractions as long as they can be, so that 0.1 + 0.2 is 0.3 and 1/3*3 is 1; functions such as ``sqrt`` give
floating-point numbers. Nothing of it is ever evaluated by Python, and sizes are limited before anything is computed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

Number = Fraction | float
_MOST_CHARACTERS, _MOST_DEPTH, _MOST_BITS = 2000, 60, 20_000
_TOKEN = re.compile(r"\s*(?:((?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4})?)|(\*\*|//|[-+*/%^(),!])|(\w+))")
_GROUPED = re.compile(r"(?<![\d.,(])\d{1,3}(?:,\d{3})+(?![\d,])")
_ALIASES = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "[": "(", "]": ")", "{": "(", "}": ")"})
_DIGITS = 12
"""Digits after the point of a result that no decimal number equals."""


class CalculatorError(ValueError):
    """Why an expression has no value."""


def calculate(expression: str) -> str:
    """Return the value of an expression: ``+ - * / // % ** ^ !``, brackets, functions, ``pi`` and ``e``.

    >>> calculate("(48 + 24) * 0.1"), calculate("2^10"), calculate("1/3")
    ('7.2', '1024', '0.333333333333')

    Raises:
        CalculatorError: it has none.
    """
    text = expression.strip().rstrip("=").translate(_ALIASES).replace("$", "")
    if not text:
        raise CalculatorError("there is nothing to calculate")
    if len(text) > _MOST_CHARACTERS:
        raise CalculatorError(f"an expression may have {_MOST_CHARACTERS} characters")
    if not any(letter.isalpha() for letter in text):
        text = _GROUPED.sub(lambda found: found[0].replace(",", ""), text)
    parser = _Parser(_tokens(text))
    try:
        value = parser.sum(0)
        parser.finish()
        return _show(value)
    except ZeroDivisionError:
        raise CalculatorError("division by zero") from None
    except OverflowError:
        raise CalculatorError("the result is too large") from None


def _tokens(text: str) -> list[str]:
    tokens, at = [], 0
    text = text.rstrip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise CalculatorError(f"unexpected {text[at:].strip()[:1]!r}")
        tokens.append(found[1] or found[2] or found[3])
        at = found.end()
    return tokens


class _Parser:
    """Recursive descent; every rule returns a value."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens, self._at = tokens, 0

    def sum(self, depth: int) -> Number:
        if depth > _MOST_DEPTH:
            raise CalculatorError("brackets are nested too deeply")
        value = self._product(depth)
        while (sign := self._peek()) in ("+", "-"):
            self._at += 1
            other = self._product(depth)
            value = _sized(_both(value, other, lambda a, b: a + b if sign == "+" else a - b))
        return value

    def finish(self) -> None:
        if self._at < len(self._tokens):
            raise CalculatorError(f"unexpected {self._tokens[self._at][:20]!r}")

    def _product(self, depth: int) -> Number:
        value = self._signed(depth)
        while (sign := self._peek()) in ("*", "/", "//", "%"):
            self._at += 1
            other = self._signed(depth)
            if sign != "*" and other == 0:
                raise ZeroDivisionError
            value = _sized(_both(value, other, _OPERATIONS[sign]))
        return value

    def _signed(self, depth: int) -> Number:
        negative = False
        while (sign := self._peek()) in ("+", "-"):
            self._at += 1
            negative ^= sign == "-"
        value = self._power(depth)
        return -value if negative else value

    def _power(self, depth: int) -> Number:
        base = self._postfix(depth)
        if self._peek() not in ("**", "^"):
            return base
        self._at += 1
        if depth > _MOST_DEPTH:
            raise CalculatorError("powers are nested too deeply")
        negative = False
        while (sign := self._peek()) in ("+", "-"):
            self._at += 1
            negative ^= sign == "-"
        exponent = self._power(depth + 1)
        return _power(base, -exponent if negative else exponent)

    def _postfix(self, depth: int) -> Number:
        value = self._atom(depth)
        while self._peek() == "!":
            self._at += 1
            value = _factorial(value)
        if self._peek() == "%" and not self._starts_value(self._at + 1):
            self._at += 1
            value = value / 100  # a percentage
        return value

    def _atom(self, depth: int) -> Number:
        token = self._peek()
        if token is None:
            raise CalculatorError("the expression ends too early")
        self._at += 1
        if token[0].isdigit() or token[0] == ".":
            return _sized(Fraction(token))
        if token == "(":
            value = self.sum(depth + 1)
            self._expect(")")
            return value
        name = token.lower()
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        if name in _FUNCTIONS:
            self._expect("(")
            values = [self.sum(depth + 1)]
            while self._peek() == ",":
                self._at += 1
                values.append(self.sum(depth + 1))
            self._expect(")")
            return _apply(name, values)
        if name.isidentifier():
            known = ", ".join([*_FUNCTIONS, *_CONSTANTS])
            raise CalculatorError(f"unknown name {token[:20]!r}; known are {known}")
        raise CalculatorError(f"unexpected {token[:20]!r}")

    def _peek(self) -> str | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _starts_value(self, at: int) -> bool:
        token = self._tokens[at] if at < len(self._tokens) else ")"
        return token == "(" or token[0].isalnum() or token[0] == "."

    def _expect(self, token: str) -> None:
        if self._peek() != token:
            raise CalculatorError(f"expected {token!r}")
        self._at += 1


def _both(left: Number, right: Number, operation: Callable[[Number, Number], Number]) -> Number:
    if isinstance(left, float) or isinstance(right, float):
        return operation(float(left), float(right))
    return operation(left, right)


def _sized(value: Number) -> Number:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise OverflowError
    elif max(value.numerator.bit_length(), value.denominator.bit_length()) > _MOST_BITS:
        raise OverflowError
    return value


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits > 1 and abs(exponent) * bits > _MOST_BITS:
            raise OverflowError
        if abs(exponent) > 10**9:
            exponent = exponent % 2 + 2 if exponent > 0 else -(exponent % 2 + 2)  # of 0, 1 and -1
        return base ** int(exponent)
    result = float(base) ** float(exponent)
    if isinstance(result, complex):
        raise CalculatorError("a negative number has no such power")
    return _sized(_rational(result))


def _rational(value: float) -> Number:
    """Return whole numbers exactly: sqrt(16) is 4."""
    return Fraction(int(value)) if math.isfinite(value) and value == int(value) and abs(value) < 2**53 else value


def _factorial(value: Number) -> Number:
    if isinstance(value, float) or value.denominator != 1 or not 0 <= value <= 1000:
        raise CalculatorError("factorials are of whole numbers from 0 to 1000")
    return Fraction(math.factorial(int(value)))


def _whole(function: Callable[..., int]) -> Callable[..., Number]:
    def wrapped(*values: Number) -> Number:
        if any(value != int(value) for value in values):
            raise CalculatorError("whole numbers are expected")
        return Fraction(function(*map(int, values)))

    return wrapped


def _float(function: Callable[..., float]) -> Callable[..., Number]:
    def wrapped(*values: Number) -> Number:
        return _rational(function(*map(float, values)))

    return wrapped


def _round(value: Number, digits: Number = Fraction(0)) -> Number:
    if not -30 <= digits <= 30 or digits != int(digits):
        raise CalculatorError("digits are whole numbers up to 30")
    return Fraction(round(Fraction(value), int(digits)))


def _square_root(value: Number) -> Number:
    if value < 0:
        raise CalculatorError("a negative number has no square root")
    if isinstance(value, Fraction):
        top, bottom = math.isqrt(value.numerator), math.isqrt(value.denominator)
        if top**2 == value.numerator and bottom**2 == value.denominator:
            return Fraction(top, bottom)
    return _rational(math.sqrt(value))


_OPERATIONS: dict[str, Callable[[Number, Number], Number]] = {
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "//": lambda a, b: Fraction(a // b),
    "%": lambda a, b: a % b,
}
_CONSTANTS: dict[str, Number] = {"pi": math.pi, "e": math.e}
_FUNCTIONS: dict[str, Callable[..., Number]] = {
    "sqrt": _square_root,
    "abs": abs,
    "round": _round,
    "floor": lambda value: Fraction(math.floor(value)),
    "ceil": lambda value: Fraction(math.ceil(value)),
    "min": lambda *values: min(values),
    "max": lambda *values: max(values),
    "sum": lambda *values: sum(values[1:], values[0]),
    "gcd": _whole(math.gcd),
    "lcm": _whole(math.lcm),
    "mod": _whole(lambda value, divisor: value % divisor),
    "log": _float(math.log),
    "ln": _float(math.log),
    "log10": _float(math.log10),
    "log2": _float(math.log2),
    "exp": _float(math.exp),
    "sin": _float(math.sin),
    "cos": _float(math.cos),
    "tan": _float(math.tan),
}


def _apply(name: str, values: list[Number]) -> Number:
    try:
        return _sized(_FUNCTIONS[name](*values))
    except TypeError:
        raise CalculatorError(f"{name} takes another number of values") from None
    except ValueError as error:
        if isinstance(error, CalculatorError):
            raise
        raise CalculatorError(f"{name} has no value here") from None


def _show(value: Number) -> str:
    if isinstance(value, Fraction):
        if value.denominator == 1:
            return _whole_text(value.numerator)
        rest = value.denominator
        for prime in (2, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1 and value.denominator < 10**_DIGITS and abs(value) < 10**15:
            whole = f"{float(value):.{_DIGITS}f}" if value.denominator > 10**6 else _decimal(value)
            return whole.rstrip("0").rstrip(".")
        value = float(value)
    return f"{value:.{_DIGITS}g}"


def _decimal(value: Fraction) -> str:
    """Return a fraction whose denominator has no primes but 2 and 5, exactly."""
    digits = 0
    while (value * 10**digits).denominator != 1:
        digits += 1
    number = abs(int(value * 10**digits))
    text = str(number).zfill(digits + 1)
    return f"{'-' if value < 0 else ''}{text[:-digits]}.{text[-digits:]}"


def _whole_text(value: int) -> str:
    if value.bit_length() > 12_000:
        raise OverflowError
    return str(value)
