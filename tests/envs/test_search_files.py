"""Reading the user's own questions and passages."""

import gzip
import json
import lzma

import pytest

from agentropy.envs.search.passages import Corpus, Passage, Question, read_corpus, read_questions
from agentropy.envs.search.sources import open_source
from agentropy.errors import UsageError

PASSAGES = [
    {"id": 7, "title": "Calden", "text": "Calden is a city.", "source": "made up"},
    {"title": "Ister", "text": "The Ister is a river \U0001f600."},
]
QUESTIONS = [
    {"id": "b", "split": "dev", "question": "Where? ", "answer": "Calden", "gold": ["Calden"], "type": "bridge"},
    {"id": "a", "split": "train", "question": "Which?", "golden_answers": ["Ister", "The Ister"]},
]


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        columns = {name for row in rows for name in row}
        parquet.write_table(pyarrow.table({name: [row.get(name) for row in rows] for name in columns}), path)
    else:
        opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
        with opener(path, "wt", encoding="utf-8") as file:
            file.write(text)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz", ".jsonl.gz", ".parquet"])
def test_every_format_gives_the_same(tmp_path, suffix):
    rows = [{**row, "id": str(at)} for at, row in enumerate(PASSAGES)]
    corpus = read_corpus(write(tmp_path / f"passages{suffix}", rows))
    assert list(corpus.passages) == [
        Passage("0", "Calden", "Calden is a city."),
        Passage("1", "Ister", "The Ister is a river \U0001f600."),
    ]
    questions = read_questions(write(tmp_path / f"questions{suffix}", QUESTIONS))
    assert list(questions) == ["train", "dev"]
    assert questions["dev"] == (Question("b", "Where?", ("Calden",), ("Calden",), "bridge"),)
    assert questions["train"] == (Question("a", "Which?", ("Ister", "The Ister")),)


def test_ids_splits_and_numbers_have_defaults(tmp_path):
    corpus = read_corpus(write(tmp_path / "p.jsonl", [{"contents": '"Calden"\nA city.\nOld.'}, {"text": "untitled"}]))
    assert list(corpus.passages) == [Passage("0", "Calden", "A city.\nOld."), Passage("1", "", "untitled")]
    questions = read_questions(write(tmp_path / "q.jsonl", [{"question": "How many?", "answer": 12}]))
    assert questions == {"train": (Question("000000", "How many?", ("12",)),)}


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "p.jsonl", PASSAGES)
    first = read_corpus(path)
    write(path, PASSAGES[:1])
    second = read_corpus(path)
    assert (len(first.passages), len(second.passages)) == (2, 1) and first.digest != second.digest
    write(path, PASSAGES)
    assert read_corpus(path).digest == first.digest


def test_contents_hold_title_and_text():
    passage = Passage("1", 'The "Silent" Orchard', "A novel.\nLong.")
    assert passage.contents == '"The "Silent" Orchard"\nA novel.\nLong.'
    assert Passage.of_contents("1", Passage("1", "Calden", "A city.").contents) == Passage("1", "Calden", "A city.")
    assert Corpus.of([passage]).digest != Corpus.of([Passage("2", passage.title, passage.text)]).digest


@pytest.mark.parametrize(
    ("name", "content", "reader", "message"),
    [
        ("p.jsonl", b'{"title": "x"}\n', read_corpus, r"row 1: a passage has 'title' and 'text'.*\['title'\]"),
        ("p.jsonl", b"", read_corpus, "holds no passages"),
        ("p.jsonl", b"not json\n", read_corpus, "as JSON lines"),
        ("p.jsonl", b"[1]\n", read_corpus, "line 1: expected a JSON object"),
        ("p.jsonl", b"\xff\xfe\n", read_corpus, "as JSON lines"),
        ("p.jsonl.xz", b"not xz", read_corpus, "as JSON lines"),
        ("p.jsonl.gz", b"not gz", read_corpus, "as JSON lines"),
        ("p.parquet", b"not parquet", read_corpus, "cannot read"),
        ("q.jsonl", b"", read_questions, "holds no questions"),
        ("q.jsonl", b'{"question": "Why?"}\n', read_questions, "row 1: a question has 'question' and 'answer'"),
        ("q.jsonl", b'{"question": "Why?", "answers": []}\n', read_questions, "'answer'"),
        (
            "q.jsonl",
            b'{"id": 1, "question": "a", "answer": "b"}\n' * 2,
            read_questions,
            "row 2: the id '1' occurs twice",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, reader, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        reader(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "genreated"}, "did you mean 'generated'"),
        ({"source": "files"}, "needs questions= and passages="),
        ({"source": "files", "questions": "/nowhere/q", "passages": "/nowhere/p"}, "there is no file /nowhere/q"),
        ({"source": "shared", "data": "/nowhere"}, "no folder /nowhere"),
        ({"source": "generated", "data": "/tmp"}, "takes no data; drop it or choose source='shared'"),
        ({"source": "shared", "data": "/tmp", "hops": 2}, "takes no hops; drop it or choose source='generated'"),
    ],
)
def test_sources_that_cannot_be_opened_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        open_source(**options)


def test_shared_data_is_hotpotqa(shared_data):
    source = open_source("shared", data=shared_data / "search")
    assert source.splits == ("train", "dev")
    assert [len(source.questions(split)) for split in source.splits] == [300, 300]
    question = source.questions("train")["5abf63f15542997ec76fd3ea"]
    assert question.answers == ("October 1922",)
    assert question.gold == ("Russian Civil War", "Socialist Revolutionary Party")
    titles = {passage.title for passage in source.corpus("train").passages}
    assert all(set(q.gold) <= titles for split in source.splits for q in source.questions(split).values())
