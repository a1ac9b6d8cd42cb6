"""The benchmark of the kernels runs, and compares variants that compute the same thing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from agentropy.benchmarks.kernel_peers import OURS, head_variants
from agentropy.benchmarks.kernels import exact, main, make_problem
from agentropy.errors import UsageError


@pytest.mark.parametrize("name", head_variants("cpu"))
def test_every_variant_of_the_head_computes_the_same(name: str) -> None:
    problem = make_problem((600, 16, 301), torch.float32, "cpu", spread=3)
    loss, logprob, entropy = head_variants("cpu")[name](problem)
    truth = exact(problem, 600)
    torch.testing.assert_close(logprob.double(), truth[0], atol=2e-5, rtol=0)
    assert entropy is not None
    torch.testing.assert_close(entropy.double(), truth[1], atol=2e-5, rtol=0)
    grads = torch.autograd.grad(loss, (problem.hidden, problem.weight))
    wide = problem._replace(
        hidden=problem.hidden.detach().double().requires_grad_(),
        weight=problem.weight.detach().double().requires_grad_(),
    )
    expected = torch.autograd.grad(head_variants("cpu")["naive autograd"](wide)[0], (wide.hidden, wide.weight))
    for grad, other in zip(grads, expected, strict=True):
        assert float((grad - other).norm() / other.norm()) < 1e-5


def test_it_runs_and_says_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    assert main(["--quick", "--repetitions", "1", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert {"cpu", "git_commit", "packages"} <= report["machine"].keys()
    head = report["tables"]["head, 256 tokens x 128 x 4099, bfloat16"]
    rows = {row["variant"]: row for row in head}
    assert rows.keys() == head_variants("cpu").keys()
    assert not any("failed" in row for row in head)
    assert rows[OURS]["logprob_error"] < 1e-4 < rows["naive autograd"]["logprob_error"]
    assert rows[OURS]["slower"] == 1 and all(row["seconds"] > 0 for row in head)


def test_bad_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        main(["--peers", str(tmp_path / "absent")])
    with pytest.raises(UsageError, match="--repetitions"):
        main(["--repetitions", "-1"])
