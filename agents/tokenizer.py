"""A word-level tokenizer made from an environment's own text, for small models trained from random weights.

- ``build_word_tokenizer``: the vocabulary and the ``transformers`` tokenizer around it.
- ``PAD``, ``UNK``, ``BOS``, ``OBS``, ``ACT``, ``END``: its special tokens, whose ids are their order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

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
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[OBS, ACT],
        clean_up_tokenization_spaces=False,
    )
