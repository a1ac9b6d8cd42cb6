"""How well and how fast every retriever finds the passages that a question takes.

``python -m agentropy.benchmarks.retrieval`` asks the shared questions (HotpotQA, with Wikipedia passages) word for
word, in one search each, prints a table and writes JSON. Each retriever runs in a process of its own with an empty
cache.

- *recall at k*: the share of a question's gold passages among the first k, by title; *all*: of the questions whose gold
  passages are all there. What is missing takes a second search, which is what the environment is about.
- *queries/s*: one after the other, as an environment asks, and in batches, as a server may; the fastest of several
  passes, since a busy neighbour only makes it slower. The JSON has them all.
- *build*: making the index; *open*: opening it again. *memory*: what the process holds for itself after all queries,
  without the pages of mapped files, which processes share. *load*: of the machine when a row began.

The libraries bm25s and tantivy are measured as they come, for comparison.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..envs.search.bm25 import terms
from ..envs.search.passages import Corpus, Question, read_corpus, read_questions
from ..envs.search.retriever import open_retriever
from ..errors import UsageError
from .machine import describe_machine, summary

DEPTHS = (1, 3, 5, 10)
BATCH = 32
PASSES = 7
PASS_SECONDS = 10.0
"""After which no further pass over the questions starts."""
Titles = list[list[str]]
Search = Callable[[Sequence[str], int], Titles]
"""Queries and k to the titles found."""


def ours(spec: str, encoder: str, corpus: Corpus, folder: Path) -> Search:
    """A retriever of this package."""
    retriever = open_retriever(spec, lambda: corpus, encoder=encoder)

    def search(queries: Sequence[str], k: int) -> Titles:
        return [[hit.passage.title for hit in hits] for hits in retriever.search(queries, k)]

    return search


def bm25s_library(backend: str, corpus: Corpus, folder: Path) -> Search:
    """bm25s as its users call it, over the same stems."""
    import bm25s

    if (folder / "params.index.json").exists():
        model = bm25s.BM25.load(folder, mmap=True)
        model.backend = backend
    else:
        model = bm25s.BM25(method="lucene", k1=1.2, b=0.75, backend=backend)
        documents = [terms(f"{passage.title} {passage.text}") for passage in corpus.passages]
        model.index(documents, show_progress=False)
        model.save(folder)

    def search(queries: Sequence[str], k: int) -> Titles:
        found = model.retrieve([terms(query) for query in queries], k=k, show_progress=False).documents
        return [[corpus.passages[int(at)].title for at in row] for row in found]

    return search


def tantivy_library(corpus: Corpus, folder: Path) -> Search:
    """tantivy with its English stemmer, its index on disk."""
    import tantivy

    builder = tantivy.SchemaBuilder()
    builder.add_unsigned_field("at", stored=True)
    builder.add_text_field("body", stored=False, tokenizer_name="en_stem")
    new = not any(folder.iterdir())
    index = tantivy.Index(builder.build(), path=str(folder))
    if new:
        writer = index.writer(num_threads=1)
        for at, passage in enumerate(corpus.passages):
            writer.add_document(tantivy.Document(at=at, body=f"{passage.title} {passage.text}"))
        writer.commit()
        writer.wait_merging_threads()
        index.reload()
    searcher = index.searcher()

    def search(queries: Sequence[str], k: int) -> Titles:
        found = []
        for query in queries:  # in lower case, since AND, OR and IN are syntax
            parsed = index.parse_query(" ".join(re.findall(r"\w+", query.lower())), ["body"])
            hits = searcher.search(parsed, k).hits
            found.append([corpus.passages[searcher.doc(address)["at"][0]].title for _, address in hits])
        return found

    return search


def variants(encoders: Sequence[str]) -> dict[str, Callable[[Corpus, Path], Search]]:
    """Every retriever that can run here, by its name in the table."""
    found: dict[str, Callable[[Corpus, Path], Search]] = {"bm25": functools.partial(ours, "bm25", "")}
    for encoder in encoders:
        found[f"dense, {encoder}"] = functools.partial(ours, "dense", encoder)
        found[f"hybrid, {encoder}"] = functools.partial(ours, "hybrid", encoder)
    if find_spec("numba"):
        found["bm25s library, numba"] = functools.partial(bm25s_library, "numba")
    found["bm25s library, numpy"] = functools.partial(bm25s_library, "numpy")
    if find_spec("tantivy"):
        found["tantivy library"] = tantivy_library
    return found


def measure(make: Callable[[Corpus, Path], Search], passages: str, questions: Sequence[Question]) -> dict[str, Any]:
    """Build, open again, ask; in this process, whose cache is empty."""
    corpus = read_corpus(passages)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["AGENTROPY_CACHE"] = scratch
        folder = Path(scratch) / "library"
        folder.mkdir()
        before, start = _own_memory(), time.perf_counter()
        make(corpus, folder)
        build = time.perf_counter() - start
        disk = sum(file.stat().st_size for file in Path(scratch).rglob("*") if file.is_file())
        with _process() as again:
            rest = again.submit(_ask, make, corpus, folder, scratch, questions).result()
        return {"build_seconds": build, "disk_mb": disk / 1e6, "build_memory_mb": _own_memory() - before, **rest}


def _ask(
    make: Callable[[Corpus, Path], Search], corpus: Corpus, folder: Path, cache: str, questions: Sequence[Question]
) -> dict[str, Any]:
    os.environ["AGENTROPY_CACHE"] = cache
    before, start = _own_memory(), time.perf_counter()
    search = make(corpus, folder)
    opened = time.perf_counter() - start
    return {"open_seconds": opened, **ask(search, questions), "memory_mb": _own_memory() - before}


def ask(search: Search, questions: Sequence[Question]) -> dict[str, Any]:
    """Ask all questions, one by one and in batches; return recall and speed."""
    texts = [question.text for question in questions]
    found = [titles for text in texts for titles in search([text], DEPTHS[-1])]

    def one_by_one() -> None:
        for text in texts:
            search([text], DEPTHS[-1])

    def batched() -> None:
        for at in range(0, len(texts), BATCH):
            search(texts[at : at + BATCH], DEPTHS[-1])

    single, many = _rates(one_by_one, len(texts)), _rates(batched, len(texts))
    return {
        "queries_per_second": max(single),
        "batched_queries_per_second": max(many),
        "passes": {"queries_per_second": single, "batched_queries_per_second": many},
        **recall(found, questions),
    }


def _rates(run: Callable[[], None], queries: int) -> list[float]:
    """Return queries per second of some passes; fewer where they are slow."""
    rates: list[float] = []
    end = time.perf_counter() + PASS_SECONDS
    while len(rates) < 2 or (len(rates) < PASSES and time.perf_counter() < end):
        start = time.perf_counter()
        run()
        rates.append(queries / (time.perf_counter() - start))
    return rates


def recall(found: Titles, questions: Sequence[Question]) -> dict[str, dict[str, float]]:
    """Return recall and the share of questions with all gold passages, at each depth."""
    shares: dict[str, dict[str, float]] = {"recall": {}, "all_gold": {}}
    for k in DEPTHS:
        hits = [
            len({*titles[:k]} & {*question.gold}) / len(question.gold)
            for titles, question in zip(found, questions, strict=True)
        ]
        shares["recall"][str(k)] = sum(hits) / len(hits)
        shares["all_gold"][str(k)] = sum(hit == 1 for hit in hits) / len(hits)
    return shares


def measure_http(passages: str, questions: Sequence[Question]) -> dict[str, Any]:
    """Our server with BM25 in a process of its own, asked over the loopback."""
    start = time.perf_counter()
    with server(passages) as url:
        opened = time.perf_counter() - start
        return {"open_seconds": opened, **ask(ours(url, "", Corpus.of(()), Path()), questions)}


@contextmanager
def server(passages: str) -> Iterator[str]:
    """Run ``agentropy serve retriever`` on a free port; give its URL."""
    code = (
        "import argparse; from agentropy.envs.search.server import add_arguments, main\n"
        "parser = argparse.ArgumentParser(); add_arguments(parser); main(parser.parse_args())"
    )
    command = [sys.executable, "-c", code, "--port", "0", "--passages", passages]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            if "http://" not in line:
                raise UsageError(f"the server did not start: {line}{process.stderr.read()}")
            yield line.split()[-1]
        finally:
            process.terminate()


def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def _own_memory() -> float:
    """Megabytes of this process that no file backs."""
    found = re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1e3 if found else float("nan")


def _earlier(file: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the figures of ``file``, where they are of the same questions and passages."""
    if not file.exists():
        return {}
    report = json.loads(file.read_text())
    return report["retrievers"] if report["settings"] == settings else {}


