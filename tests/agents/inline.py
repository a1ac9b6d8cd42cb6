"""A pool, a world and an engine in one process, and the plainest loop there could be, for tests of the rollout loop."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from time import sleep
from typing import Any

import numpy as np

from agentropy.agents.engines.base import Completion, Request, SamplingParams, StopReason, run_all
from agentropy.agents.episodes import Branched, Rendering, Single
from agentropy.agents.formats import PlainFormat
from agentropy.agents.policies import EnginePolicy
from agentropy.agents.rollout import RolloutTask, rollout
from agentropy.agents.tokenizer import END, build_word_tokenizer
from agentropy.agents.tree import merge
from agentropy.envs.pool import EnvResult

COMMANDS = ["go left", "go right", "look"]
SAYINGS = [
    "you are at door 1",
    "you are at door 2",
    "you are at door 3",
    "task is to reach door 3",
    "nothing happens",
]
TURNS = 6


@dataclass
class Corridor:
    """Three doors in a row; the task is to reach the third from the first within six turns."""

    task: str
    door: int = 1
    turn: int = 0

    def answer(self, slot, command=None):
        if self.task == "unreadable" or (self.task == "crashing" and self.turn == 2):
            info = {"task": self.task, "won": False, "failed": True}
            return EnvResult(slot, "", 0.0, True, False, info, failed=True, error="the world broke")
        text = f"you are at door {self.door} task is to reach door 3"
        if command is not None:
            self.turn += 1
            self.door += {"go left": -1, "go right": 1}.get(command, 0)
            self.door = max(1, self.door)
            text = f"you are at door {self.door}" if command in COMMANDS else "nothing happens"
        won = self.door == 3
        info = {
            "task": self.task,
            "won": won,
            "score": self.door / 3,
            "admissible": COMMANDS,
            "expert": "go right",
            "invalid": command is not None and command not in COMMANDS,
        }
        return EnvResult(slot, text, float(won), won, self.turn == TURNS, info)


@dataclass
class InlinePool:
    """The pool's contract in one process; answers come back in an order drawn from ``shuffle``."""

    num_envs: int
    shuffle: int = 0
    make: Callable[[str], Any] = Corridor
    """From a task to a world, a dataclass with ``answer(slot, command=None)``."""
    worlds: dict[int, Any] = field(default_factory=dict)
    pending: dict[int, EnvResult] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    last: dict[int, EnvResult] = field(default_factory=dict)
    forks: int = 0

    def reset(self, slot, *, task, seed):
        assert 0 <= slot < self.num_envs and slot not in self.pending
        self.worlds[slot] = self.make(task)
        self.seeds.append(seed)
        self.pending[slot] = self.worlds[slot].answer(slot)

    def fork(self, src, dst):
        assert src not in self.pending and dst not in self.pending and 0 <= dst < self.num_envs
        self.worlds[dst] = replace(self.worlds[src])
        self.pending[dst] = replace(self.last[src], slot=dst, reward=0.0)
        self.forks += 1

    def step(self, slot, action):
        assert slot not in self.pending
        self.pending[slot] = self.worlds[slot].answer(slot, action)

    def wait(self, slots, *, all):
        assert all
        order = np.random.default_rng(self.shuffle).permutation(sorted(slots))
        results = [self.pending.pop(slot) for slot in order.tolist()]
        self.last |= {result.slot: result for result in results}
        return results


class LatePool(InlinePool):
    """Its worlds answer in threads, after up to two milliseconds at random."""

    def __init__(self, num_envs, shuffle):
        super().__init__(num_envs, shuffle)
        self._threads = ThreadPoolExecutor(4)
        self._dice = np.random.default_rng(shuffle)

    def _later(self, slot):
        answer, seconds = self.pending[slot], self._dice.random() * 0.002
        self.pending[slot] = self._threads.submit(lambda: (sleep(seconds), answer)[1])

    def reset(self, slot, **options):
        super().reset(slot, **options)
        self._later(slot)

    def step(self, slot, action):
        super().step(slot, action)
        self._later(slot)

    def fork(self, src, dst):
        super().fork(src, dst)
        self._later(dst)

    def wait(self, slots, *, all):
        assert all
        results = [future.result() for future in as_completed([self.pending.pop(slot) for slot in slots])]
        self.last |= {result.slot: result for result in results}
        return results


