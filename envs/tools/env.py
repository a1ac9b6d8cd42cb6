"""Tool use as an environment.

- ``ToolsEnv``: questions that are answered with Python, a calculator, search, functions and MCP servers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import UsageError, nearest
from ..world import Info, Turn, World
from .answers import same_answer
from .builtin import CalculatorTool, PythonTool, Retriever, SearchTool
from .formats import FORMATS, Answer, Call, Mistake, describe_tools, parse, write_answer, write_call, write_results
from .interpreters import describe_sandboxes, make_interpreter
from .mcp_client import MCPServer, open_server
from .protocol import FunctionTool, Tool, ToolError, check_name
from .tasks import SPLITS, Task, TaskSource, open_source

BUILT_IN = ("python", "calculator", "search")
_GOAL_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class _Progress:
    """What an episode has come to, beside the state of its tools."""

    calls: int = 0
    errors: int = 0
    mistakes: int = 0
    answer: str | None = None
    score: float = 0.0
    solved: int = 0
    """How many calls of the reference solution have been made, one after the other."""
    result: str = ""
    """What the last of them returned."""


class ToolsEnv(World):
    """A question, tools to find its answer with, and a reward for the right one.

    The first observation is the question. An action calls tools, and the next observation holds what they return; or
    it answers, which ends the episode. ``instructions`` lists the tools. A call that fails, or text that is no call,
    is answered by a message and costs a turn; ``invalid`` is set where an action held no call that could be made. The
    reward is ``reward_scale`` times the score of the answer, less ``format_penalty`` where ``invalid``.

    ``info`` is that of every ``World``, with ``tool_calls``, ``tool_errors`` (calls that failed), ``format_errors``
    (actions that could not be read), ``answer`` and ``sandbox``, what confines the interpreter.

    >>> env = gym.make("agentropy/Tools-v0")
    >>> print(env.reset(options={"task": "numbers/train-000002"})[0])
    Numbers: 32, 56, 40, 4, 32, 55, 57, 16, 71, 53, 63, 38. What is the sum of the squares?
    >>> print(env.step("<python>sum(n * n for n in [32, 56, 40, 4, 32, 55, 57, 16, 71, 53, 63, 38])</python>")[0])
    <result>
    26593
    </result>
    >>> observation, reward, terminated, truncated, info = env.step("<answer>26593</answer>")
    >>> print(observation, reward, terminated)
    The answer is right. 1.0 True
    >>> env.close()
    """

    splits = SPLITS
    has_expert = True
    free_text = True

    def __init__(
        self,
        split: str = "train",
        source: str = "generated",
        data: str | os.PathLike[str] | None = None,
        *,
        tools: Sequence[str | Tool | Callable[..., Any]] = ("python", "calculator"),
        mcp: Sequence[MCPServer] = (),
        retriever: Retriever | str = "bm25",
        corpus: str | os.PathLike[str] | None = None,
        passages: int = 3,
        format: str = "tagged",
        interpreter: str = "monty",
        time_limit: float = 2.0,
        memory_mb: int = 64,
        max_output: int = 2000,
        difficulty: int = 1,
        kinds: Sequence[str] | None = None,
        num_tasks: Mapping[str, int] | None = None,
        task_seed: int = 0,
        fields: Mapping[str, str] | None = None,
        max_turns: int = 10,
        reward_scale: float = 1.0,
        format_penalty: float = 0.0,
        expert_info: bool = False,
        render_mode: str | None = None,
    ) -> None:
        """Open the tasks and the tools; no interpreter is started before it is called.

        Args:
            split: ``"train"``, ``"valid"`` or ``"test"``; ``reset`` draws from it.
            source: ``"generated"``, ``"gsm8k"``, ``"reasoning_gym"`` or ``"file"``.
            data: where the files of ``gsm8k`` and ``file`` lie (JSON lines or Parquet).
            tools: ``"python"``, ``"calculator"``, ``"search"``, functions with type hints, or ``Tool`` objects. A
                function runs in this process and should not remember anything.
            mcp: servers whose tools are added.
            retriever: what ``"search"`` asks: a ``Retriever``, or the name or URL of one of the search environment's.
            corpus: the file of passages that a named one searches; by default the search environment's embedded one.
            passages: how many passages a search shows.
            format: ``"tagged"`` or ``"json"``.
            interpreter: ``"monty"`` or ``"cpython"``; see ``describe_sandboxes``.
            time_limit: seconds per call of Python.
            memory_mb: MiB that Python code may take.
            max_output: characters that a tool may return; more are cut.
            difficulty: of generated tasks, 1 to 3.
            kinds: of generated tasks, or data sets of reasoning-gym; all, or some simple ones, by default.
            num_tasks: generated tasks per split, such as ``{"train": 50_000}``.
            task_seed: another number, not negative, generates other tasks.
            fields: what ``question``, ``answer``, ``id``, ``split`` and ``solution`` are called in the files.
            max_turns: turns before truncation, at least 1.
            reward_scale: the reward of the right answer.
            format_penalty: taken from the reward of a turn whose action held no call that could be made.
            expert_info: put the expert's next action in ``info``.
            render_mode: ``"ansi"``, ``"human"`` (prints) or None.

        Raises:
            UsageError: an argument is none of these.
            MissingDependencyError: a package that the arguments need is not installed.
        """
        super().__init__(
            split, max_turns=max_turns, max_action=1 << 17, expert_info=expert_info, render_mode=render_mode
        )
        if format not in FORMATS:
            raise UsageError(f"unknown format {format!r}{nearest(format, FORMATS)}")
        self._format = format
        self._max_output = max_output
        self.reward_scale, self.format_penalty = reward_scale, format_penalty
        self._source: TaskSource = open_source(
            source, data, difficulty=difficulty, kinds=kinds, num_tasks=num_tasks, task_seed=task_seed, fields=fields
        )
        if not self.tasks():
            raise UsageError(f"split {split!r} has no tasks")
        self.sandbox: str | None = None
        """What confines the interpreter; None without one."""
        self._tools: dict[str, Tool] = {}
        try:
            for item in tools:
                if item == "python":
                    limits = {"time_limit": time_limit, "memory_mb": memory_mb, "max_output": max_output}
                    self._add(PythonTool(make_interpreter(interpreter, **limits)))  # type: ignore[arg-type]
                    self.sandbox = next(str(one) for one in describe_sandboxes() if one.interpreter == interpreter)
                elif item == "calculator":
                    self._add(CalculatorTool())
                elif item == "search":
                    self._add(SearchTool(_open_retriever(retriever, corpus), passages))
                elif isinstance(item, Tool):
                    self._add(item)
                elif callable(item):
                    self._add(FunctionTool(item))
                else:
                    raise UsageError(f"unknown tool {item!r}{nearest(str(item), BUILT_IN)}")
            for server in mcp:
                for tool in open_server(server):
                    self._add(tool)
        except BaseException:
            self.close()
            raise
        if not self._tools:
            raise UsageError(f"there are no tools; tools= takes {', '.join(BUILT_IN)}, functions and Tool objects")
        self.instructions = describe_tools(self._tools, format)
        self._split = split
        self._task: Task
        self._progress = _Progress()

    def close(self) -> None:
        """End the interpreter and the servers; the next call of a tool starts them again."""
        for tool in getattr(self, "_tools", {}).values():
            tool.close()
        super().close()

    def corpus(self, tasks: int = 48) -> tuple[str, ...]:
        """Return questions, calls and results of training tasks, from which subword vocabularies are learned."""
        texts = [self.instructions]
        names = self.tasks(self.splits[0])
        for name in names[:: max(1, len(names) // (4 * tasks))][: 4 * tasks]:
            task = self._source.load(self.splits[0], name)
            results = [write_results([task.answer], self._format)] if task.calls else []
            texts += [task.question, *self._solution(task), *results, write_answer(task.answer)]
        texts += [_verdict(1.0), _verdict(0.0)]
        return tuple(dict.fromkeys(texts))

    def _add(self, tool: Tool) -> None:
        check_name(tool.name)
        if tool.name in self._tools:
            tool.close()
            raise UsageError(f"two tools are called {tool.name!r}")
        self._tools[tool.name] = tool

    def _list(self, split: str) -> Iterable[str]:
        return self._source.list(split)

    def _begin(self, split: str, task: str) -> str:
        self._split, self._task = split, self._source.load(split, task)
        self._progress = _Progress()
        for tool in self._tools.values():
            tool.clear()
        return self._task.question

    def _act(self, action: str) -> Turn:
        said = parse(action, self._tools, self._format)
        if isinstance(said, Answer):
            score = self._source.score(self._split, self._task, said.text)
            self._progress = replace(self._progress, answer=said.text[: self._max_output], score=score)
            return Turn(_verdict(score), self.reward_scale * score, over=True)
        results = [item.message if isinstance(item, Mistake) else self._make(item) for item in said]
        mistakes = sum(isinstance(item, Mistake) for item in said)
        invalid = mistakes == len(said)
        if mistakes:
            self._progress = replace(self._progress, mistakes=self._progress.mistakes + 1)
        observation = results[0] if invalid and len(said) == 1 else write_results(results, self._format)
        return Turn(observation, -self.format_penalty if invalid else 0.0, invalid=invalid)

    def _make(self, call: Call) -> str:
        """Make a call and return what the agent reads of it."""
        now = self._progress
        try:
            result, failed = self._tools[call.tool].call(call.arguments), 0
        except ToolError as error:
            result, failed = str(error), 1
        if len(result) > (limit := 2 * self._max_output):
            result = f"{result[:limit]}\n[{len(result) - limit} characters left out]"
        solved = self._advance(now.solved, call) if not failed else 0
        self._progress = replace(
            now, calls=now.calls + 1, errors=now.errors + failed, solved=solved, result=result if solved else ""
        )
        return result

    def _advance(self, solved: int, call: Call) -> int:
        """Return how far the reference solution has come after ``call``."""
        for step in dict.fromkeys((solved, 0)):
            if step < len(self._task.calls):
                tool, text = self._task.calls[step]
                if call.tool == tool and list(call.arguments.values()) == [text]:
                    return step + 1
        return 0

    def _report(self) -> Info:
        now = self._progress
        info: Info = {
            "goal": _goal(self._task.question),
            "won": now.answer is not None and now.score >= 0.99,
            "score": now.score,
            "tool_calls": now.calls,
            "tool_errors": now.errors,
            "format_errors": now.mistakes,
            "answer": now.answer,
        }
        if self.sandbox is not None:
            info["sandbox"] = self.sandbox
        return info

    def _solution(self, task: Task) -> list[str]:
        """Return the actions that make the calls of the reference solution, none unless all its tools are here."""
        if not all(tool in self._tools for tool, _ in task.calls):
            return []
        calls = [Call(tool, {str(self._tools[tool].text_argument): text}) for tool, text in task.calls]
        return [write_call(call, self._tools, self._format) for call in calls]

    def _expert_action(self) -> str:
        """Make the calls of the reference solution and answer what the last one returned.

        Where there are none, or they stop short of the answer, as some of GSM8K's do, the answer is the known one.
        """
        solution = self._solution(self._task)
        if not solution:
            return write_answer(self._task.answer)
        now = self._progress
        if now.solved < len(solution):
            return solution[now.solved]
        found = now.result.strip()
        return write_answer(found if same_answer(found, self._task.answer) else self._task.answer)

    def _identity(self, split: str, task: str) -> str:
        return (self._task if self._at == (split, task) else self._source.load(split, task)).digest

    def _save(self) -> Any:
        if any(tool.replayed for tool in self._tools.values()):
            return super()._save()
        return self._progress, {name: tool.save() for name, tool in self._tools.items()}

    def _load(self, split: str, task: str, state: Any) -> None:
        if any(tool.replayed for tool in self._tools.values()):
            super()._load(split, task, state)
            return
        self._split, self._task = split, self._source.load(split, task)
        self._progress, states = state
        for name, tool in self._tools.items():
            tool.load(states.get(name))


def _verdict(score: float) -> str:
    if score >= 0.99:
        return "The answer is right."
    return "The answer is wrong." if score <= 0.01 else "The answer is partly right."


def _goal(question: str) -> str:
    """Return the question, or its end if it is long."""
    if len(question) <= _GOAL_CHARACTERS:
        return question
    tail = question[-_GOAL_CHARACTERS:]
    at = max(tail.find(mark) for mark in (". ", "\n", "? "))
    return tail[at + 1 :].strip() if at >= 0 else tail


def _open_retriever(retriever: Retriever | str, corpus: str | os.PathLike[str] | None) -> Retriever:
    if not isinstance(retriever, str):
        return retriever
    from ..search.passages import Corpus, read_corpus
    from ..search.retriever import open_retriever
    from ..search.sources import Generated

    def passages() -> Corpus:
        return Generated().corpus("train") if corpus is None else read_corpus(corpus)

    return open_retriever(retriever, passages)
