"""The generated world: its texts state its facts, and its questions have one answer that takes all their passages."""

import re
from collections import Counter

import pytest

from agentropy.envs.search.bm25 import terms
from agentropy.envs.search.facts import MAKERS, Facts, make_facts
from agentropy.envs.search.names import LARGEST_WORLD, SPLITS
from agentropy.envs.search.questions import PHRASES, solve
from agentropy.envs.search.sources import Generated
from agentropy.errors import UsageError

NAME = r"([A-Z]\w*(?: [A-Z]\w*)*)"
TITLE = r"(The [A-Z]\w* [A-Z]\w*(?: (?:of|by) [A-Z]\w*)?)"
YEAR = r"(\d{3,4})"

# How a reader finds each relation in a text; written without looking at how the texts are made.
READ = {
    "person": {
        "born": [rf"[Bb]orn in {YEAR}", rf"[Bb]orn in {NAME} in {YEAR}", rf"born {YEAR} in"],
        "birthplace": [rf"born in \d+ in {NAME}", rf"Born in {NAME} in", rf"born \d+ in {NAME}"],
        "profession": [r"was an? (\w+)"],
        "employer": [rf"worked for {NAME}", rf"in the service of {NAME}", rf"employer was {NAME}"],
        "teacher": [rf"pupil of {NAME}", rf"studied under {NAME}", rf"teacher was {NAME}"],
    },
    "city": {
        "country": [rf"is a city in {NAME} on", rf"lies on the river \w+ in {NAME}"],
        "river": [rf"on the river {NAME}"],
        "founded": [rf"[Ff]ounded in {YEAR}"],
        "product": [r"known for its (\w+)", r"makes (\w+)"],
        "mayor": [rf"mayor is {NAME}", rf"{NAME} is its mayor"],
    },
    "country": {
        "capital": [rf"whose capital is {NAME}", rf"governed from {NAME}, its capital"],
        "currency": [r"pays in the (\w+)", r"currency the (\w+)"],
        "president": [rf"president is {NAME}", rf"president of \w+ is {NAME} and"],
    },
    "river": {
        "length": [r"(\d+) kilometres"],
        "sea": [r"(?:flows into|ends in) the ([A-Z][\w ]+)\."],
    },
    "organisation": {
        "seat": [rf"based in {NAME}", rf"its seat in {NAME}"],
        "founder": [rf"established in \d+ by {NAME}", rf"{NAME} founded"],
        "established": [rf"established in {YEAR}", rf"founded .* in {YEAR}"],
        "head": [rf"head is {NAME}", rf"led by {NAME}"],
    },
    "work": {
        "form": [r"(?:is|,) an? (\w+) (?:of \d+ )?by"],
        "maker": [rf"by {NAME}(?:\.|, appeared)"],
        "year": [rf"of {YEAR} by", rf"appeared in {YEAR}"],
        "patron": [rf"commissioned by {NAME}", rf"{NAME} commissioned it"],
        "setting": [rf"set in {NAME}", rf"takes place in {NAME}"],
    },
}


def read(kind: str, text: str) -> dict[str, str]:
    """Return relation and object of everything that a text says."""
    found = {}
    for relation, patterns in READ[kind].items():
        for pattern in patterns:
            if match := re.search(pattern, text):
                found[relation] = match[match.lastindex]
                break
    return found


def chain(question: str, titles: set[str]) -> tuple[str, list[str]]:
    """Take a question apart: what it starts from, and the relations that lead to its answer."""
    makers = "|".join(MAKERS.values())
    for ends, (_, asked) in PHRASES.items():
        pattern = re.escape(asked).replace(r"\{x\}", "(?P<x>.+)").replace(r"\{maker\}", f"(?:{makers})")
        if match := re.fullmatch(pattern, question):
            relations, phrase = [ends], match["x"]
            break
    else:
        raise AssertionError(question)
    while phrase not in titles:
        start = re.fullmatch(rf"the (?:river|{'|'.join(MAKERS)}) (.+)", phrase)
        if start and start[1] in titles:
            return start[1], relations
        step = re.fullmatch(r"the (\w+) of (.+)", phrase)
        assert step, phrase
        relations.insert(0, "maker" if step[1] in MAKERS.values() else step[1])
        phrase = step[2]
    return phrase, relations


@pytest.fixture(scope="module", params=[0, 7])
def world(request) -> tuple[Facts, Generated]:
    return make_facts(request.param, "train", 400), Generated(seed=request.param)


def test_each_passage_states_every_fact_of_its_subject_and_no_other(world):
    facts, source = world
    passages = source.corpus("train").passages
    assert len(passages) == len({passage.title for passage in passages}) == 400
    for passage in passages:
        told = {key: value for key, value in facts.objects[passage.title].items() if key != "pronoun"}
        assert read(facts.kinds[passage.title], passage.text) == told, passage