@dataclass
class BabblingEngine:
    """Says random words that depend on the request alone, one token a step, and writes down all that it is asked."""

    vocabulary: int
    end: int
    rows: int = 1000
    """Requests that run at once; the others queue."""
    shuffle: int = 0
    """Other than 0, those that end in one step are handed back in an order drawn from it."""
    heard: dict[int, tuple[Request, Completion]] = field(default_factory=dict)
    """By the request's seed."""
    steps: list[list[int]] = field(default_factory=list)
    """Seeds of the rows of each step."""
    released: list[list[int]] = field(default_factory=list)
    streams: list["BabblingStream"] = field(default_factory=list)

    @property
    def batches(self):
        """Seeds of the requests that began in each step, without steps in which none did."""
        begun, batches = set(), []
        for seeds in self.steps:
            batches.append([seed for seed in seeds if seed not in begun])
            begun.update(seeds)
        return [batch for batch in batches if batch]

    def answer(self, request):
        generator = np.random.default_rng([request.seed, int(request.tokens.sum())])
        length = int(generator.integers(1, request.max_tokens + 1))
        tokens = generator.integers(self.vocabulary, size=length).astype(np.int32)
        if length < request.max_tokens or generator.random() < 0.5:
            tokens[-1] = self.end
        numbers = generator.random((4, length)).astype(np.float32)
        return Completion(tokens, *numbers, StopReason.STOP, version=3, cached_tokens=0)

    def generate(self, requests, params):
        return run_all(self.stream(params), requests)

    def stream(self, params):
        self.streams.append(BabblingStream(self))
        return self.streams[-1]

    def release(self, prefixes=None):
        self.released += [prefix.tolist() for prefix in prefixes]


@dataclass
class BabblingStream:
    """What an engine's stream promises, by the letter."""

    engine: BabblingEngine
    requests: list[Request] = field(default_factory=list)
    """By ticket."""
    said: dict[int, int] = field(default_factory=dict)
    """Tokens of each request that has not ended."""
    closed: bool = False

    def add(self, request):
        assert not self.closed and request.seed not in self.engine.heard
        self.engine.heard[request.seed] = request, self.engine.answer(request)
        self.requests.append(request)
        self.said[len(self.requests) - 1] = 0
        return len(self.requests) - 1

    def step(self):
        assert not self.closed and self.said
        rows = list(self.said)[: self.engine.rows]
        self.engine.steps.append([self.requests[ticket].seed for ticket in rows])
        ended = []
        for ticket in rows:
            self.said[ticket] += 1
            completion = self.engine.heard[self.requests[ticket].seed][1]
            if self.said[ticket] == len(completion.tokens):
                del self.said[ticket]
                ended.append((ticket, completion))
        if self.engine.shuffle:
            order = np.random.default_rng([self.engine.shuffle, len(self.engine.steps)]).permutation(len(ended))
            ended = [ended[place] for place in order]
        return ended

    @property
    def running(self):
        return len(self.said)

    def close(self):
        self.said.clear()
        self.closed = True


TOKENIZER = build_word_tokenizer([*COMMANDS, *SAYINGS])
FORMAT = PlainFormat(TOKENIZER)


def babbler(max_action_tokens=4, **options):
    engine = BabblingEngine(len(TOKENIZER), TOKENIZER.convert_tokens_to_ids(END), **options)
    return EnginePolicy(engine, FORMAT, SamplingParams(), max_action_tokens=max_action_tokens)


def babble(tasks, *, slots=4, shuffle=0, max_context_tokens=400, **options):
    policy, pool = babbler(), InlinePool(slots, shuffle)
    trees = rollout(policy, pool, FORMAT, tasks, split="train", max_context_tokens=max_context_tokens, **options)
    return trees, policy.engine


def plainly(policy, pool, format, tasks, *, split, max_context_tokens, context="full", window=2, branching=None):
    """``rollout`` without anything beside anything: one unit after the other, and each in rounds."""
    rendering = Rendering(format, window if context == "window" else None, max_context_tokens, policy.max_action_tokens)
    trees = []
    for place, task in enumerate(tasks):
        if branching is None:
            units = [Single(task, member, split, rendering) for member in range(task.group_size)]
        else:
            group = branching.group(place, task.group_size, task.seed, policy.vocabulary)
            units = [Branched(task, group, split, rendering)]
        for unit in units:
            _Plain(policy, pool, unit).play()
        trees.append(merge([unit.finish() for unit in units]))
    return trees


class _Plain:
    def __init__(self, policy, pool, unit):
        self.policy, self.pool, self.unit, self.seats = policy, pool, unit, {}

    def seat(self, episode):
        slot = min(set(range(self.pool.num_envs)) - set(self.seats))
        self.seats[slot] = episode
        return slot

    def begin(self, episodes):
        for episode in episodes:
            self.pool.reset(self.seat(episode), task=episode.task.task, seed=episode.task.seed)

    def play(self):
        self.begin(self.unit.start())
        while self.seats:
            results = {result.slot: result for result in self.pool.wait(list(self.seats), all=True)}
            order = sorted(results, key=lambda slot: self.seats[slot].member)
            going = [slot for slot in order if self.seats[slot].receive(results[slot])]
            for slot in order:
                if slot not in going:
                    self.begin(self.unit.end(self.seats.pop(slot)))
            if going:
                acts = self.policy.act([self.seats[slot].context() for slot in going])
                for slot, act in zip(going, acts, strict=True):
                    self.turn(slot, act)
                self.unit.end_round()

    def turn(self, slot, act):
        episode = self.seats[slot]
        for _ in range(self.unit.decide(episode, act)):
            self.pool.fork(slot, self.seat(self.unit.fork(episode)))
        episode.record(act)
        self.pool.step(slot, act.parsed.command)


def act_seed(task: RolloutTask, member: int, turn: int) -> int:
    return int(np.random.SeedSequence((task.seed, member, turn)).generate_state(1, np.uint64)[0])
