"""A crew's threads do what one thread does, on copies that share their weights."""

import math
import threading

import pytest
import torch
from torch import nn

from agentropy.algorithms import recipe
from agentropy.algorithms.crew import Crew
from agentropy.algorithms.learner import Learner, LearnerConfig

from .test_packing import batch_of, tiny_model


def tied():
    torch.manual_seed(0)
    module = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False), "norm": nn.LayerNorm(4)})
    module["head"].weight = module["embed"].weight
    return module


def forward(item, module):
    loss = module["head"](module["norm"](module["embed"](item))).logsumexp(-1).sum()
    loss.backward()
    return float(loss.detach())


def test_results_come_in_order_and_gradients_add_up():
    items = [torch.tensor([i % 7, (i * i) % 7]) for i in range(9)]
    found = []
    for size in (1, 2, 3):
        module = tied()
        crew = Crew([module], size)
        results = crew.run(forward, items)
        found.append((results, [parameter.grad.clone() for parameter in module.parameters()]))
        crew.close()
    for results, gradients in found[1:]:
        assert results == pytest.approx(found[0][0])
        for one, other in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(one, other)


def test_copies_follow_the_weights_and_keep_what_is_tied():
    module = tied()
    crew = Crew([module], 2)
    with torch.no_grad():
        module["embed"].weight.mul_(2)
    (_, (twin,)) = crew._modules
    assert twin is not module and twin["head"].weight is twin["embed"].weight
    assert twin["embed"].weight.data_ptr() == module["embed"].weight.data_ptr()


def test_an_error_in_a_thread_is_the_callers():
    def fail(item, module):
        if item == 3:
            raise ValueError("no")

    crew = Crew([tied()], 2)
    with pytest.raises(ValueError, match="no"):
        crew.run(fail, [1, 2, 3, 4])
    crew.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_update_that_fails_leaves_nothing_to_the_next(workers, monkeypatch):
    batch, found = batch_of(5, trees=4, members=4), []
    for failing in (False, True):
        model = tiny_model()
        learner = Learner(model, recipe("grpo"), LearnerConfig(lr=1e-3, micro_batch_tokens=32, workers=workers))
        if failing:
            calls = []
            original = learner.recipe.loss

            def loss(*arguments, calls=calls, original=original):
                calls.append(None)
                if len(calls) == 4:
                    raise ValueError("no")
                return original(*arguments)

            with monkeypatch.context() as patch:
                patch.setattr(learner.recipe, "loss", loss)
                with pytest.raises(ValueError, match="no"):
                    learner.update(batch)
        found.append(learner.update(batch)["grad_norm"])
        learner.close()
    assert found[0] == found[1]


def test_threads_end_with_the_crew():
    crew = Crew([tied()], 2)
    crew.run(forward, [torch.tensor([1]), torch.tensor([2])])
    assert any(thread.name.startswith("agentropy-update") for thread in threading.enumerate())
    crew.close()
    assert not any(thread.name.startswith("agentropy-update") for thread in threading.enumerate())


@pytest.mark.parametrize("unique", [True, False])
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_updates_of_a_crew_are_those_of_one_thread_and_repeat_themselves(name, unique):
    results = []
    for workers in (1, 2, 2):
        model = tiny_model()
        config = LearnerConfig(
            lr=1e-3, clip_norm=math.inf, micro_batch_tokens=64, workers=workers, unique_tokens=unique
        )
        learner = Learner(model, recipe(name), config)
        metrics = learner.update(batch_of(5, trees=4, members=4))
        kept = {key: value for key, value in metrics.items() if "second" not in key}
        results.append((kept, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])))
    assert results[1][0] == results[2][0] and torch.equal(results[1][1], results[2][1])
    for key in ("loss", "grad_norm", "mismatch/abs_mean"):
        assert results[1][0][key] == pytest.approx(results[0][0][key], rel=1e-4)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0, atol=2e-4)
