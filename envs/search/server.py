"""``agentropy serve retriever``: a corpus behind Search-R1's retrieval protocol.

- ``add_arguments``: the command's options.
- ``main``: run the command.
- ``serve_retriever``: serve a retriever until interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Final

from ...errors import UsageError
from ...extras import require
from ...listening import listen, url_of

if TYPE_CHECKING:
    from .retriever import Retriever

TOKEN: Final = "AGENTROPY_RETRIEVER_TOKEN"
_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to ``parser``."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; another than loopback needs a token")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--passages", metavar="FILE", help="JSON lines (also .gz, .xz) or Parquet, with title and text")
    parser.add_argument("--source", default="generated", help="without --passages: generated or shared")
    parser.add_argument("--data", metavar="FOLDER", help="folder of the source shared")
    parser.add_argument("--split", default="train", help="split whose world is served, of the source generated")
    parser.add_argument("--world-size", type=int, help="passages of the generated world")
    parser.add_argument("--game-seed", type=int, default=0, help="seed of the generated world")
    parser.add_argument("--retriever", default="bm25", help="bm25, dense or hybrid")
    parser.add_argument("--encoder", default="lsa", help="of dense and hybrid: what turns texts to vectors")
    parser.add_argument("--token", help=f"bearer token that clients must send; ${TOKEN} by default")
    parser.add_argument("--max-queries", type=int, default=256, help="queries per request")
    parser.add_argument("--max-topk", type=int, default=100, help="passages per query")
    parser.add_argument("--concurrency", type=int, default=64, help="requests at once; more are turned away with 503")


def main(arguments: argparse.Namespace) -> int:
    """Serve what ``arguments`` say; return the exit status."""
    from .passages import read_corpus
    from .retriever import RETRIEVERS, open_retriever
    from .sources import open_source

    if arguments.retriever not in RETRIEVERS:
        from ...errors import nearest

        raise UsageError(f"unknown retriever {arguments.retriever!r}{nearest(arguments.retriever, RETRIEVERS)}")
    if arguments.passages is not None:
        corpus = read_corpus(arguments.passages)
    else:
        source = open_source(
            arguments.source, data=arguments.data, world_size=arguments.world_size, game_seed=arguments.game_seed
        )
        if arguments.split not in source.splits:
            raise UsageError(f"unknown split {arguments.split!r}; expected one of {', '.join(source.splits)}")
        corpus = source.corpus(arguments.split)
    retriever = open_retriever(arguments.retriever, lambda: corpus, encoder=arguments.encoder)
    serve_retriever(
        retriever,
        host=arguments.host,
        port=arguments.port,
        token=arguments.token,
        max_queries=arguments.max_queries,
        max_topk=arguments.max_topk,
        concurrency=arguments.concurrency,
    )
    return 0


def serve_retriever(
    retriever: Retriever,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    max_queries: int = 256,
    max_topk: int = 100,
    concurrency: int = 64,
) -> None:
    """Serve ``retriever`` until interrupted; the address is printed as soon as it listens.

    Args:
        retriever: what searches; it is called from several threads.
        host: address to listen at.
        port: port to listen at; 0 takes a free one.
        token: what clients must send as ``Authorization: Bearer``; ``$AGENTROPY_RETRIEVER_TOKEN`` by default, and
            where that is empty none is asked for.
        max_queries: most queries of one request.
        max_topk: most passages for one query.
        concurrency: most requests at once; more are answered with status 503, after which our client tries again.

    Raises:
        UsageError: the address cannot be used, or is open to others and there is no token.
        MissingDependencyError: the ``serve`` extra is not installed.
    """
    require("agentropy serve retriever", "serve", ("fastapi", "uvicorn"))
    token = token or os.environ.get(TOKEN) or None
    if token is None and host not in _LOOPBACK:
        raise UsageError(f"{host} can be reached from other machines: give --token or set {TOKEN}")
    import uvicorn

    from .app import make_app

    with listen(host, port) as listener:
        print(f"retriever at {url_of(listener)}/retrieve", file=sys.stderr, flush=True)
        app = make_app(retriever, token=token, max_queries=max_queries, max_topk=max_topk, concurrency=concurrency)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=30)
        uvicorn.Server(config).run(sockets=[listener])
