"""The texts of a node's tokens, joined, are what its tokenizer decodes, whatever a token is to it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from agentropy.agents.tokenizer import ACT, END, build_subword_tokenizer, build_word_tokenizer
from agentropy.algorithms.view.pieces import Pieces, find_pieces

TEXTS = ["go to desk 1", "take the mug", "naïve façade 長い文 😀", "put the mug on desk 1.\n"]
SUBWORD = build_subword_tokenizer(TEXTS, vocab_size=320).backend_tokenizer
WORD = build_word_tokenizer(TEXTS).backend_tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2's: words with a mark for the space before them, and single bytes for the rest."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁go", "▁to", "▁", "mug", "</s>"]
    tokenizer = Tokenizer(
        models.BPE({word: n for n, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


FALLBACK = byte_fallback()


def decoded(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False)


@given(st.lists(st.integers(0, SUBWORD.get_vocab_size() - 1)))
def test_byte_level_tokens_in_any_order_join_to_what_is_decoded(tokens: list[int]) -> None:
    pieces = Pieces(SUBWORD).split(tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == decoded(SUBWORD, tokens)


@given(st.lists(st.integers(0, WORD.get_vocab_size() - 1)))
def test_words_in_any_order_join_to_what_is_decoded(tokens: list[int]) -> None:
    pieces = Pieces(WORD).split(tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == decoded(WORD, tokens)


@given(st.text(alphabet="go tm長é😀"))
def test_a_text_in_bytes_and_words_joins_to_what_is_decoded(text: str) -> None:
    tokens = FALLBACK.encode(text, add_special_tokens=False).ids
    assert "".join(Pieces(FALLBACK).split(tokens)) == decoded(FALLBACK, tokens)


@pytest.mark.parametrize(
    ("tokenizer", "signs"),
    # 長 is E9 95 B7; GPT-2 writes these bytes as é, ķ and ·.
    [(SUBWORD, ("é", "ķ", "·")), (FALLBACK, ("<0xE9>", "<0x95>", "<0xB7>"))],
    ids=["byte level", "byte fallback"],
)
def test_a_character_of_several_tokens_stands_at_its_last_one(tokenizer: Tokenizer, signs: tuple[str, ...]) -> None:
    tokens = [tokenizer.token_to_id(sign) for sign in signs]
    assert Pieces(tokenizer).split(tokens) == ["", "", "長"]
    assert Pieces(tokenizer).split(tokens[:2])[-1].startswith("\ufffd"), "cut short, it is no character"


def test_markers_stand_as_they_are() -> None:
    ids = [SUBWORD.token_to_id(ACT), *SUBWORD.encode("go to", add_special_tokens=False).ids, SUBWORD.token_to_id(END)]
    pieces = Pieces(SUBWORD).split(ids)
    assert pieces[0] == ACT and pieces[-1] == END and "".join(pieces[1:-1]) == "go to"
    ids = [*WORD.encode("take the mug", add_special_tokens=False).ids, WORD.token_to_id(END)]
    assert Pieces(WORD).split(ids) == ["take", " the", " mug", " <end>"]


def test_an_id_that_the_tokenizer_does_not_know_is_one_strange_sign() -> None:
    assert Pieces(SUBWORD).split([10**6]) == ["\ufffd"]
    assert Pieces(SUBWORD).split([]) == Pieces(WORD).split([]) == []


def test_the_tokenizer_is_that_of_the_newest_checkpoint_then_that_of_the_model(tmp_path: Path) -> None:
    run, model = tmp_path / "run", tmp_path / "model"
    assert find_pieces(run, None) is None and find_pieces(run, str(model)) is None
    model.mkdir()
    SUBWORD.save(str(model / "tokenizer.json"))
    found = find_pieces(run, str(model))
    assert found is not None and found.split([10]) == [decoded(SUBWORD, [10])]
    for step in (0, 5, 12):
        (run / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    WORD.save(str(run / "checkpoints" / "step-000005" / "tokenizer.json"))
    (run / "checkpoints" / "step-000012" / "tokenizer.json").write_text("{")
    found = find_pieces(run, str(model))
    assert found is not None and found.split([10]) == [decoded(WORD, [10])]
