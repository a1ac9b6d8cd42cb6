"""Thirteen ways to ask for an action, each with the score of how well a message keeps to it.

- ``Template``: one of them.
- ``TEMPLATES``: all, by name.
- ``boxed``: what stands in the last ``\\boxed{}`` of a text.

The set is that of "Prompt Augmentation Scales up GRPO Training on Mathematical Reasoning" (Lu 2026, arXiv 2602.03190;
repository wenquanlu/prompt-augmentation-GRPO), worded for worlds that are acted in over turns: the names, what each
one is made of (system prompt, end of the user's turn, opening of the agent's turn), the parts that it requires, and
the score are the paper's; the answer to a problem becomes the action of a turn.
"""

from __future__ import annotations

from dataclasses import dataclass

_MARK = "\\boxed{"
_BOX = "\\boxed{}"


@dataclass(frozen=True, slots=True)
class Template:
    """A way to ask for an action, and the scorer that belongs to it."""

    name: str
    system: str
    """For the system prompt."""
    ending: str = ""
    """Ends every observation."""
    opening: str = ""
    """What the agent's message begins with; the agent goes on from there."""
    required: tuple[str, ...] = ()
    """What must be in the message exactly once. No opening holds any of it, so it may be in the message or not."""
    shape: str = "{}"
    """A message of this form, opening included; ``{}`` stands for the action."""

    def score(self, message: str) -> float:
        """Return the share of ``required`` that is in ``message`` exactly once, 1 where nothing is required."""
        if not self.required:
            return 1.0
        return sum(message.count(part) == 1 for part in self.required) / len(self.required)

    def say(self, action: str) -> str:
        """Return a message of score 1 that says ``action``, without the opening."""
        return self.shape.replace("{}", f"{_MARK}{action}}}").removeprefix(self.opening)


def boxed(text: str) -> str | None:
    """Return what stands in the last ``\\boxed{}`` of ``text``, None where there is none.

    Braces inside are matched; where they do not match, everything up to the last brace counts.

    >>> boxed(r"First \\boxed{look}, then \\boxed{print({1: 2})}.")
    'print({1: 2})'
    """
    start = text.rfind(_MARK)
    if start < 0:
        return None
    inside, depth = text[start + len(_MARK) :], 1
    for at, character in enumerate(inside):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return inside[:at].strip()
    end = inside.rfind("}")
    return inside[:end].strip() if end >= 0 else None


_STEPS = f"Reason step by step about what to do next, and put the action within {_BOX}."
_R1 = (
    "You talk with a user, who tells you what you observe in a world where you have a task. For every turn you first "
    "think, and then give the user your action. Enclose the reasoning in <think> </think> tags and the action in "
    "<answer> </answer> tags, as in <think> the reasoning </think> <answer> the action </answer>. "
    f"Within <answer> </answer> the action must stand in {_BOX}."
)
_OPEN_R1 = (
    "You are a helpful assistant that acts in a world after careful thought. In every turn you first reason as in an "
    "inner monologue and then give the action, in this form: <think>\n...\n</think>\n<answer>\n...\n</answer>\n"
    f"Within <answer>...</answer> the action must stand in {_BOX}."
)
_REFLECTIVE = (
    "You are a helpful assistant that carries out tasks in a world. In every turn write out how you come to the next "
    "action, then check whether it is right, mend it if it is not, and give it last. Use exactly this form: "
    "<solution>\nreasoning and proposed action\n</solution>\n<check>\nLet's verify step by step ...\n</check>\n"
    f"Put the final action within {_BOX}."
)
_FINAL = "The final action is:"
_STEP = "Let's think step by step"
_THOUGHT = ("\n</think>\n", "\n<answer>\n", "\n</answer>")
_CHECKED = ("\n</solution>\n", f"\n<check>\n{_STEP.replace('think', 'verify')}", "\n</check>")
_OPEN_R1_SHAPE = "<think>\n\n</think>\n<answer>\n{}\n</answer>"
_R1_SHAPE = "<think></think> <answer>{}</answer>"
_REFLECTIVE_SHAPE = "<solution>\n\n</solution>\n<check>\nLet's verify step by step.\n</check>\n{}"

TEMPLATES = {
    template.name: template
    for template in (
        Template("abel", _STEPS, opening=f"{_STEP}.\n", shape=f"{_STEP}.\n{{}}"),
        Template("simplerl", "You are a helpful assistant.", ending=_STEPS),
        Template("qwen-math", _STEPS),
        Template("open-r1", _OPEN_R1, required=("<think>\n", *_THOUGHT), shape=_OPEN_R1_SHAPE),
        Template("open-r1-teacher", _OPEN_R1, opening="<think>\n", required=_THOUGHT, shape=_OPEN_R1_SHAPE),
        Template("deepseek-r1", _R1, required=("<think>", "</think>", "<answer>", "</answer>"), shape=_R1_SHAPE),
        Template(
            "deepseek-r1-teacher",
            _R1,
            opening="<think>",
            required=("</think>", "<answer>", "</answer>"),
            shape=_R1_SHAPE,
        ),
        Template(
            "formal",
            "You are an intelligent assistant that helps a user with a task in a world. Derive every action rigorously "
            f"and step by step from what you observed. Indicate the action clearly within {_BOX}.",
        ),
        Template(
            "lm_eval_prompt1",
            "Carry out the following task in a world. In every turn explain your approach step by step.\n"
            f"End with: {_FINAL} {_MARK}action}}\nwhere [action] is just the next action.",
            opening=_STEP,
            required=(_FINAL,),
            shape=f"{_STEP}\n{_FINAL} {{}}",
        ),
        Template(
            "lm_eval_prompt4",
            "Analyse the situation and carry out the task.",
            ending=f"End with:\n{_FINAL} {_MARK}action}} where [action] is just the next action.",
            required=(_FINAL,),
            shape=f"{_FINAL} {{}}",
        ),
        Template(
            "lm_eval_prompt8",
            f"Carry out the following task in a world\nShow each step of your reasoning\nPut the action within {_BOX}",
            opening=_STEP,
            shape=f"{_STEP}\n{{}}",
        ),
        Template("reflective_prompt", _REFLECTIVE, required=("<solution>\n", *_CHECKED), shape=_REFLECTIVE_SHAPE),
        Template(
            "reflective_prompt-teacher",
            _REFLECTIVE,
            opening="<solution>\n",
            required=_CHECKED,
            shape=_REFLECTIVE_SHAPE,
        ),
    )
}
