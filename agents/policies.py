"""Who plays: policies answer contexts with one action each, a batch at a time or as they come.

- ``Context``, ``Act``: what a policy is given and gives.
- ``Policy``: the protocol; ``ActStream``: contexts that come and go while a policy works.
- ``act_stream``: the stream of any policy.
- ``EnginePolicy``: a language model behind an engine.
- ``ExpertPolicy``: the environment's own expert, with optional noise, for demonstrations.
- ``RandomPolicy``: admissible commands at random, the floor that every result is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from ..errors import UsageError
from .engines.base import Completion, Engine, Request, SamplingParams, Stream
from .messages import Format, Info, ParsedAction, admissible
from .tree import Float32Array, Int32Array

_NOTHING: Float32Array = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class Context:
    """One turn of one episode, waiting for an action."""

    tokens: Int32Array
    """Everything the model reads, ``[L]``."""
    seed: int
    """64 bits that depend on the task's seed, the member and the turn, and on nothing else."""
    turn: int
    observation: str
    info: Info
    """The environment's ``info`` after the last step."""


@dataclass(frozen=True, slots=True)
class Act:
    """One action. No tokens at all means that the context has no room for any."""

    tokens: Int32Array
    parsed: ParsedAction
    sampled: bool
    """Whether these tokens are what the policy would be trained on."""
    logprobs: Float32Array = field(default_factory=lambda: _NOTHING)
    """One per token where ``sampled``, else empty; likewise ``entropies``."""
    entropies: Float32Array = field(default_factory=lambda: _NOTHING)
    version: int = 0
    entropy_top_k: int = 0
    """0 where the entropies are exact, else the k that they were estimated from; see ``Completion``."""
    kept_logmass: Float32Array = field(default_factory=lambda: _NOTHING)
    """Log of the mass that filters of the sampling kept, one per token; empty where no tokens were drawn."""


class Policy(Protocol):
    """Chooses actions. The answer to a context must not depend on what else is in the batch.

    A policy that can take in contexts while it works on others has a method ``stream() -> ActStream`` as well.
    """

    @property
    def max_action_tokens(self) -> int:
        """Room that a context must leave."""
        ...

    def act(self, contexts: Sequence[Context]) -> list[Act]:
        """One action per context, in order."""
        ...

    def release(self, finished: Sequence[Int32Array]) -> None:
        """Hear that these token sequences, each up to its last action, will not be continued."""
        ...


class ActStream(Protocol):
    """Contexts that come and go while a policy works."""

    def add(self, context: Context) -> int:
        """Take a context; return its ticket, which is larger than those before."""
        ...

    def step(self) -> list[tuple[int, Act]]:
        """Do a piece of work on every context; return the actions that are whole now, with their tickets."""
        ...

    def close(self) -> None:
        """Drop what is not finished."""
        ...


def act_stream(policy: Policy) -> ActStream:
    """The stream of ``policy``; without one of its own, a step answers all contexts that were added."""
    own = getattr(policy, "stream", None)
    stream: ActStream = _AllAtOnce(policy) if own is None else own()
    return stream


