"""What server and client send each other: msgpack or JSON, told apart by the content type.

- ``encode``, ``decode``: a value and its bytes; tuples, bytes, numpy values and any dictionary come back as they were.
- ``link``: one more link of the hash over everything that an episode has shown.
- ``problem``: the body of an answer that is an error (RFC 9457), and ``Code``, what went wrong.
- ``dump_generator``, ``load_generator``: the state of a random generator as text.

Both formats hold null, booleans, numbers, texts, lists and dictionaries of texts. Everything else is written as a
dictionary with one key: ``{"$tuple": [...]}``, ``{"$bytes": base64}``, ``{"$dict": [[key, value], ...]}``,
``{"$float": "nan"}``, ``{"$int": decimal}`` and ``{"$array": [dtype, shape, base64]}``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
from enum import StrEnum
from typing import Any

import numpy as np

from ...errors import UsageError

JSON = "application/json"
MSGPACK = "application/msgpack"
BYTES = "application/octet-stream"
PROBLEM = "application/problem+json"
_ALIASES = {"application/x-msgpack": MSGPACK, "application/vnd.msgpack": MSGPACK}
_ATOMS = frozenset({type(None), bool, str})
_GENERATOR = "PCG64"
"""The only kind whose state may come from outside: numpy reads beyond its memory in a wrong state of some others."""
_KINDS = frozenset("biufc")
"""Of numpy arrays that may travel: numbers only, never pickled objects."""


class Code(StrEnum):
    """What went wrong, in the ``code`` of a problem body."""

    USAGE = "usage"
    """The input was wrong: ``UsageError``."""
    MALFORMED = "malformed"
    """The body is none that the server can read."""
    RESET_NEEDED = "reset_needed"
    """No episode is under way: Gymnasium's ``ResetNeeded``."""
    FAILED = "environment_failed"
    """The world broke: ``EnvironmentFailedError``."""
    LOST = "worker_lost"
    """The process that ran the episode died or hung, perhaps through another world's fault."""
    UNKNOWN_SESSION = "unknown_session"
    """The session was never opened here, is closed, or was idle for too long."""
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    BUSY = "busy"
    """The session's last request is not answered yet."""
    STALE = "stale"
    """A later request of the session has been served already."""
    EXISTS = "exists"
    """The session's name is taken by another one."""
    FULL = "full"
    """No room now; ``Retry-After`` says when to ask again."""
    FOREIGN_SNAPSHOT = "foreign_snapshot"
    """The snapshot bears no signature of this server."""
    TOO_LARGE = "too_large"
    TOO_SLOW = "too_slow"
    NOT_FOUND = "not_found"


class WireError(UsageError):
    """The bytes are no message, or the value cannot be sent."""


def form_of(content_type: str | None) -> str | None:
    """Return ``JSON``, ``MSGPACK`` or ``BYTES`` for a content type, None for any other.

    >>> form_of("Application/JSON; charset=utf-8")
    'application/json'
    """
    name = (content_type or "").partition(";")[0].strip().lower()
    name = _ALIASES.get(name, name)
    return name if name in (JSON, MSGPACK, BYTES) else None


def encode(value: Any, form: str) -> bytes:
    """Return ``value`` in a format.

    Raises:
        WireError: something in it is of a type that cannot be sent.
    """
    try:
        plain = _plain(value)
        if form == MSGPACK:
            import msgpack

            packed: bytes = msgpack.packb(plain, unicode_errors="surrogatepass")
            return packed
        return json.dumps(plain, separators=(",", ":"), allow_nan=False).encode()
    except RecursionError as error:
        raise WireError("the value is nested too deeply to be sent") from error


def decode(data: bytes, form: str) -> Any:
    """Return the value of a message.

    Raises:
        WireError: the bytes are none in this format.
    """
    try:
        if form == MSGPACK:
            import msgpack

            return msgpack.unpackb(
                data, object_hook=_tagged, strict_map_key=True, unicode_errors="surrogatepass", use_list=True
            )
        return json.loads(data, object_hook=_tagged)
    except Exception as error:  # of either decoder, and of numpy
        raise WireError(f"not a message in {form}: {type(error).__name__}: {error}"[:200]) from error


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is int:
        return value if -(1 << 63) <= value < 1 << 63 else {"$int": str(value)}
    if kind is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if kind is list:
        return [_plain(item) for item in value]
    if kind is dict:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: _plain(item) for key, item in value.items()}
        return {"$dict": [[_plain(key), _plain(item)] for key, item in value.items()]}
    if kind is tuple:
        return {"$tuple": [_plain(item) for item in value]}
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray) and value.dtype.kind in _KINDS:
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"$array": [value.dtype.str, list(value.shape), data]}
    if isinstance(value, np.generic) and value.dtype.kind in "biufU":
        return _plain(value.item())
    if isinstance(value, str):
        return str.__str__(value)
    raise WireError(f"a {kind.__name__} cannot be sent")


def _tagged(value: dict[str, Any]) -> Any:
    if len(value) != 1:
        return value
    ((key, item),) = value.items()
    match key:
        case "$tuple":
            return tuple(item)
        case "$bytes":
            return base64.b64decode(item, validate=True)
        case "$dict":
            return dict(item)
        case "$float":
            return float(item)
        case "$int":
            return int(item)
        case "$array":
            dtype = np.dtype(str(item[0]))
            if dtype.kind not in _KINDS:
                raise ValueError(f"no array of {dtype} can be sent")
            return np.frombuffer(base64.b64decode(item[2], validate=True), dtype).reshape(item[1]).copy()
    return value


def link(digest: bytes, observation: str, reward: float, terminated: bool, truncated: bool) -> bytes:
    """Return the hash of an episode that had ``digest`` and then showed this."""
    data = observation.encode("utf-8", "surrogatepass") + struct.pack("<d??", reward, terminated, truncated)
    return hashlib.blake2b(digest + data, digest_size=16).digest()


def problem(status: int, code: Code, detail: str) -> bytes:
    """Return the body of an error: a JSON object with ``status``, ``code`` and ``detail``, one sentence for people."""
    title = code.value.replace("_", " ").capitalize()
    return json.dumps({"title": title, "status": status, "code": code.value, "detail": detail}).encode()


def dump_generator(generator: np.random.Generator | None) -> str | None:
    """Return the state of a generator like Gymnasium's as JSON, None for None.

    Raises:
        WireError: it is of another kind.
    """
    if generator is None:
        return None
    state = generator.bit_generator.state
    if state["bit_generator"] != _GENERATOR:
        raise WireError(f"the state of a generator {state['bit_generator']} cannot be sent, only of {_GENERATOR}")
    return json.dumps(state)


def load_generator(text: str) -> np.random.Generator:
    """Return a generator in the state that ``dump_generator`` wrote.

    Raises:
        WireError: it is no such state.
    """
    bits = np.random.PCG64(0)
    try:
        bits.state = json.loads(text)
    except Exception as error:
        raise WireError(f"not the state of a random generator: {type(error).__name__}: {error}"[:200]) from error
    return np.random.Generator(bits)
