"""Tokenizers depend on the text alone and give commands back exactly."""

import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from agentropy.agents.tokenizer import SPECIAL_TOKENS, build_subword_tokenizer, build_word_tokenizer, is_subword

TEXTS = [
    "You are in the middle of a room. Looking quickly around you, you see a cabinet 12, and a fridge 1.",
    "Your task is to: put a hot potato in fridge.",
    "You open the fridge 1. The fridge 1 is open. In it, you see nothing.",
    "go to cabinet 12",
    "go to fridge 1",
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_word_tokenizer(TEXTS)


def words(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


def test_special_tokens_come_first_and_the_newline_after_them(tokenizer):
    assert tokenizer.convert_ids_to_tokens(range(7)) == [*SPECIAL_TOKENS, "\n"]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert tokenizer.eos_token == "<end>"


def test_vocabulary_is_ordered_by_frequency_then_alphabet():
    tokenizer = build_word_tokenizer(["b b a", "c a b", "d"])
    assert tokenizer.convert_ids_to_tokens(range(7, len(tokenizer))) == ["b", "a", "c", "d"]
    assert len(build_word_tokenizer(["b b a", "c a b", "d"], min_count=2)) == 9


def test_order_of_texts_does_not_matter(tokenizer):
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    assert build_word_tokenizer(shuffled).get_vocab() == tokenizer.get_vocab()


def test_a_name_with_its_number_is_one_word(tokenizer):
    ids = tokenizer("go to cabinet 12")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["go", "to", "cabinet 12"]
    assert tokenizer.decode(ids) == "go to cabinet 12"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("wait 1.5 s", ["wait", "1.5", "s"]),
        ("lane 1.5.", ["lane", "1.5", "."]),
        ("room 2.", ["room 2", "."]),
        ("the 3rd room 4th", ["the", "3rd", "room", "4th"]),
        ("room  7\n8", ["room", "7", "\n", "8"]),
        ("t-shirt 2", ["t-shirt", "2"]),
        ("cell_3 4", ["cell_3", "4"]),
    ],
)
def test_only_a_plain_name_and_a_whole_number_with_one_space_between_are_joined(text, parts):
    assert words(build_word_tokenizer([text]), text) == parts


def test_text_is_lower_cased_and_punctuation_splits(tokenizer):
    assert words(tokenizer, "You see:  a cabinet 12.\n\nFridge") == [
        *("you", "see", ":", "a", "cabinet 12", "."),
        *("\n", "\n", "fridge"),
    ]


@given(st.lists(st.sampled_from(["go", "to", "open", "put", "potato", "cabinet 12", "fridge 1"]), min_size=1))
def test_decoding_undoes_encoding_of_commands_made_of_known_words(tokenizer, parts):
    command = " ".join(parts)
    ids = tokenizer(command)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == parts
    assert tokenizer.decode(ids) == command


@given(st.lists(st.from_regex(r"[a-z0-9]+", fullmatch=True), min_size=1))
def test_a_tokenizer_gives_back_any_command_that_it_was_made_of(parts):
    command = " ".join(parts)
    tokenizer = build_word_tokenizer([command])
    assert tokenizer.decode(tokenizer(command)["input_ids"]) == command


def test_inner_hyphens_and_apostrophes_stay_inside_a_word():
    tokenizer = build_word_tokenizer(["take t-shirt", "don't look in/on agent_1"])
    assert words(tokenizer, "don't take t-shirt in/on agent_1") == [
        *("don't", "take", "t-shirt", "in", "/", "on", "agent_1")
    ]


def test_unknown_words_become_unk(tokenizer):
    assert words(tokenizer, "go to spaceship 99") == ["go", "to", "<unk>"]


def test_a_known_name_with_an_unknown_number_is_unknown(tokenizer):
    assert words(tokenizer, "go to cabinet 13") == ["go", "to", "<unk>"]


def test_a_saved_tokenizer_loads_as_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<bos> You open the cabinet 12.\nxyz <act> go to fridge 1 <end>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode(again("go to fridge 1")["input_ids"]) == "go to fridge 1"
    assert (again.pad_token, again.bos_token, again.eos_token) == ("<pad>", "<bos>", "<end>")


SAID = [
    "<search>the capital of Æthelmere</search>",
    "print(12 * 7)\n\tx = 'é'",
    "search the capital",
    "the capital 12",
] * 3
PIECES = build_subword_tokenizer(SAID, vocab_size=400)


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_pieces_give_every_text_back(text):
    assert PIECES.decode(PIECES(text)["input_ids"]) == text


def test_pieces_are_what_is_frequent_and_numbers_are_spelt():
    ids = PIECES("the capital 12")["input_ids"]
    assert [PIECES.decode([index]) for index in ids] == ["the", " capital", " ", "1", "2"]
    assert len(PIECES) <= 400 and is_subword(PIECES) and not is_subword(build_word_tokenizer(TEXTS))


def test_pieces_do_not_depend_on_the_order_of_texts_or_the_process():
    shuffled = random.Random(0).sample(SAID, len(SAID))
    assert build_subword_tokenizer(shuffled, vocab_size=400).get_vocab() == PIECES.get_vocab()
    code = (
        "from agentropy.agents.tokenizer import build_subword_tokenizer as build;"
        f"print(sorted(build({SAID!r}, vocab_size=400).get_vocab().items()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(sorted(PIECES.get_vocab().items()))


def test_a_saved_tokenizer_of_pieces_is_one_again(tmp_path):
    PIECES.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert is_subword(loaded) and loaded("<search>x</search>")["input_ids"] == PIECES("<search>x</search>")["input_ids"]
