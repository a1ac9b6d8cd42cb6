"""What a server is told.

- ``Settings``: which environments it serves, to whom, and how much of everything.
- ``is_loopback``: whether a host name or address is this machine alone.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from ...errors import UsageError
from ...registry import ENV_IDS
from ..pool import usable_cores

DEFAULT_PORT = 8321
REMOTE = "agentropy/Remote-v0"


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine alone.

    >>> [is_loopback(host) for host in ("localhost", "127.0.0.1", "::1", "0.0.0.0", "example.org")]
    [True, True, True, False, False]
    """
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def registered_ids() -> tuple[str, ...]:
    """Return the environments of this package that can be served."""
    return tuple(sorted(set(ENV_IDS) - {REMOTE}))


@dataclass(frozen=True, slots=True)
class Settings:
    """What a server is told. Raises ``UsageError`` where it makes no sense."""

    env_ids: tuple[str, ...] = field(default_factory=registered_ids)
    """Ids that clients may ask for, also as ``module:id``."""
    allowed: frozenset[str] = frozenset()
    """Arguments that clients may set to any text, beside words in those of ``arguments.TEXTS``; ``*`` allows all."""
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    """0 takes any free one."""
    tokens: tuple[str, ...] = ()
    """Bearer tokens, one per client or one for all; needed where ``host`` is not loopback."""
    max_sessions: int = 512
    max_sessions_per_client: int | None = None
    """A client is a token and an address; None lets one have all."""
    max_pools: int = 8
    """Different environments and arguments at one time; each has worker processes of its own."""
    workers: int = field(default_factory=usable_cores)
    """Processes of each pool."""
    idle_seconds: float = 900.0
    """A session without a request for so long is closed, and so is a pool without sessions."""
    step_seconds: float = 120.0
    """A request that a world works on for longer counts as hung; its process is killed."""
    max_body: int = 16 << 20
    """Bytes of a request."""
    body_seconds: float = 30.0
    """How long a request may take to arrive."""

    def __post_init__(self) -> None:
        """Check everything that does not need the network."""
        if not self.env_ids:
            raise UsageError("a server needs at least one environment to serve")
        if REMOTE in self.env_ids:
            raise UsageError(f"{REMOTE} is itself a client of a server: serve the environment that it stands for")
        least = {"max_sessions": 1, "max_pools": 1, "workers": 1, "max_body": 1024, "port": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise UsageError(f"{name} must be at least {bound}, got {getattr(self, name)}")
        if self.max_sessions_per_client is not None and self.max_sessions_per_client < 1:
            raise UsageError(f"max_sessions_per_client must be at least 1, got {self.max_sessions_per_client}")
        if self.port > 65535:
            raise UsageError(f"port must be at most 65535, got {self.port}")
        for name in ("idle_seconds", "step_seconds", "body_seconds"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be positive, got {getattr(self, name)}")
        for token in self.tokens:
            if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
                raise UsageError(
                    "a token is at least 16 printable ASCII characters without spaces; "
                    'make one with: python -c "import secrets; print(secrets.token_urlsafe(32))"'
                )
        if not self.tokens and not is_loopback(self.host):
            raise UsageError(
                f"host {self.host} can be reached from other machines, so a token is needed: "
                "give --token-file, or listen on 127.0.0.1"
            )
