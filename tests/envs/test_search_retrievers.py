"""Retrievers: what they find, and the index that processes share."""

import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("bm25s")
pytest.importorskip("Stemmer")

from agentropy.envs.search import bm25 as bm25_module
from agentropy.envs.search.bm25 import BM25Retriever, terms
from agentropy.envs.search.dense import DenseRetriever
from agentropy.envs.search.hybrid import HybridRetriever
from agentropy.envs.search.passages import Corpus, Passage
from agentropy.envs.search.retriever import Hit, Retriever, best, open_retriever
from agentropy.envs.search.sources import Generated, open_source
from agentropy.envs.search.store import cached
from agentropy.errors import MissingDependencyError, UsageError


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Generated().corpus("valid")


@pytest.fixture(scope="module")
def queries() -> list[str]:
    return [question.text for question in Generated().questions("valid").values()]


def titles(hits: list[Hit]) -> list[str]:
    return [hit.passage.title for hit in hits]


def test_bm25_scores_as_the_library_does(corpus, queries):
    import bm25s

    library = bm25s.BM25(method="lucene", k1=1.2, b=0.75, backend="numpy")
    library.index([terms(f"{p.title} {p.text}") for p in corpus.passages], show_progress=False)
    found = BM25Retriever(corpus).search(queries, 10)
    for query, hits in zip(queries, found, strict=True):
        scores = library.get_scores(terms(query))
        assert [hit.score for hit in hits] == pytest.approx(sorted(scores, reverse=True)[: len(hits)], rel=1e-5)
        for hit in hits:
            assert hit.score == pytest.approx(scores[int(hit.passage.id)], rel=1e-5)


def test_every_subject_of_the_world_is_found_first_by_its_name(corpus):
    names = [passage.title for passage in corpus.passages]
    assert [titles(hits) for hits in BM25Retriever(corpus).search(names, 1)] == [[name] for name in names]


def test_bm25_by_hand():
    corpus = Corpus.of([Passage("a", "", "red fox"), Passage("b", "", "red red hen"), Passage("c", "", "blue hen owl")])
    (hits,) = BM25Retriever(corpus).search(["red"], 3)
    # Lucene's idf, ln(1 + (N - n + .5) / (n + .5)), times tf / (tf + k1 (1 - b + b dl / avgdl)).
    idf, average = np.log(1 + 1.5 / 2.5), 8 / 3
    by_hand = {
        "b": idf * 2 / (2 + 1.2 * (0.25 + 0.75 * 3 / average)),
        "a": idf * 1 / (1 + 1.2 * (0.25 + 0.75 * 2 / average)),
    }
    assert {hit.passage.id: hit.score for hit in hits} == pytest.approx(by_hand, rel=1e-5)
    assert [hit.passage.id for hit in hits] == ["b", "a"]


def test_equal_scores_keep_the_order_of_the_corpus():
    corpus = Corpus.of([Passage(str(at), "", "same words") for at in range(300)])
    assert [hit.passage.id for hit in BM25Retriever(corpus).search(["words"], 4)[0]] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("query", ["", "the of", "!?", "zzzunknown", "\ud800", "x" * 100_000])
def test_queries_without_a_known_word_find_nothing(corpus, query):
    assert BM25Retriever(corpus).search([query], 3) == [[]]


def test_a_corpus_without_words_is_searched_in_vain():
    assert BM25Retriever(Corpus.of([Passage("0", "", "!")])).search(["anything"], 3) == [[]]


@settings(max_examples=200)
@given(st.lists(st.integers(0, 30), max_size=2000), st.integers(1, 40))
def test_best_is_a_stable_sort(scores, k):
    array = np.array(scores, np.float32)
    assert best(array, k).tolist() == np.argsort(-array, kind="stable")[:k].tolist()


def test_an_index_is_built_once_and_then_mapped(corpus, monkeypatch, tmp_path):
    monkeypatch.setenv("AGENTROPY_CACHE", str(tmp_path))
    before = BM25Retriever(corpus).search(["Theatre"], 5)
    monkeypatch.setattr(bm25_module, "_build", lambda *arguments: pytest.fail("built again"))
    retriever = BM25Retriever(corpus)
    assert retriever.search(["Theatre"], 5) == before
    assert isinstance(retriever._index.scores.base, np.memmap)


def _open_and_search(folder: str) -> list[str]:
    built = []

    def build(made: Path) -> None:
        built.append(made)
        (made / "content").write_text("whole")

    found = cached("key", build)
    return [str(found), (found / "content").read_text(), str(len(built))]


def test_of_several_processes_one_builds(monkeypatch, tmp_path):
    monkeypatch.setenv("AGENTROPY_CACHE", str(tmp_path))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        results = pool.map(_open_and_search, [str(tmp_path)] * 8)
        pool.close()
        pool.join()
    assert {tuple(result[:2]) for result in results} == {(str(tmp_path / "search" / "key"), "whole")}
    assert sum(int(result[2]) for result in results) == 1


def test_a_build_that_fails_leaves_nothing_and_what_a_killed_one_left_is_removed(monkeypatch, tmp_path):
    monkeypatch.setenv("AGENTROPY_CACHE", str(tmp_path))
    left = tmp_path / "search" / ".key-killed"
    left.mkdir(parents=True)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached("key", fail)
    assert sorted(path.name for path in (tmp_path / "search").iterdir()) == ["key.lock"]
    assert cached("key", lambda folder: None).is_dir()


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AGENTROPY_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="AGENTROPY_CACHE names another"):
        cached("key", lambda folder: None)


