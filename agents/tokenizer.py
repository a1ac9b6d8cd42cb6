"""Tokenizers made from an environment's own text, for small models trained from random weights.

- ``build_word_tokenizer``: whole words, for worlds that can list every word they use.
- ``build_subword_tokenizer``: pieces of words down to single bytes, for worlds of free text.
- ``is_subword``: which of the two a tokenizer is.
- ``PAD``, ``UNK``, ``BOS``, ``OBS``, ``ACT``, ``END``: its special tokens, whose ids are their order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, UNK, BOS, OBS, ACT, END = SPECIAL_TOKENS = ("<pad>", "<unk>", "<bos>", "<obs>", "<act>", "<end>")

_WORDS = r"\n|[^\W\d_]+ \d+(?!\w|\.\d)|\d+(?:\.\d+)?(?!\w)|[^\W_](?:\w|['-]\w)*|[^\w\s]|_"
"""A newline, a name with its number, a number, a word (inner apostrophes and hyphens included) or a punctuation mark.

``cabinet 12`` is one word because it names one thing: a small model then copies it as one, which it learns far sooner
than to copy a noun and after it the right number.
"""


def build_word_tokenizer(texts: Iterable[str], *, min_count: int = 1) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose vocabulary is the words of ``texts``, in lower case.

    Ids are the special tokens, the newline, then words by falling frequency and alphabetically among equals:
    the same texts in any order give the same tokenizer. A name with its number is one word (``cabinet 12``), and so
    are other numbers and punctuation marks.
    Decoding joins words with one space, which gives back exactly any lower-case command without punctuation.
    Save it with ``save_pretrained`` and load it with ``AutoTokenizer.from_pretrained``.

    Args:
        texts: observations and commands; repeats count as often as they occur.
        min_count: words seen less often become ``<unk>``.
    """
    normalizer = normalizers.Lowercase()
    splitter = pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True)
    counts: Counter[str] = Counter()
    for text, repeats in Counter(texts).items():
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)):
            counts[word] += repeats
    words = sorted((word for word, count in counts.items() if count >= min_count), key=lambda w: (-counts[w], w))
    vocabulary = dict.fromkeys([*SPECIAL_TOKENS, "\n", *words])
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token=UNK))
    backend.normalizer = normalizer
    backend.pre_tokenizer = splitter
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return _wrapped(backend)


def build_subword_tokenizer(texts: Iterable[str], *, vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer (byte-pair encoding, Sennrich et al. 2016) whose pieces are frequent in ``texts``.

    Every text can be written, and decoding gives it back exactly. Digits stand alone, so that numbers are spelt the
    same wherever they occur. The same texts in any order give the same tokenizer.

    Args:
        texts: observations and actions like those that will be read and written.
        vocab_size: at most so many tokens, the special ones and the 256 bytes included.
    """
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(sorted(texts), trainer)
    return _wrapped(backend)


def is_subword(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ``tokenizer`` is one of ``build_subword_tokenizer``, not of ``build_word_tokenizer``."""
    return isinstance(tokenizer.backend_tokenizer.model, BPE)


def _wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[OBS, ACT],
        clean_up_tokenization_spaces=False,
    )
