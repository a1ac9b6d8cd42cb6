"""The wrapper that asks for actions in another way in every episode.

- ``PromptTemplates``: prompt augmentation: one of thirteen templates per episode, and its score in the reward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import gymnasium

from ...errors import UsageError, nearest
from ..text import TextSpace
from .base import Info, Reply, WorldWrapper
from .rewards import price
from .templates import TEMPLATES, Template, boxed

_LONGEST_MESSAGE = 1 << 14
_PLACES = ("instructions", "observation")


@dataclass(frozen=True, slots=True)
class _Asked:
    template: str
    scores: float
    """Sum over the turns so far."""
    turns: int


class PromptTemplates(WorldWrapper):
    """Draws one of thirteen templates for every episode, and rewards messages that keep to it.

    Prompt augmentation (Lu 2026, arXiv 2602.03190): one fixed prompt lets the policy's entropy collapse; many keep
    rollouts diverse. The template has a part for the system prompt, which heads ``info["instructions"]``, an ending of
    every observation, and an opening of every message of the agent (``info["opening"]``). The world reads what
    stands in the last ``\\boxed{}`` of a message, or all of it when there is none. The reward of an episode is the
    world's plus ``weight`` times the template's format score (0 to 1), averaged over the turns and paid on the last.

    The draw depends on ``seed``, the task, the seed of the last ``reset`` that had one, and how many episodes have
    begun since. So a group that resets with one task and one seed shares one template, which its baseline needs;
    ``reset(options={"template": name})`` chooses it. ``info`` has ``template``, and ``format_score`` of the last turn.

    >>> import gymnasium as gym
    >>> env = PromptTemplates(gym.make("agentropy/ALFWorld-v0"))
    >>> _ = env.reset(seed=0, options={"template": "deepseek-r1"})
    >>> observation, _, _, _, info = env.step("<think>What have I got?</think> \\\\boxed{inventory}")
    >>> observation, info["format_score"]
    ('You are not carrying anything.', 0.5)
    """

    name = "prompt-templates"
    reads_messages = True

    def __init__(
        self,
        env: gymnasium.Env[str, str],
        seed: int = 0,
        templates: Sequence[str] | None = None,
        weight: float = 1.0,
        place: str = "instructions",
    ) -> None:
        """Choose the templates.

        Args:
            env: a text world.
            seed: another number draws others.
            templates: names in ``TEMPLATES`` to draw from; None draws from all.
            weight: of the format score; not negative.
            place: ``"instructions"``, or ``"observation"`` to head the first observation with the system prompt.

        Raises:
            UsageError: an argument is none of these.
        """
        names = (
            tuple(TEMPLATES) if templates is None else (templates,) if isinstance(templates, str) else tuple(templates)
        )
        for template in names:
            _known(template, TEMPLATES)
        if not names:
            raise UsageError("there must be at least one template to draw from")
        if place not in _PLACES:
            raise UsageError(f"unknown place {place!r}{nearest(place, _PLACES)}")
        weight = price("weight", weight)
        super().__init__(env, seed=int(seed), templates=names, weight=weight, place=place)
        self._seed, self._names, self._weight, self._heads = int(seed), names, weight, place == "observation"
        self._drawn: tuple[int | None, int] = (None, -1)
        """Seed of the last reset that had one, and the number of the episode since."""
        self._chosen: str | None = None
        longest: int = env.observation_space.max_length  # type: ignore[attr-defined]
        added = max(len(TEMPLATES[one].system) + len(TEMPLATES[one].ending) for one in names)
        self.observation_space = TextSpace(longest + added + 4)
        self.action_space = TextSpace(max(env.action_space.max_length, _LONGEST_MESSAGE))  # type: ignore[attr-defined]

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[str, Info]:
        """Start an episode; ``options`` may also name the ``template``.

        Raises:
            UsageError: there is no such template.
        """
        rest = dict(options or {})
        chosen = rest.pop("template", None)
        if chosen is not None:
            _known(chosen, self._names)
        before = self._drawn
        self._drawn = (before[0], before[1] + 1) if seed is None else (seed, 0)
        self._chosen = chosen
        try:
            return super().reset(seed=seed, options=None if options is None else rest)
        except BaseException:
            if seed is None:  # no episode has begun; a seed counts all the same, as for the world
                self._drawn = before
            raise

    def _begin(self, observation: str, info: Info) -> tuple[str, Info]:
        name = self._draw(str(info.get("task", ""))) if self._chosen is None else self._chosen
        self._state = _Asked(name, 0.0, 0)
        template = TEMPLATES[name]
        observation = _join(observation, template.ending)
        if self._heads:
            observation = f"{template.system}\n\n{observation}"
        return observation, self._notes_of(template)

    def _turn(self, action: str) -> Reply:
        asked: _Asked = self._state
        template = TEMPLATES[asked.template]
        score = template.score(action)
        command = boxed(action)
        reply = self._below(action.strip() if command is None else command)
        asked = self._state = _Asked(asked.template, asked.scores + score, asked.turns + 1)
        if reply.terminated or reply.truncated:
            reply.reward += self._weight * asked.scores / asked.turns
        else:
            reply.observation = _join(reply.observation, template.ending)
        reply.notes = {**self._notes_of(template), "format_score": score}
        return reply

    def _say(self, action: str) -> str:
        asked: _Asked = self._state
        return TEMPLATES[asked.template].say(action)

    def _instruct(self, instructions: str) -> str:
        if self._state is None or self._heads:
            return instructions
        asked: _Asked = self._state
        return f"{TEMPLATES[asked.template].system}\n{instructions}".strip()

    def _texts(self) -> Sequence[str]:
        chosen = [TEMPLATES[name] for name in self._names]
        return [text for one in chosen for text in (one.system, one.ending, one.opening, one.say("")) if text]

    def _draw(self, task: str) -> str:
        key = repr((self._seed, *self._drawn, task)).encode("utf-8", "backslashreplace")
        number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
        return self._names[number % len(self._names)]

    def _notes_of(self, template: Template) -> Info:
        return {"template": template.name, **({"opening": template.opening} if template.opening else {})}


def _join(observation: str, ending: str) -> str:
    return f"{observation}\n{ending}" if ending else observation


def _known(name: str, names: Sequence[str] | dict[str, Template]) -> None:
    if name not in names:
        raise UsageError(f"unknown template {name!r}{nearest(str(name), names)}")