def table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """The figures of every retriever."""
    shown = Table(title="Retrieval", box=box.SIMPLE_HEAD)
    shown.add_column("")
    headings = [f"recall@{k}" for k in DEPTHS]
    headings += ["all@3", "queries/s", "batched", "build s", "open s", "disk MB", "MB", "load"]
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        cells = [f"{row['recall'][str(k)]:.3f}" for k in DEPTHS] + [f"{row['all_gold']['3']:.3f}"]
        cells += [f"{row['queries_per_second']:,.0f}", f"{row['batched_queries_per_second']:,.0f}"]
        rest = {"build_seconds": 1, "open_seconds": 2, "disk_mb": 1, "memory_mb": 0, "load_average": 1}
        for figure, digits in rest.items():
            cells.append(f"{row[figure]:,.{digits}f}" if figure in row else "")
        shown.add_row(name, *cells)
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m agentropy.benchmarks.retrieval", description=main.__doc__)
    parser.add_argument("--data", help="folder with questions.jsonl.xz and passages.jsonl.xz")
    parser.add_argument("--questions", type=int, help="ask only the first so many")
    parser.add_argument("--encoder", action="append", help="of dense and hybrid; lsa by default; may be repeated")
    parser.add_argument(
        "--only", action="append", help="measure only retrievers whose name starts so, and keep the other figures"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "retrieval.json")
    options = parser.parse_args(arguments)

    shared = os.environ.get("AGENTROPY_SHARED_DATA")
    root = Path(shared) if shared else Path(__file__).parents[2] / "shared" / "data"
    folder = Path(options.data) if options.data else root / "search"
    passages = str(folder / "passages.jsonl.xz")
    questions = [q for split in read_questions(folder / "questions.jsonl.xz").values() for q in split]
    questions = questions[: options.questions]
    read_corpus(passages)  # unpacked once, before anything is timed

    machine = describe_machine(["bm25s", "numba", "PyStemmer", "tantivy", "httpx", "fastapi", "uvicorn"])
    settings = {"questions": len(questions), "passages": len(read_corpus(passages).passages), "batch": BATCH}
    console, rows = Console(), _earlier(options.out, settings) if options.only else {}
    wanted = tuple(options.only or [""])
    for name, make in variants(options.encoder or ["lsa"]).items():
        if name.startswith(wanted):
            with _process() as process:
                load = os.getloadavg()[0]
                rows[name] = {**process.submit(measure, make, passages, questions).result(), "load_average": load}
            Console(stderr=True).print(f"{name} measured", style="dim")
    if "http, bm25".startswith(wanted):
        load = os.getloadavg()[0]
        rows["http, bm25"] = {**measure_http(passages, questions), "load_average": load}
    console.print(table(rows))
    console.print(
        f"{len(questions)} questions, {len(read_corpus(passages).passages):,} passages; batches of {BATCH}; "
        f"all@3: questions with all gold passages among three\n{summary(machine)}",
        highlight=False,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine, "settings": settings, "retrievers": rows}, indent=2) + "\n")
    console.print(f"figures and machine in {options.out}", highlight=False)


if __name__ == "__main__":
    main()
