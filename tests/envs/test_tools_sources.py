"""Tasks: exact, disjoint between splits, the same everywhere; and files of the user's own."""

import gzip
import json
import random
import re
import subprocess
import sys
from datetime import date

import numpy as np
import pytest

from agentropy.envs.tools.files import annotated_calls
from agentropy.envs.tools.generated import KINDS
from agentropy.envs.tools.tasks import NUM_TASKS, SPLITS, open_source
from agentropy.errors import UsageError


def every(source, split, step=1):
    return [source.load(split, task) for task in sorted(source.list(split))[::step]]


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_splits_share_no_question_even_between_seeds(difficulty):
    questions = {split: set() for split in SPLITS}
    for seed in (0, 1):
        source = open_source("generated", difficulty=difficulty, num_tasks={"train": 600}, task_seed=seed)
        for split in SPLITS:
            questions[split] |= {task.question for task in every(source, split)}
    assert not questions["train"] & questions["valid"]
    assert not questions["train"] & questions["test"]
    assert not questions["valid"] & questions["test"]


def test_numbers_of_tasks_and_first_tasks_stay():
    source = open_source("generated")
    assert {split: len(list(source.list(split))) for split in SPLITS} == NUM_TASKS
    fewer = open_source("generated", num_tasks={"train": 20})
    names = list(fewer.list("train"))
    assert len(names) == 20 and [fewer.load("train", name) for name in names] == [
        source.load("train", n) for n in names
    ]


def test_most_questions_are_different():
    tasks = every(open_source("generated"), "train", step=10)
    assert len({task.question for task in tasks}) > 0.97 * len(tasks)


# From this generator: a change of these is a change of everybody's tasks.
GOLDEN = {
    (
        1,
        "numbers/train-000002",
    ): "Numbers: 32, 56, 40, 4, 32, 55, 57, 16, 71, 53, 63, 38. What is the sum of the squares?",
    (
        2,
        "shopping/test-000000",
    ): "Hana buys 15 coins for $27 each and 18 stamps for $5 each, and pays with $540. How many dollars come back?",
    (3, "days/valid-000001"): "Which day of the week is 841 days after 2012-07-06?",
}


@pytest.mark.parametrize(("difficulty", "task"), GOLDEN)
def test_tasks_never_change(difficulty, task):
    split = task.partition("/")[2].partition("-")[0]
    assert open_source("generated", difficulty=difficulty).load(split, task).question == GOLDEN[difficulty, task]


def test_tasks_are_the_same_in_another_process():
    code = (
        "import json\nfrom agentropy.envs.tools.tasks import open_source\n"
        "source = open_source('generated', difficulty=2)\n"
        "print(json.dumps([source.load(s, t).digest for s in ('train', 'test') for t in list(source.list(s))[:60]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    source = open_source("generated", difficulty=2)
    here = [source.load(split, task).digest for split in ("train", "test") for task in list(source.list(split))[:60]]
    assert json.loads(done.stdout) == here


# Each kind's answer, worked out again from the text of the question alone.
def _expression(question):
    return str(eval(question.removeprefix("What is ").rstrip("?")))


def _powers(question):
    base, exponent, modulus = map(int, re.findall(r"\d+", question))
    return str(pow(base, exponent, modulus))


def _sequence(question):
    first, factor, step, modulus, place = map(int, re.findall(r"\d+", question))
    for _ in range(place - 1):
        first = (first * factor + step) % modulus
    return str(first)


def _primes(question):
    low, high = map(int, re.findall(r"\d+", question))
    sieve = [n for n in range(low, high + 1) if n > 1 and all(n % d for d in range(2, n))]
    return str(len(sieve) if question.startswith("How many") else sum(sieve))


def _days(question):
    first, last = (date.fromisoformat(text) for text in re.findall(r"\d{4}-\d\d-\d\d", question))
    return str((last - first).days)


def _travel(question):
    numbers = list(map(int, re.findall(r"\d+", question)))
    return str(sum(a * b for a, b in zip(numbers[::2], numbers[1::2], strict=True)))


@pytest.mark.parametrize("kind", ["expression", "powers", "sequence", "primes", "days", "travel"])
def test_answers_follow_from_the_question(kind):
    solve = globals()[f"_{kind}"]
    for task in every(open_source("generated", kinds=[kind]), "valid", step=4):
        assert task.answer == solve(task.question), task


def test_global_random_state_is_neither_read_nor_written():
    def draw():
        return [task.digest for task in every(open_source("generated"), "valid", step=20)]

    random.seed(1)
    np.random.seed(1)
    state = random.getstate()
    first = draw()
    assert random.getstate() == state
    random.seed(2)
    assert draw() == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "generted"}, "did you mean 'generated'"),
        ({"name": "generated", "difficulty": 4}, "difficulty is 1, 2 or 3"),
        ({"name": "generated", "kinds": ["prims"]}, "did you mean 'primes'"),
        ({"name": "generated", "data": "x"}, "takes no data="),
        ({"name": "generated", "num_tasks": {"dev": 1}}, "unknown split 'dev'"),
        ({"name": "generated", "task_seed": -1}, "task_seed must not be negative"),
        ({"name": "gsm8k"}, "needs data="),
        ({"name": "file", "data": "/nowhere"}, "there is no file or folder /nowhere"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        open_source(**arguments)


ROWS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n), "id": f"sum-{n}"} for n in range(100)]


