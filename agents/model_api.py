"""OpenAI's protocol for one model, as a FastAPI application.

- ``create_app``: what ``ModelServer`` runs.

======  =========================  ==============================================================================
GET     ``/v1/models``             the model, with ``vocab_size``, ``max_model_len`` and ``weights_version``
POST    ``/v1/completions``        ``prompt`` as text, token ids, or a list of either
POST    ``/v1/chat/completions``   ``messages``, rendered by the tokenizer's chat template
POST    ``/v1/weights``            ``{"path": ..., "version": n}``, or a safetensors body with ``?version=n``
POST    ``/v1/release``            forget what is cached
GET     ``/health``                for anybody; the version and how many requests run
======  =========================  ==============================================================================

Beside OpenAI's options: ``top_k``, ``stop_token_ids``, ``ignore_eos``, ``include_stop_str_in_output``,
``return_token_ids``, ``return_tokens_as_token_ids`` and ``skip_special_tokens`` as vLLM has them; ``entropy_top_k``.
With ``return_token_ids`` an answer has a field ``agentropy`` with the weights' version, why it stopped, and all
statistics of its tokens. ``logprobs`` are those of the sampled tokens under softmax(logits), without others.
With ``stream`` the whole answer is one event. Errors have OpenAI's form.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..errors import AgentropyError, UsageError
from .engines.base import Completion, Engine, SamplingParams
from .engines.base import Request as Asked
from .model_batching import Batcher
from .model_protocol import Chat, Prompted, ServedModel, Weights, answer, read

_MAX_BODY = 64 << 20
_CLIENT_GONE = 499
_JSON = "application/json"


def create_app(model: ServedModel, *, api_key: str | None, updates: bool) -> FastAPI:
    """Return the application.

    Args:
        model: what is served.
        api_key: bearer token that every request but ``/health`` must have.
        updates: whether the weights may be changed.
    """
    app = FastAPI(title="agentropy model server", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(HTTPException)
    async def answer_http_error(_: Request, error: HTTPException) -> Response:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(UsageError)
    async def answer_usage_error(_: Request, error: UsageError) -> Response:
        return _error(400, str(error))

    @app.exception_handler(AgentropyError)
    async def answer_failure(_: Request, error: AgentropyError) -> Response:
        return _error(500, str(error))

    @app.exception_handler(ClientDisconnect)
    async def answer_nobody(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=_CLIENT_GONE)

    @app.exception_handler(Exception)
    async def answer_fault(_: Request, error: Exception) -> Response:
        return _error(500, f"{type(error).__name__}: {error}")

    def let_in(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if api_key is not None and not hmac.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
            raise HTTPException(401, "the API key is missing or wrong")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "weights_version": model.version, "running": model.batcher.running}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        let_in(request)
        return {"object": "list", "data": [model.about()]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        let_in(request)
        options = read(Prompted, await _body(request))
        _check_name(model, options.model)
        if options.echo or options.suffix or (options.best_of or 1) != 1:
            raise UsageError("echo, suffix and best_of are not supported here; leave them out")
        params = model.sampling(options, chat=False)
        seed, most = options.seed, options.max_tokens or 16
        asked = [model.request(tokens, seed, most) for tokens in model.prompts(options.prompt)]
        done = await _generate(request, model.batcher, asked, params)
        if done is None:
            return Response(status_code=_CLIENT_GONE)
        choices = []
        for index, completion in enumerate(done):
            choice = model.choice(completion, options, params) | {"index": index, "logprobs": None}
            if options.logprobs is not None:
                choice["logprobs"] = model.logprobs(completion, options.return_tokens_as_token_ids)
            choices.append(choice)
        text, kind = answer(model, "cmpl", "text_completion", choices, asked, done, options)
        return Response(text, media_type=kind)

    @app.post("/v1/chat/completions")
    async def chats(request: Request) -> Response:
        let_in(request)
        options = read(Chat, await _body(request))
        _check_name(model, options.model)
        params = model.sampling(options, chat=True)
        most = options.max_completion_tokens or options.max_tokens
        asked = [model.request(model.conversation(options.messages), options.seed, most)]
        done = await _generate(request, model.batcher, asked, params)
        if done is None:
            return Response(status_code=_CLIENT_GONE)
        choice = model.choice(done[0], options, params) | {"index": 0, "logprobs": None}
        message = {"role": "assistant", "content": choice.pop("text")}
        choice["delta" if options.stream else "message"] = message
        if options.logprobs:
            choice["logprobs"] = model.chat_logprobs(done[0], options.return_tokens_as_token_ids)
        kind = "chat.completion.chunk" if options.stream else "chat.completion"
        text, kind = answer(model, "chatcmpl", kind, [choice], asked, done, options)
        return Response(text, media_type=kind)

    @app.post("/v1/weights")
    async def weights(request: Request) -> dict[str, Any]:
        let_in(request)
        if not updates:
            raise HTTPException(403, "weights can be changed over the loopback interface or with an API key only")
        if request.headers.get("content-type", "").startswith(_JSON):
            told = read(Weights, await _body(request))
            await _load(model, [*_shards(told.path)], told.version)
        else:
            version = request.query_params.get("version", "")
            if not version.isdecimal():
                raise UsageError("a body of safetensors needs ?version=n, n >= 0")
            with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
                async for part in request.stream():
                    file.write(part)
                file.flush()
                await _load(model, [Path(file.name)], int(version))
        return {"weights_version": model.version}

    @app.post("/v1/release")
    async def release(request: Request) -> dict[str, Any]:
        let_in(request)
        await asyncio.wrap_future(model.batcher.update(lambda engine: engine.release()))
        return {}

    return app


async def _body(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > _MAX_BODY:
            raise HTTPException(413, f"a request has at most {_MAX_BODY} bytes")
        parts.append(part)
    return b"".join(parts)


def _check_name(model: ServedModel, name: str | None) -> None:
    if name not in (None, "", model.name):
        raise HTTPException(404, f"the model '{name}' does not exist; this server has '{model.name}'")


async def _generate(
    request: Request, batcher: Batcher, asked: Sequence[Asked], params: SamplingParams
) -> list[Completion] | None:
    """Generate for all of them; None, and nothing generated any more, when the client goes away."""
    futures: list[Future[Completion]] = [batcher.submit(one, params) for one in asked]
    answers = [asyncio.wrap_future(future) for future in futures]
    gone = asyncio.ensure_future(_gone(request))
    waiting: set[asyncio.Future[Any]] = set(answers)
    try:
        while waiting:
            ended, _ = await asyncio.wait(waiting | {gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone in ended:
                return None
            waiting -= ended
            for done in ended:
                done.result()  # raises the first failure
        return [one.result() for one in answers]
    finally:
        gone.cancel()
        for future, one in zip(futures, answers, strict=True):
            future.cancel()
            if one.done() and not one.cancelled():
                one.exception()  # heard, lest asyncio complain of those that came after the first


async def _gone(request: Request) -> None:
    """Return when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _shards(path: str) -> list[Path]:
    """The weights in a folder as ``save_pretrained`` writes them; a checkpoint's other tensors are not among them."""
    folder = Path(path)
    shards = sorted(folder.glob("model*.safetensors")) if folder.is_dir() else []
    if not shards:
        raise UsageError(f"{path} holds no model*.safetensors on this machine")
    return shards


async def _load(model: ServedModel, files: Sequence[Path], version: int) -> None:
    """Load tensors into the engine when what runs has ended."""

    def work(engine: Engine) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        except SafetensorError as error:
            raise UsageError(f"these are no tensors in the format of safetensors: {error}") from error
        engine.load_weights(tensors, version)
        model.version = version

    await asyncio.wrap_future(model.batcher.update(work))


def _error(status: int, message: str) -> Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": status}
    return Response(json.dumps({"error": error}), status, media_type=_JSON)