class _AllAtOnce:
    """A stream over ``Policy.act``."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._waiting: list[Context] = []
        self._answered = 0

    def add(self, context: Context) -> int:
        self._waiting.append(context)
        return self._answered + len(self._waiting) - 1

    def step(self) -> list[tuple[int, Act]]:
        acts = list(enumerate(self._policy.act(self._waiting), self._answered))
        self._answered += len(acts)
        self._waiting = []
        return acts

    def close(self) -> None:
        self._waiting = []


class EnginePolicy:
    """Samples actions from a language model.

    Args:
        engine: generates the tokens.
        format: says where an action ends and what command it holds.
        sampling: temperature and filters; the format's stops are added to its own.
        max_action_tokens: longest action.
    """

    def __init__(self, engine: Engine, format: Format, sampling: SamplingParams, *, max_action_tokens: int) -> None:
        self.engine = engine
        self.max_action_tokens = max_action_tokens
        self._format = format
        self._sampling = replace(
            sampling,
            stop_token_ids=tuple(dict.fromkeys((*format.stop_token_ids, *sampling.stop_token_ids))),
            stop_strings=tuple(dict.fromkeys((*format.stop_strings, *sampling.stop_strings))),
        )

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.engine.vocabulary

    def act(self, contexts: Sequence[Context]) -> list[Act]:
        completions = self.engine.generate([self.request(context) for context in contexts], self._sampling)
        return [self.read(context, completion) for context, completion in zip(contexts, completions, strict=True)]

    def stream(self) -> ActStream:
        """Contexts that the engine works on side by side; an engine without streams answers all that were added."""
        if not hasattr(self.engine, "stream"):
            return _AllAtOnce(self)
        return _EngineStream(self, self.engine.stream(self._sampling))

    def request(self, context: Context) -> Request:
        """What the engine is asked."""
        return Request(context.tokens, context.seed, self.max_action_tokens)

    def read(self, context: Context, completion: Completion) -> Act:
        """The action that ``completion`` is."""
        return Act(
            tokens=completion.tokens,
            parsed=self._format.parse(completion.tokens.tolist(), context.info),
            sampled=True,
            logprobs=completion.logprobs,
            entropies=completion.entropies,
            version=completion.version,
            entropy_top_k=completion.entropy_top_k,
            kept_logmass=completion.kept_logmass,
        )

    def release(self, finished: Sequence[Int32Array]) -> None:
        # The last token of an action was sampled and never read: what an engine may hold ends before it.
        self.engine.release([tokens[:-1] for tokens in finished if len(tokens) > 1])


class _EngineStream:
    """A stream over ``Engine.stream``."""

    def __init__(self, policy: EnginePolicy, stream: Stream) -> None:
        self._policy = policy
        self._stream = stream
        self._contexts: dict[int, Context] = {}

    def add(self, context: Context) -> int:
        ticket = self._stream.add(self._policy.request(context))
        self._contexts[ticket] = context
        return ticket

    def step(self) -> list[tuple[int, Act]]:
        return [
            (ticket, self._policy.read(self._contexts.pop(ticket), completion))
            for ticket, completion in self._stream.step()
        ]

    def close(self) -> None:
        self._contexts.clear()
        self._stream.close()


class ExpertPolicy:
    """Plays ``info["expert"]``; its actions count as sampled with probability one, so they are trained on.

    In some turns it plays something else, which is not marked as sampled: the expert's way back is learned, the
    mistake is not.

    Args:
        format: renders the commands.
        noise: probability that a turn plays a random admissible command, in [0, 1].
        slips: probability that a turn plays a command that is not admissible, in [0, 1]: a beginner's model plays
            many, and would otherwise never have seen how to go on.
        max_action_tokens: room that a context must leave.
    """

    def __init__(self, format: Format, *, noise: float = 0.0, slips: float = 0.0, max_action_tokens: int = 32) -> None:
        if not (noise >= 0.0 and slips >= 0.0 and noise + slips <= 1.0):
            raise UsageError(f"noise {noise} and slips {slips} are no probabilities; expected 0 to 1 together")
        self.max_action_tokens = max_action_tokens
        self._format = format
        self._noise = noise
        self._slips = slips

    def act(self, contexts: Sequence[Context]) -> list[Act]:
        return [self._one(context) for context in contexts]

    def release(self, finished: Sequence[Int32Array]) -> None:
        pass

    def _one(self, context: Context) -> Act:
        if "expert" not in context.info:
            raise UsageError("this environment names no expert action; make it with expert_info=True")
        command = context.info["expert"]
        generator = np.random.default_rng(context.seed)
        draw = generator.random()
        if draw < self._slips:
            return _said(self._format, context.info, _slip(context, generator), sampled=False)
        if draw < self._slips + self._noise or (command is None and context.info.get("admissible")):
            return _said(self._format, context.info, _any_admissible(context, generator), sampled=False)
        if command is None:
            raise UsageError(
                f"the expert of task {context.info.get('task')!r} has no action for turn {context.turn}; "
                "play it without noise and slips"
            )
        return _said(self._format, context.info, command, sampled=True)


class RandomPolicy:
    """Plays an admissible command, each equally likely; nothing it does counts as sampled."""

    def __init__(self, format: Format, *, max_action_tokens: int = 32) -> None:
        self.max_action_tokens = max_action_tokens
        self._format = format

    def act(self, contexts: Sequence[Context]) -> list[Act]:
        return [
            _said(
                self._format, context.info, _any_admissible(context, np.random.default_rng(context.seed)), sampled=False
            )
            for context in contexts
        ]

    def release(self, finished: Sequence[Int32Array]) -> None:
        pass


def _any_admissible(context: Context, generator: np.random.Generator) -> str:
    commands = admissible(context.info)
    return commands[int(generator.integers(len(commands)))]


def _slip(context: Context, generator: np.random.Generator) -> str:
    """The head of one admissible command and the tail of another, such as ``take mug 1 from drawer 2`` in vain."""
    known = set(admissible(context.info))
    for _ in range(10):
        head, tail = (_any_admissible(context, generator).split() for _ in range(2))
        cut = int(generator.integers(1, max(2, min(len(head), len(tail)))))
        if (command := " ".join(head[:cut] + tail[cut:])) not in known:
            return command
    return _any_admissible(context, generator)


def _said(format: Format, info: Info, command: str, *, sampled: bool) -> Act:
    tokens = np.asarray(format.render_action(command, info), np.int32)
    parsed = ParsedAction(command, valid=True, closed=True, text=command)
    if not sampled:
        return Act(tokens, parsed, sampled=False)
    certain = np.zeros(len(tokens), np.float32)
    return Act(tokens, parsed, sampled=True, logprobs=certain, entropies=certain)