def write_rows(path, rows):
    text = "\n".join(json.dumps(row) for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.jsonl.gz", "mine.json", "mine.parquet"])
def test_files_of_every_kind(tmp_path, name):
    path = tmp_path / name
    if name.endswith(".json"):
        path.write_text(json.dumps(ROWS))
    elif name.endswith(".parquet"):
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        write_rows(path, ROWS)
    source = open_source("file", path)
    tasks = {task.id: task for split in SPLITS for task in every(source, split)}
    assert len(tasks) == 100 and tasks["sum-7"].answer == "14"
    assert all(list(source.list(split)) for split in SPLITS)


def test_splits_come_from_names_and_fields(tmp_path):
    write_rows(tmp_path / "train.jsonl", ROWS[:10])
    write_rows(tmp_path / "dev.jsonl", ROWS[10:20])
    write_rows(tmp_path / "rest.jsonl", [{**row, "split": "test"} for row in ROWS[20:30]])
    source = open_source("file", tmp_path)
    assert {split: len(list(source.list(split))) for split in SPLITS} == {"train": 10, "valid": 10, "test": 10}


def test_other_field_names_and_several_right_answers(tmp_path):
    write_rows(tmp_path / "q.jsonl", [{"prompt": "Who?", "gold": ["Ada", "Countess Lovelace"]}])
    source = open_source("file", tmp_path, fields={"question": "prompt", "answer": "gold"})
    (split,) = [split for split in SPLITS if list(source.list(split))]
    (task,) = every(source, split)
    assert task.id == "q-000000"
    assert [source.score(split, task, answer) for answer in ("ada", "countess lovelace", "Bob")] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "x"}', "row 1 has no 'answer'; fields= says what it is called"),
        ("{not json}", "is not valid JSON"),
        ("[1]", "line 1 is no JSON object"),
        ('{"question": "x", "answer": "y", "split": "trian"}', "did you mean 'train'"),
        ('{"question": "x", "answer": "y", "id": 1}\n{"question": "z", "answer": "y", "id": 1}', "two rows of train"),
    ],
)
def test_broken_files_are_named(tmp_path, text, message):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(UsageError, match=message):
        open_source("file", tmp_path)


def test_gsm8k_as_published_holds_solution_and_answer(tmp_path):
    solution = "He sold 48/2 = <<48/2=24>>24.\nIn all 48+24 = <<48+24=72>>72.\n#### 72"
    write_rows(tmp_path / "train.jsonl", [{"question": "How many?", "answer": solution}])
    source = open_source("gsm8k", tmp_path)
    (task,) = [task for split in SPLITS for task in every(source, split)]
    assert task.answer == "72" and task.calls == (("calculator", "48/2"), ("calculator", "48+24"))
    assert annotated_calls("none at all") == ()


def test_gsm8k_has_all_its_questions(shared_data):
    source = open_source("gsm8k", shared_data / "math")
    sizes = {split: len(list(source.list(split))) for split in SPLITS}
    assert sum(sizes.values()) == 7473 and sizes["valid"] > 500 and sizes["test"] > 500
    every_question = [task.question for split in SPLITS for task in every(source, split)]
    assert len(set(every_question)) == len(every_question)


def test_reasoning_gym_generates_and_scores():
    pytest.importorskip("reasoning_gym")
    random.seed(3)
    np.random.seed(3)
    state, array = random.getstate(), np.random.get_state()[1].tolist()
    source = open_source("reasoning_gym", kinds=["chain_sum", "gcd"], num_tasks={"train": 12, "valid": 6})
    tasks = {split: every(source, split, step=40 if split == "test" else 1) for split in SPLITS}
    again = open_source("reasoning_gym", kinds=["chain_sum", "gcd"])
    for split, those in tasks.items():
        for task in those:
            assert again.load(split, task.id) == task
            assert source.score(split, task, task.answer) == 1.0
            assert source.score(split, task, "nonsense") < 0.5
    questions = [task.question for those in tasks.values() for task in those]
    assert len(set(questions)) == len(questions)
    assert random.getstate() == state and np.random.get_state()[1].tolist() == array
    with pytest.raises(UsageError, match="did you mean 'chain_sum'"):
        open_source("reasoning_gym", kinds=["chain_sun"])


def test_every_kind_is_among_the_default_tasks():
    kinds = {task.partition("/")[0] for task in open_source("generated").list("valid")}
    assert kinds == set(KINDS)
