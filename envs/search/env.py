"""Question answering with a search engine as a Gymnasium environment.

- ``SearchEnv``: questions that take several searches; messages are free text with ``<search>`` and ``<answer>``.
- ``Point``: where an episode is, as its snapshots keep it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ...errors import UsageError, nearest
from ..world import Info, Turn, World
from .messages import INSTRUCTIONS, Answer, Invalid, parse
from .passages import Question
from .retriever import Hit, Retriever, open_retriever
from .rewards import REWARDS, arpo, exact_match, f1
from .sources import open_source

LONGEST_QUERY = 4096
"""Characters of a query that are searched for; servers take no more."""
NOTHING = "Nothing was found."
RIGHT, WRONG = "Correct.", "Wrong."


@dataclass(frozen=True, slots=True)
class Point:
    """Where an episode is."""

    queries: tuple[str, ...] = ()
    found: frozenset[str] = frozenset()
    """Titles of all passages that were read."""
    well_formed: bool = True
    """All messages so far were."""
    answered: bool = False
    won: bool = False
    score: float = 0.0


class SearchEnv(World):
    """Multi-hop question answering: think, search, read, search again, answer.

    The first observation is the question. A message holds one search, ``<search>query</search>``, which is answered by
    the ``k`` best passages, or the final answer, ``<answer>answer</answer>``; a thought in ``<think>…</think>`` may
    come first. Anything else costs a turn and is told how to write. Episodes are truncated after ``max_turns`` turns.

    ``info`` is that of every ``World``, with ``question_id``, ``kind``, ``searches`` (how many so far) and, after the
    answer, ``answers`` (all that are accepted). ``won`` is an exact match, ``score`` the chosen measure.

    >>> env = gym.make("agentropy/Search-v0", k=1).unwrapped
    >>> observation, info = env.reset(seed=0)
    >>> print(observation)
    Question: In which city was the teacher of Irma Loravek born?
    >>> for action in env.expert():
    ...     print(f"> {action}\\n{env.step(action)[0]}")
    > <search>Irma Loravek</search>
    1. Irma Loravek: Irma Loravek (born 1890 in Jorvan) was a surgeon. ... She studied under Rosa Selenfel.
    > <search>Rosa Selenfel</search>
    1. Rosa Selenfel: Born in Galandan in 1857, Rosa Selenfel was an architect ...
    > <answer>Galandan</answer>
    Correct.
    """

    has_expert = True
    free_text = True
    instructions = INSTRUCTIONS

    def __init__(
        self,
        split: str = "train",
        source: str = "generated",
        *,
        questions: str | os.PathLike[str] | None = None,
        passages: str | os.PathLike[str] | None = None,
        data: str | os.PathLike[str] | None = None,
        num_questions: Mapping[str, int] | None = None,
        world_size: int | None = None,
        hops: int | Sequence[int] | None = None,
        game_seed: int = 0,
        retriever: str | Retriever = "bm25",
        encoder: str = "lsa",
        k: int = 3,
        max_passage: int = 1500,
        max_turns: int = 8,
        reward: str = "em",
        reward_scale: float = 1.0,
        format_reward: float = 0.0,
        invalid_penalty: float = 0.0,
        expert_info: bool = False,
        render_mode: str | None = None,
    ) -> None:
        """Open questions, passages and a retriever.

        Args:
            split: the one that ``reset`` draws from: ``"train"``, ``"valid"`` or ``"test"`` of the generated worlds;
                those of the file otherwise.
            source: ``"generated"`` (worlds of linked facts), ``"shared"`` (HotpotQA questions with Wikipedia passages,
                from a folder) or ``"files"``.
            questions: file of questions, of ``source="files"``: JSON lines (plain, .gz or .xz) or Parquet.
            passages: file of passages, of ``source="files"``.
            data: folder of ``source="shared"``.
            num_questions: generated questions per split, such as ``{"train": 500}``; a split left out keeps its 2,000
                (train) or 200. The first ones stay the same whatever their number.
            world_size: passages of each generated world, 400 by default.
            hops: how many passages a generated question takes: some of 2, 3 and 4.
            game_seed: another number, not negative, generates other worlds.
            retriever: ``"bm25"``, ``"dense"``, ``"hybrid"``, the URL of a retrieval server, or a ``Retriever``.
            encoder: of the dense and hybrid retrievers; see ``encoders.open_encoder``.
            k: passages that a search shows, at least 1.
            max_passage: characters of a passage that are shown.
            max_turns: turns before truncation, at least 1.
            reward: of the answer: ``"em"`` (exact match), ``"f1"`` (token F1) or ``"arpo"`` (ARPO, Eq. 8: F1 where
                every message was well formed, else -1, which an episode without an answer gets too).
            reward_scale: multiplies that.
            format_reward: added to the answer's reward where every message was well formed: at most one thought, then
                one search or answer, and nothing else.
            invalid_penalty: taken from the reward of a turn that neither searched nor answered.
            expert_info: put the expert's next action in ``info``.
            render_mode: ``"ansi"``, ``"human"`` (prints) or None.

        Raises:
            UsageError: an argument is none of these, or a file cannot be read.
            MissingDependencyError: the ``search`` extra is not installed.
        """
        self._source = open_source(
            source,
            questions=questions,
            passages=passages,
            data=data,
            num_questions=num_questions,
            world_size=world_size,
            hops=hops,
            game_seed=game_seed,
        )
        self.splits = self._source.splits
        super().__init__(split, max_turns=max_turns, expert_info=expert_info, render_mode=render_mode)
        if reward not in REWARDS:
            raise UsageError(f"unknown reward {reward!r}{nearest(reward, REWARDS)}")
        if k < 1 or max_passage < 1:
            raise UsageError(f"k and max_passage must be at least 1, got {k} and {max_passage}")
        self.reward = reward
        self.reward_scale = reward_scale
        self.format_reward = format_reward
        self.invalid_penalty = invalid_penalty
        self.k = k
        self.max_passage = max_passage
        self._retriever = retriever
        self._encoder = encoder
        self._opened: dict[str, Retriever] = {}
        self._own: list[Retriever] = []
        """Those that no other environment uses, to be closed with this one."""
        self._point = Point()
        self._question: Question
        self._open(split)

    def close(self) -> None:
        """Close the connection to a server, if there is one."""
        for retriever in self._own:
            retriever.close()

    def corpus(self, tasks: int = 48) -> tuple[str, ...]:
        """Return the instructions, passages and questions of the training split, and the expert's messages."""
        from .expert import demonstration

        split = self.splits[0]
        questions = self._source.questions(split)
        passages = self._source.corpus(split).passages
        chosen = [questions[id] for id in self.tasks(split)]
        texts = [self.instructions]
        for question in chosen[:: max(1, len(chosen) // (8 * tasks))][: 8 * tasks]:
            texts += [self._first(question), *demonstration(question)]
        for at in range(0, len(passages), max(self.k, len(passages) // (8 * tasks))):
            texts.append(self._show([Hit(passage, 0.0) for passage in passages[at : at + self.k]]))
        return tuple(dict.fromkeys([*texts, NOTHING, RIGHT, WRONG]))

    def _list(self, split: str) -> Iterable[str]:
        return self._source.questions(split)

    def _begin(self, split: str, task: str) -> str:
        self._question = self._source.questions(split)[task]
        self._searcher = self._open(split)
        self._point = Point()
        return self._first(self._question)

    def _act(self, action: str) -> Turn:
        message = parse(action)
        if isinstance(message, Invalid):
            self._point = replace(self._point, well_formed=False)
            return Turn(message.feedback, self._unanswered() - self.invalid_penalty, invalid=True)
        self._point = replace(self._point, well_formed=self._point.well_formed and message.well_formed)
        if isinstance(message, Answer):
            return self._answer(message.text)
        query = message.query[:LONGEST_QUERY]
        hits = self._searcher.search([query], self.k)[0]
        self._point = replace(
            self._point,
            queries=(*self._point.queries, query),
            found=self._point.found | {hit.passage.title for hit in hits},
        )
        return Turn(self._show(hits), self._unanswered())

    def _answer(self, text: str) -> Turn:
        won = exact_match(text, self._question.answers)
        accuracy = float(won) if self.reward == "em" else f1(text, self._question.answers)
        well_formed = self._point.well_formed
        self._point = replace(self._point, answered=True, won=won, score=accuracy)
        tools = {"search"} if self._point.queries else set()
        paid = arpo(accuracy, well_formed, tools) if self.reward == "arpo" else accuracy
        reward = self.reward_scale * paid + self.format_reward * well_formed
        return Turn(RIGHT if won else WRONG, reward, over=True)

    def _unanswered(self) -> float:
        """What ARPO's rule takes on the last turn, since an episode without an answer has not the right form."""
        last = self._turn + 1 >= self.max_turns
        return self.reward_scale * arpo(0.0, False, ()) if last and self.reward == "arpo" else 0.0

    def _report(self) -> Info:
        point, question = self._point, self._question
        info: Info = {
            "goal": question.text,
            "won": point.won,
            "score": point.score,
            "question_id": question.id,
            "kind": question.kind,
            "searches": len(point.queries),
        }
        if point.answered:
            info["answers"] = list(question.answers)
        return info

    def _identity(self, split: str, task: str) -> str:
        return f"{self._source.questions(split)[task].digest()}-{self._source.corpus(split).digest}"

    def _save(self) -> Point:
        return self._point

    def _load(self, split: str, task: str, state: Point) -> None:
        self._begin(split, task)
        self._point = state

    def _expert_action(self) -> str | None:
        from .expert import next_action

        return next_action(self._question, self._point.queries, self._point.found)

    def _first(self, question: Question) -> str:
        return f"Question: {question.text}"

    def _show(self, hits: Sequence[Hit]) -> str:
        lines = []
        for rank, hit in enumerate(hits, 1):
            title, text = hit.passage.title, hit.passage.text
            text = text if len(text) <= self.max_passage else text[: self.max_passage] + "…"
            lines.append(f"{rank}. {title}: {text}" if title else f"{rank}. {text}")
        return "\n".join(lines) or NOTHING

    def _open(self, split: str) -> Retriever:
        if split not in self._opened:
            given = self._retriever
            if not isinstance(given, str):
                self._opened[split] = given
            else:
                opened = open_retriever(given, lambda: self._source.corpus(split), encoder=self._encoder)
                self._opened[split] = opened
                if given.startswith("http"):
                    self._own.append(opened)
        return self._opened[split]