class Fixed:
    """A retriever with a fixed answer."""

    def __init__(self, ids: str) -> None:
        self.ids, self.closed = ids, False

    def search(self, queries, k):
        return [[Hit(Passage(id, id, ""), 1.0) for id in self.ids[:k]] for _ in queries]

    def close(self) -> None:
        self.closed = True


def test_hybrid_is_reciprocal_rank_fusion():
    one, other = Fixed("abc"), Fixed("cda")
    hybrid = HybridRetriever([one, other])
    (hits,) = hybrid.search(["q"], 3)
    # Cormack et al. 2009: the sum of 1 / (60 + rank).
    assert {hit.passage.id: hit.score for hit in hits} == pytest.approx(
        {"a": 1 / 61 + 1 / 63, "c": 1 / 63 + 1 / 61, "b": 1 / 62}, abs=1e-12
    )
    assert titles(hits) == ["a", "c", "b"]
    hybrid.close()
    assert one.closed and other.closed


def test_dense_search_is_by_cosine_with_an_encoder_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_letters.py").write_text(
        "import numpy as np\n"
        "class Letters:\n"
        "    name = 'letters-1'\n"
        "    def encode(self, texts, *, query):\n"
        "        return np.array([[t.lower().count(chr(97 + a)) for a in range(26)] for t in texts])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    corpus = Corpus.of(
        [Passage("0", "", "aab"), Passage("1", "", "bbb"), Passage("2", "", "ab"), Passage("3", "", "c")]
    )
    retriever = DenseRetriever(corpus, "my_letters:Letters")
    (hits,) = retriever.search(["aabb"], 3)
    assert [hit.passage.id for hit in hits] == ["2", "0", "1"]
    assert [hit.score for hit in hits] == pytest.approx([1.0, 3 / 10**0.5, 0.5**0.5], rel=1e-5)
    assert retriever.search([], 3) == []


def test_latent_semantic_analysis_finds_a_passage_by_its_own_text(corpus):
    retriever = open_retriever("dense", lambda: corpus)
    own = [f"{passage.title} {passage.text}" for passage in corpus.passages[:50]]
    found = [titles(hits)[0] for hits in retriever.search(own, 1)]
    assert found == [passage.title for passage in corpus.passages[:50]]


def test_latent_semantic_analysis_tells_subjects_apart():
    texts = ["apple pear fruit", "pear plum fruit", "plum apple fruit", "car engine wheel", "engine truck wheel"]
    corpus = Corpus.of(Passage(str(at), "", text) for at, text in enumerate(texts))
    from agentropy.envs.search.lsa import LSAEncoder

    encoder = LSAEncoder(corpus, dimensions=2)
    vectors = encoder.encode(["apple", "plum", "car", "truck", "unknown"], query=True)
    apple, plum, car, truck = vectors[:4] / np.linalg.norm(vectors[:4], axis=1, keepdims=True)
    # "car" and "truck" never occur together; what they occur with does.
    assert apple @ plum > 0.9 and car @ truck > 0.9 and abs(apple @ car) < 0.1
    assert not vectors[4].any()


def test_open_retrievers_are_shared(corpus):
    assert open_retriever("bm25", lambda: corpus) is open_retriever("bm25", lambda: corpus, encoder="unused")
    assert isinstance(open_retriever("hybrid", lambda: corpus), Retriever)


@pytest.mark.parametrize(
    ("spec", "encoder", "message"),
    [
        ("bm52", "lsa", "did you mean 'bm25'"),
        ("dense", "nonsense", "unknown encoder 'nonsense'"),
        ("dense", "no_such_module:Model", "No module named"),
        ("dense", "math:no_such_name", "no_such_name"),
        ("dense", "builtins:dict", "has no name and encode"),
    ],
)
def test_unknown_retrievers_and_encoders_are_named(corpus, spec, encoder, message):
    with pytest.raises(UsageError, match=message):
        open_retriever(spec, lambda: corpus, encoder=encoder)


def test_missing_packages_are_named_with_the_command(corpus, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "Stemmer" else object())
    with pytest.raises(MissingDependencyError, match=r'PyStemmer.*pip install "agentropy\[search\]"'):
        BM25Retriever(corpus)


def test_recall_on_real_questions_stays(shared_data):
    source = open_source("shared", data=shared_data / "search")
    questions = list(source.questions("dev").values())
    retriever = open_retriever("bm25", lambda: source.corpus("dev"))
    found = retriever.search([question.text for question in questions], 5)
    shares = [len({*titles(hits)} & {*q.gold}) / len(q.gold) for q, hits in zip(questions, found, strict=True)]
    assert 0.68 < sum(shares) / len(shares) < 0.78
    # A search by its title brings up nearly every passage, which the expert needs.
    gold = [title for question in questions for title in question.gold]
    seen = [title in titles(hits) for title, hits in zip(gold, retriever.search(gold, 3), strict=True)]
    assert sum(seen) > 0.94 * len(gold)


def test_passages_on_disk_are_those_of_the_file_and_survive_pickling(shared_data):
    corpus = open_source("shared", data=shared_data / "search").corpus("train")
    assert len(corpus.passages) == 30_452
    assert corpus.passages[0].title == "Socialist Revolutionary Party"
    again = pickle.loads(pickle.dumps(corpus))
    assert again.digest == corpus.digest and again.passages[30_451] == corpus.passages[30_451]
    with pytest.raises(IndexError):
        corpus.passages[30_452]
