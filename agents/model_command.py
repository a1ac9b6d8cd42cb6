"""``agentropy serve model``.

- ``add_arguments``: its options. ``main``: serve until a signal ends it.
"""

from __future__ import annotations

import argparse
import os

from ..extras import require

TOKEN_VARIABLE = "AGENTROPY_TOKEN"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``main``."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a checkpoint's folder, or any causal model of transformers")
    add("--host", default="127.0.0.1", help="address to listen on; 127.0.0.1, this machine alone, when left out")
    add("--port", type=int, default=8000, help="port to listen on, 0 for any free one; 8000 when left out")
    add("--name", help="what clients call the model; the folder's name when left out")
    add("--device", default="cpu", help="where to compute, such as cuda; cpu when left out")
    add("--dtype", default="float32", help="float32, bfloat16 or float16; float32 when left out")
    add("--max-batch", type=int, default=128, metavar="N", help="requests that run at once; 128 when left out")


def main(arguments: argparse.Namespace) -> int:
    """Serve a model with OpenAI's protocol until SIGINT or SIGTERM; clients need ``$AGENTROPY_TOKEN`` if it is set.

    Raises:
        UsageError: there is no such model, or the port is taken.
        MissingDependencyError: the ``train`` or ``serve`` extra is not installed.
    """
    require("serving a model", "train,serve", ("torch", "transformers", "fastapi", "uvicorn"))
    from .model_server import serve_folder

    serve_folder(
        arguments.model,
        arguments.host,
        arguments.port,
        name=arguments.name,
        device=arguments.device,
        dtype=arguments.dtype,
        max_batch=arguments.max_batch,
        api_key=os.environ.get(TOKEN_VARIABLE) or None,
    )
    return 0
