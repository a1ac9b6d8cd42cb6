"""What is known of a server, and one request to it.

- ``Mode``: how contexts are sent.
- ``Asker``: finds out what a server takes, and asks it accordingly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, cast, get_args

import numpy as np

from ...errors import UsageError, nearest
from .base import Completion, Request, SamplingParams, StopReason
from .http_client import BadAnswer, Courier, ServerRefused, reason_of
from .http_dialects import OURS, Dialect, dialect_of
from .http_statistics import Reported, complete
from .http_stream import no_tokens
from .http_text import Chat, Text

Mode = Literal["auto", "tokens", "text", "chat"]

_UNREADABLE = (KeyError, TypeError, ValueError, IndexError, AttributeError)
_WEIGHTS_SECONDS = 1800.0
_OLD_WEIGHTS = 3
"""How often a request is sent again because it was answered with weights older than those that were loaded."""
_TRIAL = Request(np.array([1], np.int32), seed=0, max_tokens=1)
"""What a server is tried with."""


class Asker:
    """One server, and how to speak to it; its coroutines run in the courier's event loop.

    Attributes:
        model: the model's name there.
        about: what ``/v1/models`` says of it.
        ours: whether it is a server of this package.
        mode: how contexts are sent.
        reported: what its log-probabilities are of.
        version: the weights that were loaded last.
    """

    mode: str

    def __init__(self, courier: Courier, tokenizer: Any, entropy_top_k: int, max_positions: int | None) -> None:
        self._courier = courier
        self._tokenizer = tokenizer
        self._entropy_top_k = entropy_top_k
        self._max_positions = max_positions
        self._folder: str | None = None
        self._dialect: Dialect
        self.model = ""
        self.about: Mapping[str, Any] = {}
        self.ours = False
        self.reported = Reported.RAW
        self.version = 0

    async def connect(self, model: str | None, mode: Mode) -> None:
        """Ask what is served, and try how: a few requests of one token.

        Raises:
            UsageError: the model is not served, or no mode works.
        """
        if mode not in get_args(Mode):
            raise UsageError(f"unknown mode '{mode}'{nearest(mode, get_args(Mode))}")
        self.about = await self._look(model)
        self.ours = self.about.get("owned_by") == OURS
        self.version = int(self.about.get("weights_version") or 0)
        positions = self.about.get("max_model_len") or (self.about.get("meta") or {}).get("n_ctx")
        self._max_positions = int(self._max_positions or positions or 2**31)
        await self._choose(mode)
        if self.ours:
            self._courier.prepare = self._restore

    async def ask(self, request: Request, params: SamplingParams) -> Completion:
        """Send one request until it is answered.

        Raises:
            ServerUnavailable, ServerRefused: see ``Courier.send``.
            BadAnswer: the answer is none, or from weights that are older than those that were loaded.
        """
        room = (self._max_positions or 2**31) - len(request.tokens)
        if room <= 0:
            return no_tokens(StopReason.CONTEXT, params, self.version)
        limit, least = min(room, request.max_tokens), self.version
        completion = await self._once(request, params, limit)
        for _ in range(_OLD_WEIGHTS):
            if completion.version >= least or not self.ours:
                break
            await self._courier.until_back("its weights are old")
            completion = await self._once(request, params, limit)
        if self.ours and completion.version < least:
            raise BadAnswer(
                f"{self._courier.url} answers with version {completion.version} of the weights, not {least}: "
                "it was restarted; load the weights again"
            )
        if completion.stop is StopReason.LENGTH and limit < request.max_tokens:
            completion = replace(completion, stop=StopReason.CONTEXT)
        return completion if self.ours else replace(completion, version=self.version)

    def hides(self, params: SamplingParams) -> bool:
        """Whether the server does not tell the log-probabilities that a policy gradient needs; see ``complete``."""
        if self.ours or self.mode != "tokens" or params.temperature == 0:
            return False
        filtered = params.top_k > 0 or params.top_p < 1
        if self.reported is Reported.RAW:
            return params.temperature != 1
        return filtered and self.reported is Reported.PROCESSED

    async def load_folder(self, folder: str, version: int) -> None:
        """Let the server load a folder, now and whenever it was restarted without it."""
        await self._courier.send(
            "POST", "/v1/weights", _naming(folder, version), "application/json", timeout=_WEIGHTS_SECONDS
        )
        self._folder, self.version = folder, version

    async def load_tensors(self, tensors: bytes, version: int) -> None:
        """Send the server tensors in the format of safetensors."""
        path = f"/v1/weights?version={version}"
        await self._courier.send("POST", path, tensors, "application/octet-stream", timeout=_WEIGHTS_SECONDS)
        self._folder, self.version = None, version

    async def release(self) -> None:
        """Let the server forget what it has cached."""
        await self._courier.post("/v1/release", {})

    async def _once(self, request: Request, params: SamplingParams, limit: int) -> Completion:
        dialect, k = self._dialect, params.entropy_top_k or self._entropy_top_k
        told = await self._courier.post(dialect.path, dialect.body(request, params, limit, k))
        try:
            completion = complete(dialect.read(told, request, params), params, self.reported, k)
        except _UNREADABLE as error:
            raise BadAnswer(f"{self._courier.url}{dialect.path} answered with {str(told)[:200]}: {error!r}") from error
        if len(completion.tokens) > limit:
            raise BadAnswer(f"{self._courier.url} answered with {len(completion.tokens)} tokens, not {limit} at most")
        return completion

    async def _look(self, model: str | None) -> dict[str, Any]:
        """What the server says of the model."""
        url = self._courier.url
        try:
            listed = await self._courier.get("/v1/models")
            models = [entry for entry in listed["data"] if isinstance(entry["id"], str)]
        except ServerRefused as error:
            if error.status != 404:
                raise
            models = []
        except _UNREADABLE as error:
            raise BadAnswer(f"{url}/v1/models does not list models: {error!r}") from error
        if model is None and not models:
            raise UsageError(f"{url} lists no models; expected the name of one")
        self.model = model or str(models[0]["id"])
        names = [str(entry["id"]) for entry in models]
        if names and self.model not in names:
            raise UsageError(f"{url} has no model '{model}'{nearest(self.model, names)}")
        return cast("dict[str, Any]", models[names.index(self.model)]) if names else {}

    async def _choose(self, mode: Mode) -> None:
        """Take the first mode in which the server answers a request of one token."""
        candidates: dict[str, Callable[[], Dialect]] = {
            "tokens": lambda: dialect_of(str(self.about.get("owned_by", "")), self.model),
            "text": lambda: Text(self.model, self._tokenizer),
            "chat": lambda: Chat(self.model, self._tokenizer),
        }
        refusals: list[str] = []
        for name in candidates if mode == "auto" else (mode,):
            if name != "tokens" and self._tokenizer is None:
                refusals.append(f"{name}: needs a tokenizer")
                continue
            self._dialect = candidates[name]()
            try:
                await self._once(_TRIAL, SamplingParams(), 1)
                if name == "tokens" and not self.ours:
                    self.reported = await self._find_reported()
            except (ServerRefused, BadAnswer) as error:
                if isinstance(error, ServerRefused) and error.status in (401, 403):
                    raise
                refusals.append(f"{name}: {error}")
                continue
            self.mode = name
            return
        raise UsageError(f"{self._courier.url} cannot be used: {'; '.join(refusals)}")

    async def _find_reported(self) -> Reported:
        """Find out what log-probabilities are of, from how those of one context change.

        Temperature 2 halves the distance of the two most probable tokens where it counts, and a filter that keeps one
        token makes that one certain.
        """
        plain, warm, single = [
            await self._two_best(params)
            for params in (SamplingParams(), SamplingParams(temperature=2.0), SamplingParams(top_k=1))
        ]
        if len(plain) < 2 or len(warm) < 2 or not single:
            return Reported.RAW
        if single[0] > plain[0] + 1e-3:
            return Reported.PROCESSED
        distance = plain[0] - plain[1]
        return Reported.TEMPERED if abs(warm[0] - warm[1] - distance) > 0.25 * distance else Reported.RAW

    async def _two_best(self, params: SamplingParams) -> list[float]:
        dialect = self._dialect
        told = await self._courier.post(dialect.path, dialect.body(_TRIAL, params, 1, 2))
        try:
            answer = dialect.read(told, _TRIAL, params)
        except _UNREADABLE as error:
            raise BadAnswer(f"{self._courier.url}{dialect.path} answered with {str(told)[:200]}: {error!r}") from error
        return sorted(answer.top[0].values(), reverse=True)[:2] if answer.top else []

    async def _restore(self) -> None:
        """Load the folder of the last weights into a server that was restarted without them."""
        if self._folder is None:
            return
        health = await self._courier.once("GET", "/health")
        if health.status_code == 200 and health.json().get("weights_version") != self.version:
            content = _naming(self._folder, self.version)
            answer = await self._courier.once(
                "POST", "/v1/weights", content, "application/json", timeout=_WEIGHTS_SECONDS
            )
            if answer.status_code != 200:
                raise ServerRefused(f"{self._courier.url}/v1/weights", answer.status_code, reason_of(answer))


def _naming(folder: str, version: int) -> bytes:
    return json.dumps({"path": folder, "version": version}).encode()
