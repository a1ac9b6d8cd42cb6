"""What single tokens say: the texts of a node's tokens, which joined are the text of the node.

- ``Pieces``: of one tokenizer. ``find_pieces``: that of a run.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_UNFINISHED = "\ufffd"
_LONGEST_CHARACTER = 4
"""Bytes of the longest character in UTF-8."""


class Pieces:
    """Splits token ids into texts.

    Byte-level tokens, of which several may make one character, are put together byte by byte; those of all other
    tokenizers are what each token adds to the text of the ones before it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        from tokenizers import decoders

        self._tokenizer = tokenizer
        self._byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._bytes: dict[int, bytes] = {}

    def split(self, tokens: Sequence[int]) -> list[str]:
        """One text a token; joined they are what the tokenizer decodes, special tokens included.

        A character of several tokens stands at its last one, and the others are empty.
        """
        if not tokens:
            return []
        return self._of_bytes(tokens) if self._byte_level else self._of_text(tokens)

    def _of_bytes(self, tokens: Sequence[int]) -> list[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = [decoder.decode(self._bytes_of(token)) for token in tokens]
        pieces[-1] += decoder.decode(b"", final=True)
        return pieces

    def _bytes_of(self, token: int) -> bytes:
        found = self._bytes.get(token)
        if found is None:
            signs = self._tokenizer.id_to_token(token)
            if signs is None:
                found = _UNFINISHED.encode()
            elif all(sign in _BYTES for sign in signs):
                found = bytes(_BYTES[sign] for sign in signs)
            else:  # An added token, which stands as it is.
                found = signs.encode()
            self._bytes[token] = found
        return found

    def _of_text(self, tokens: Sequence[int]) -> list[str]:
        pieces, start, done = [], 0, 0
        for stop in range(1, len(tokens) + 1):
            before = self._decode(tokens[start:done])
            text = self._decode(tokens[start:stop])
            if text.endswith(_UNFINISHED) and stop < len(tokens) and stop - done < _LONGEST_CHARACTER:
                pieces.append("")
                continue
            pieces.append(text[len(before) :])
            start, done = done, stop
        return pieces

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)


def find_pieces(run: Path, model: str | None) -> Pieces | None:
    """The tokenizer of a run: that of its newest checkpoint, else of its model's folder.

    Returns:
        None without such a folder, or where ``tokenizers`` is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    places = sorted((run / "checkpoints").glob("step-*"), reverse=True)
    for folder in [*places, *([Path(model)] if model else [])]:
        path = folder / "tokenizer.json"
        if path.is_file():
            try:
                return Pieces(Tokenizer.from_file(str(path)))
            except Exception:  # tokenizers raises no narrower one; the texts of nodes remain
                continue
    return None


def _byte_signs() -> dict[str, int]:
    """The byte that each sign of a byte-level token stands for (GPT-2, Radford et al. 2019, ``bytes_to_unicode``)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTES = _byte_signs()
