"""The web application of the retrieval server.

- ``make_app``: a FastAPI application with ``POST /retrieve`` and ``GET /health``.

The protocol is Search-R1's: ``{"queries": [...], "topk": k, "return_scores": true}`` is answered by ``{"result":
[[{"document": {"id", "contents"}, "score"}, ...], ...]}``, one list for each query; without scores a list holds the
documents themselves.
"""

import hmac
import threading
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from .retriever import Retriever

LONGEST_QUERY = 4096
"""Characters."""


class RetrieveRequest(BaseModel):
    """A request as clients send it."""

    model_config = ConfigDict(strict=True)

    queries: list[Annotated[str, StringConstraints(max_length=LONGEST_QUERY)]] = Field(min_length=1)
    topk: int | None = Field(default=None, ge=1)
    return_scores: bool = False


def make_app(
    retriever: Retriever, *, token: str | None, max_queries: int, max_topk: int, concurrency: int, topk: int = 3
) -> FastAPI:
    """Return the application; see ``server.serve_retriever`` for the limits.

    Args:
        retriever: what searches.
        token: bearer token that clients must send; None asks for none.
        max_queries: most queries of one request (413 above).
        max_topk: most passages for one query (422 above).
        concurrency: most requests at once (503 above).
        topk: passages per query where a request says nothing.
    """
    app = FastAPI(title="agentropy retriever", docs_url=None, redoc_url=None, openapi_url=None)
    free = threading.BoundedSemaphore(concurrency)
    most_bytes = max_queries * (LONGEST_QUERY * 6 + 16) + 1024  # every character may come as \\uXXXX

    def allow(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/retrieve")
    async def retrieve(request: Request) -> dict[str, Any]:
        allow(request)
        if not free.acquire(blocking=False):
            raise HTTPException(503, "too many requests at once", {"Retry-After": "1"})
        try:
            body = bytearray()
            async for part in request.stream():
                body += part
                if len(body) > most_bytes:
                    raise HTTPException(413, f"the request is longer than {most_bytes} bytes")
            try:
                asked = RetrieveRequest.model_validate_json(bytes(body))
            except ValidationError as error:
                first = error.errors(include_url=False, include_context=False, include_input=False)[0]
                where = ".".join(map(str, first["loc"])) or "body"
                raise HTTPException(422, f"{where}: {first['msg']}") from error
            if len(asked.queries) > max_queries:
                raise HTTPException(413, f"at most {max_queries} queries per request, got {len(asked.queries)}")
            k = asked.topk or topk
            if k > max_topk:
                raise HTTPException(422, f"topk can be at most {max_topk}, got {k}")
            found = await run_in_threadpool(retriever.search, asked.queries, k)
        finally:
            free.release()
        rows = []
        for hits in found:
            documents = [{"id": hit.passage.id, "contents": hit.passage.contents} for hit in hits]
            scored = [{"document": d, "score": hit.score} for d, hit in zip(documents, hits, strict=True)]
            rows.append(scored if asked.return_scores else documents)
        return {"result": rows}

    return app
