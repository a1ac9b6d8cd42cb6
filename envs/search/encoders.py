"""What turns texts to vectors.

- ``Encoder``: the protocol that every model follows.
- ``open_encoder``: the encoder for ``"lsa"``, ``"sentence-transformers:MODEL"``, an embedding server's URL, or a
  ``"module:callable"`` of the user's own.

Nothing of a model is imported before one is chosen.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ...errors import MissingDependencyError, UsageError
from .passages import Corpus

_LIBRARY = "sentence-transformers:"


@runtime_checkable
class Encoder(Protocol):
    """Turns texts to vectors that are compared by cosine."""

    name: str
    """Names the model and its version; vectors of passages are kept under it."""

    def encode(self, texts: Sequence[str], *, query: bool) -> np.ndarray:
        """Return one vector for each of ``texts``, [texts, dimensions]; ``query`` tells queries from passages."""
        ...


def open_encoder(spec: str, corpus: Corpus) -> Encoder:
    """Open an encoder.

    Args:
        spec: ``"lsa"`` (latent semantic analysis of the corpus; needs no model), ``"sentence-transformers:NAME"`` (a
            model of that library, by name or folder), ``"http://HOST/v1/embeddings#MODEL"`` (a server with OpenAI's
            embedding protocol), or ``"module:callable"``, which is called without arguments and returns an ``Encoder``.
        corpus: the passages, from which ``lsa`` learns.

    Raises:
        UsageError: there is no such encoder.
        MissingDependencyError: its package is not installed.
    """
    if spec == "lsa":
        from .lsa import LSAEncoder

        return LSAEncoder(corpus)
    if spec.startswith(_LIBRARY):
        return _SentenceEncoder(spec.removeprefix(_LIBRARY))
    if spec.startswith(("http://", "https://")):
        from .http import HttpEncoder

        return HttpEncoder(spec)
    module, _, name = spec.partition(":")
    if not module or not name:
        raise UsageError(
            f"unknown encoder {spec!r}; expected 'lsa', 'sentence-transformers:NAME', "
            "'http://HOST/v1/embeddings#MODEL' or 'module:callable'"
        )
    try:
        encoder = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise UsageError(f"cannot open the encoder {spec!r}: {error}") from error
    if not isinstance(encoder, Encoder):
        raise UsageError(f"the encoder {spec!r} has no name and encode(texts, query=...)")
    return encoder


class _SentenceEncoder:
    """A model of the library sentence-transformers, with its own prompts for queries and passages."""

    def __init__(self, model: str) -> None:
        try:
            import sentence_transformers
        except ImportError as error:
            raise MissingDependencyError(
                f"the encoder {model!r} needs sentence-transformers ({error}); run: pip install sentence-transformers"
            ) from error

        self.name = f"{_LIBRARY}{model}"
        try:
            self._model: Any = sentence_transformers.SentenceTransformer(model)
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot load the sentence-transformers model {model!r}: {error}") from error

    def encode(self, texts: Sequence[str], *, query: bool) -> np.ndarray:
        encode = self._model.encode_query if query else self._model.encode_document
        return encode(list(texts), convert_to_numpy=True, show_progress_bar=False)