def test_every_chain_leads_from_its_words_through_the_texts_to_its_only_answer(world):
    facts, source = world
    passages = {passage.title: passage.text for passage in source.corpus("train").passages}
    triples = [(t, r, o) for t, text in passages.items() for r, o in read(facts.kinds[t], text).items()]
    index: dict[tuple[str, str], set[str]] = {}
    for subject, relation, value in triples:
        index.setdefault((subject, relation), set()).add(value)
    chains = [question for question in source.questions("train").values() if question.kind != "comparison"]
    assert len(chains) > 1500
    for question in chains:
        start, relations = chain(question.text, set(passages))
        reached, path = {start}, []
        for relation in relations:
            path += sorted(reached)
            reached = set().union(*(index.get((subject, relation), set()) for subject in reached))
        assert reached == set(question.answers), question
        assert tuple(path) == question.gold and question.kind == f"{len(path)} hops"


def test_every_comparison_names_who_was_born_first(world):
    facts, source = world
    compared = [question for question in source.questions("train").values() if question.kind == "comparison"]
    assert len(compared) > 200
    for question in compared:
        first, one, second, other = question.gold
        years = {person: int(facts.objects[person]["born"]) for person in (one, other)}
        assert question.answers == (min(years, key=years.__getitem__),) and len(set(years.values())) == 2
        assert one in facts.objects[first].values() and other in facts.objects[second].values()
        assert first in question.text and second in question.text
        assert one not in question.text and other not in question.text


def test_no_passage_can_be_left_out(world):
    facts, source = world
    texts = {passage.title: passage.text for passage in source.corpus("train").passages}
    for question in list(source.questions("train").values())[::10]:
        if question.kind == "comparison":
            continue
        start, relations = chain(question.text, set(texts))
        for left_out in question.gold:
            assert not solve([t for t in facts.triples() if t[0] != left_out], start, relations)
        assert not any(question.answers[0] in texts[title] for title in question.gold[:-1])
        assert not re.search(rf"\b{question.answers[0]}\b", question.text)


def test_questions_are_different_and_of_all_lengths():
    questions = Generated().questions("train")
    assert len({question.text for question in questions.values()}) == len(questions) == 2000
    kinds = Counter(question.kind for question in questions.values())
    assert kinds["2 hops"] == 667 and kinds["3 hops"] == 667 and kinds["4 hops"] + kinds["comparison"] == 666
    assert {q.kind for q in Generated(hops=[3]).questions("valid").values()} == {"3 hops"}


def test_splits_share_no_name_and_no_question():
    source = Generated(world_size=1000)
    names = {split: {w for p in source.corpus(split).passages for w in p.title.split()} for split in SPLITS}
    titles = {split: {p.title for p in source.corpus(split).passages} for split in SPLITS}
    for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert not titles[one] & titles[other]
        # First names, and the words of titles and of kinds of organisations, recur; roots do not.
        assert all(len(name) < 9 or name in {"Academy", "Institute", "Crystal", "Stranger", "Mountain", "Sleeping",
                   "Foundation", "Observatory"} for name in names[one] & names[other])  # fmt: skip
    questions = [q.text for split in SPLITS for q in source.questions(split).values()]
    assert len(set(questions)) == len(questions)


def test_no_two_roots_have_one_stem():
    source = Generated(world_size=LARGEST_WORLD)
    for split in SPLITS:
        titles = [" ".join(terms(passage.title)) for passage in source.corpus(split).passages]
        assert len(set(titles)) == len(titles) == LARGEST_WORLD


def test_the_first_questions_stay_when_more_are_asked_for():
    few, many = (list(Generated({"valid": n}).questions("valid").values()) for n in (20, 60))
    assert few == many[:20]


def test_another_seed_gives_another_world():
    one, other = (Generated(seed=seed) for seed in (0, 1))
    assert one.corpus("train").digest != other.corpus("train").digest
    assert Generated(seed=0).corpus("train").digest == one.corpus("train").digest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_questions": {"trian": 5}}, "did you mean 'train'"),
        ({"num_questions": {"train": 0}}, "at least 1"),
        ({"world_size": 10}, "from 40 to"),
        ({"hops": [1, 2]}, "some of 2, 3, 4"),
        ({"hops": []}, "some of 2, 3, 4"),
        ({"seed": -1}, "not be negative"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        Generated(**options)


def test_a_world_that_has_no_more_questions_says_so():
    source = Generated({"train": 100_000}, world_size=40, hops=[2])
    with pytest.raises(UsageError, match="raise world_size or lower num_questions"):
        source.questions("train")
