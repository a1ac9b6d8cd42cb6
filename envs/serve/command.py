"""``agentropy serve envs``.

- ``add_arguments``: its options. ``main``: serve until a signal ends it.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ...errors import UsageError
from ...extras import require
from ...listening import listen, url_of
from .settings import DEFAULT_PORT, Settings

TOKEN_VARIABLE = "AGENTROPY_TOKEN"
_PACKAGES = ("fastapi", "uvicorn", "msgpack")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``main``; what is left out keeps the default of ``Settings``."""
    add = parser.add_argument
    add("--host", help="address to listen on; 127.0.0.1, this machine alone, when left out")
    add("--port", type=int, help=f"port to listen on, 0 for any free one; {DEFAULT_PORT} when left out")
    add("--env", action="append", metavar="ID", dest="env_ids", help="serve this environment; repeat; all if left out")
    add("--allow", action="append", metavar="NAME", help="let clients set this argument to a text; '*' for every one")
    add("--token-file", metavar="FILE", help=f"bearer tokens, one per line; else ${TOKEN_VARIABLE}, if it is set")
    add("--max-sessions", type=int, metavar="N", help="sessions at one time")
    add("--max-sessions-per-client", type=int, metavar="N", help="the same for one token and address")
    add("--max-pools", type=int, metavar="N", help="different environments and arguments at one time")
    add("--workers", type=int, metavar="N", help="processes for each of these; one per core when left out")
    add("--idle-seconds", type=float, metavar="S", help="close sessions that nobody used for so long")
    add("--step-seconds", type=float, metavar="S", help="a world that works on a request for longer is hung")
    add("--max-body", type=int, metavar="BYTES", help="largest request")


def main(arguments: argparse.Namespace) -> int:
    """Serve environments over HTTP until SIGINT or SIGTERM.

    Raises:
        UsageError: an option is wrong, or the port is taken.
        MissingDependencyError: the ``serve`` extra is not installed.
    """
    require("Serving environments", "serve", _PACKAGES)
    settings = settings_of(arguments)
    from .running import run

    listener = listen(settings.host, settings.port)
    secret = f"{len(settings.tokens)} tokens" if settings.tokens else "no token, this machine alone"
    print(f"serving {', '.join(settings.env_ids)}\non {url_of(listener)} ({secret}); Ctrl-C ends it", flush=True)
    run(settings, listener)
    return 0


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Return the settings that the options ask for."""
    named = {
        name: value
        for name in Settings.__dataclass_fields__
        if name not in ("env_ids", "tokens", "allowed") and (value := getattr(arguments, name, None)) is not None
    }
    if arguments.env_ids:
        named["env_ids"] = tuple(dict.fromkeys(arguments.env_ids))
    return Settings(**named, allowed=frozenset(arguments.allow or ()), tokens=_tokens(arguments.token_file))


def _tokens(file: str | None) -> tuple[str, ...]:
    if file is None:
        token = os.environ.get(TOKEN_VARIABLE, "")
        return (token,) if token else ()
    try:
        lines = Path(file).read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the token file {file}: {error}") from error
    tokens = tuple(line.strip() for line in lines if line.strip())
    if not tokens:
        raise UsageError(f"the token file {file} is empty")
    return tokens
