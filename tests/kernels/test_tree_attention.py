"""Attention over a pack is attention over each row alone, in an operation and in whole models, with gradients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentropy.errors import UsageError
from agentropy.kernels import attention_pieces, trees
from agentropy.kernels.tree_attention import supports_tree_attention, tree_attention, use_tree_attention
from agentropy.kernels.trees import TreePack, pack_tree, tree_mask

transformers = pytest.importorskip("transformers")


def forest(seed: int, depth: int = 4, longest: int = 9, roots: int = 3) -> list[np.ndarray]:
    """Rows of random trees: every node of up to ``longest`` tokens has one to three children."""
    rng = np.random.default_rng(seed)
    rows: list[np.ndarray] = []

    def grow(row: np.ndarray, left: int) -> None:
        row = np.append(row, rng.integers(0, 50, rng.integers(1, longest + 1)))
        if not left or rng.random() < 0.1:
            rows.append(row)
        for _ in range(rng.integers(1, 4) if left else 0):
            grow(row, left - 1)

    for _ in range(roots):
        grow(np.zeros(0, int), depth - 1)
    return [rows[i] for i in rng.permutation(len(rows))]


def reference(q: Tensor, k: Tensor, v: Tensor, end: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores.masked_fill(~tree_mask(end), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1).T


def draw(total: int, heads: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(total, heads[0], sizes[0]), (total, heads[1], sizes[0]), (total, heads[1], sizes[1])]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def errors(pack: TreePack, inputs: list[Tensor], scale: float) -> list[float]:
    """Largest differences from the dense reference in float64: out, log-sum-exp, then relative ones of gradients."""
    out, lse = tree_attention(*inputs, pack, scale=scale)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected, expected_lse = reference(*exact, pack.end, scale)
    assert out.dtype == inputs[0].dtype and not lse.requires_grad
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    found = torch.autograd.grad(out, inputs, upstream)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    with torch.no_grad():
        worst = [float((out - expected).abs().max()), float((lse - expected_lse).abs().max())]
        return worst + [float((a - b).norm() / b.norm().clamp_min(1)) for a, b in zip(found, wanted, strict=True)]


@pytest.fixture(params=["repeated", "rectangles", "halved"])
def plans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Small trees planned as large ones are."""
    if request.param != "repeated":
        monkeypatch.setattr(trees, "_short", lambda *_: False)
    if request.param == "halved":
        monkeypatch.setattr(trees, "LEAF", 2)
    yield request.param


@pytest.mark.parametrize(
    ("dtype", "heads", "sizes", "bounds"),
    [
        (torch.float64, (4, 2), (8, 8), (1e-13,) * 3),
        (torch.float64, (3, 3), (8, 4), (1e-13,) * 3),  # head sizes that the CPU's kernel refuses
        (torch.float32, (6, 2), (16, 16), (5e-6, 5e-6, 2e-6)),
        (torch.float32, (2, 1), (8, 16), (5e-6, 5e-6, 2e-6)),
        (torch.bfloat16, (4, 2), (16, 16), (4e-2, 1e-3, 1e-2)),
    ],
)
def test_equals_dense_attention(
    plans: str, dtype: torch.dtype, heads: tuple[int, int], sizes: tuple[int, int], bounds: tuple[float, ...]
) -> None:
    for seed in range(3):
        pack = pack_tree(forest(seed))
        worst = errors(pack, draw(len(pack.end), heads, sizes, dtype, seed), 0.3)
        assert all(e <= b for e, b in zip(worst, [*bounds[:2], *[bounds[2]] * 3], strict=True)), (seed, worst)


def test_long_rows_equal_dense_attention_as_they_are_planned() -> None:
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, 50, 300)
    rows = [np.append(prefix, rng.integers(0, 50, n)) for n in (150, 7, 141, 290)] + [rng.integers(0, 50, 133)]
    pack = pack_tree(rows)
    assert pack.plan.rectangles and any(batch.index.shape[1] > 2 * trees.LEAF for batch in pack.plan.batches)
    assert max(errors(pack, draw(len(pack.end), (4, 2), (8, 8), torch.float64, 0), 0.3)) < 1e-13


@pytest.mark.parametrize("missing", ["_flash", "_grouped"])
def test_without_the_cpu_kernel_or_its_grouped_heads_results_are_the_same(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_pieces, missing, lambda: None)
    pack = pack_tree(forest(5))
    assert max(errors(pack, draw(len(pack.end), (4, 2), (8, 8), torch.float64, 5), 0.3)) < 1e-13


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), max_size=6), max_size=8), st.integers(0, 99))
def test_small_forests_equal_dense_attention(rows: list[list[int]], seed: int) -> None:
    pack = pack_tree(rows)
    inputs = draw(len(pack.end), (2, 1), (8, 8), torch.float64, seed)
    if not len(pack.end):
        assert tree_attention(*inputs, pack)[0].shape == (0, 2, 8)
        return
    assert max(errors(pack, inputs, 0.5)) < 1e-13
    by_end, _ = tree_attention(*inputs, pack.end)
    assert torch.equal(by_end, tree_attention(*inputs, pack)[0])


def test_any_strides_will_do() -> None:
    for rows in (forest(7), [[1, 2, 3, 4], [5, 6, 7, 8]]):
        pack = pack_tree(rows)
        dense = draw(len(pack.end), (4, 2), (8, 8), torch.float64, 7)
        expected, _ = tree_attention(*dense, pack)
        for order in ((1, 0, 2), (0, 2, 1), (2, 1, 0)):
            back = [order.index(axis) for axis in range(3)]
            strided = [x.detach().permute(order).contiguous().permute(back).requires_grad_() for x in dense]
            out, _ = tree_attention(*strided, pack)
            torch.testing.assert_close(out, expected)
            found, wanted = (
                torch.autograd.grad(y.sum(), xs, retain_graph=True) for y, xs in ((out, strided), (expected, dense))
            )
            torch.testing.assert_close(found, wanted)


def test_gradients_pass_gradcheck_and_only_once() -> None:
    pack = pack_tree([[1, 2, 3], [1, 2, 4, 5], [6]])
    inputs = draw(len(pack.end), (2, 1), (4, 4), torch.float64, 0)
    assert torch.autograd.gradcheck(lambda *x: tree_attention(*x, pack)[0], inputs)
    out, _ = tree_attention(*inputs, pack)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_repeats_to_the_bit() -> None:
    pack = pack_tree(forest(2, longest=60))
    runs = []
    for _ in range(2):
        inputs = draw(len(pack.end), (4, 2), (16, 16), torch.float32, 2)
        out, lse = tree_attention(*inputs, pack)
        out.sum().backward()
        runs.append([out.detach(), lse, *(x.grad for x in inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_wrong_input_is_named() -> None:
    pack = pack_tree([[1, 2], [1, 3]])
    q, k = torch.zeros(3, 4, 8), torch.zeros(3, 3, 8)
    with pytest.raises(UsageError, match="multiple of Hk"):
        tree_attention(q, k, k, pack)
    with pytest.raises(UsageError, match="as many queries and keys as packed tokens"):
        tree_attention(q[:2], k[:2], k[:2], pack)
    with pytest.raises(UsageError, match="expected one floating type"):
        tree_attention(q, q.double(), q, pack)
    with pytest.raises(UsageError, match=r"expected \[T, Hq, D\]"):
        tree_attention(q, k[0], k, pack)
    with pytest.raises(UsageError, match="did you mean 'torch'"):
        tree_attention(q, q, q, pack, backend="torhc")  # type: ignore[arg-type]


SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def build(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    if kind == "GPT2":
        sizes: dict[str, Any] = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    elif kind == "GPTNeoX":
        sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    else:
        sizes = dict(SIZES)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    config = getattr(transformers, f"{kind}Config")(**sizes | ids | options)
    suffix = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model = getattr(transformers, kind + suffix)(config).eval()
    # At initialisation attention says almost nothing; larger weights make every wrong key visible.
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    return model


def grads(model: Any, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compare(model: Any, rows: list[np.ndarray]) -> tuple[float, float]:
    """Largest difference of logits from those of each row alone, and the relative one of parameters' gradients."""
    pack = pack_tree(rows)
    with use_tree_attention(model, pack):
        packed = model(input_ids=pack.tokens[None], position_ids=pack.positions[None]).logits[0]
    alone = [model(input_ids=torch.from_numpy(row)[None]).logits[0] for row in rows]
    own = [packed[place[: len(row)]] for place, row in zip(pack.place, rows, strict=True)]
    worst = max(float((a - b).detach().abs().max()) for a, b in zip(own, alone, strict=True))
    found, wanted = (grads(model, sum(x.float().log_softmax(-1)[:, 3].sum() for x in xs)) for xs in (own, alone))
    return worst, float((found - wanted).norm() / wanted.norm())


# Those whose norms and rotations keep float64 throughout.
@pytest.mark.parametrize("kind", ["GPT2", "GPTNeoX"])
def test_a_model_in_float64_computes_each_row_as_alone(kind: str) -> None:
    model = build(kind).double()
    worst, gradient = compare(model, forest(1))
    assert worst <= 1e-12
    assert gradient < 1e-12


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_a_model_in_fp32_computes_each_row_as_alone(kind: str, plans: str) -> None:
    model = build(kind, **({"sliding_window": None} if kind == "Mistral" else {}))
    rows = forest(2)
    rows += [rows[0], rows[1][:-1], rows[2][:1]]  # equal rows and beginnings of others
    worst, gradient = compare(model, rows)
    assert worst < 5e-6 and gradient < 2e-6


def test_bfloat16_and_autocast_are_close() -> None:
    rows = forest(3)
    worst, gradient = compare(build("Llama").bfloat16(), rows)
    assert worst < 0.05 and gradient < 0.03
    model = build("Llama")
    with torch.autocast("cpu", torch.bfloat16):
        worst, gradient = compare(model, rows)
    assert worst < 0.05 and gradient < 0.03


def test_the_order_of_siblings_changes_no_leaf() -> None:
    model = build("Qwen3")
    rows = forest(4)
    # The same tree with tokens renamed, so that siblings are packed in the opposite order.
    renamed = [49 - row for row in rows]
    flipped = build("Qwen3")
    flipped.load_state_dict(model.state_dict())
    flipped.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.flip(0)
    leaves = []
    for net, these in ((model, rows), (flipped, renamed)):
        pack = pack_tree(these)
        with torch.no_grad(), use_tree_attention(net, pack):
            hidden = net.model(input_ids=pack.tokens[None], position_ids=pack.positions[None])[0][0]
        leaves.append(torch.stack([hidden[place[len(row) - 1]] for place, row in zip(pack.place, these, strict=True)]))
    torch.testing.assert_close(*leaves, rtol=0, atol=2e-5)


def test_gradient_checkpointing_inside_the_block_gives_the_same_gradients() -> None:
    model = build("Llama", attention_dropout=0.0).train()
    pack = pack_tree(forest(6))
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with use_tree_attention(model, pack):
            logits = model(input_ids=pack.tokens[None], position_ids=pack.positions[None], use_cache=False).logits
            found.append(grads(model, logits.square().mean()))
    torch.testing.assert_close(*found)


def test_the_configuration_is_as_it_was(tmp_path: Path) -> None:
    model = build("Llama")
    before, pack = model.config._attn_implementation, pack_tree([[1, 2], [1, 3]])
    with use_tree_attention(model, pack):
        assert model.config._attn_implementation != before
        model.save_pretrained(tmp_path)
        with use_tree_attention(model, pack_tree([[5]])):
            pass
        inner = model(input_ids=pack.tokens[None], position_ids=pack.positions[None]).logits
    assert inner.shape[1] == 3
    assert "agentropy_tree" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert model.config._attn_implementation == before
    with pytest.raises(ZeroDivisionError), use_tree_attention(model, pack):
        raise ZeroDivisionError
    assert model.config._attn_implementation == before
    model.train()
    assert supports_tree_attention(model) and model.training
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == before


def test_models_that_would_be_inexact_are_refused() -> None:
    pack = pack_tree([np.arange(12), np.append(np.arange(6), 40)])
    assert supports_tree_attention(build("Llama"))
    for model in (
        build("Mistral", sliding_window=4),
        build("Gemma2", attn_logit_softcapping=5.0, head_dim=8),
        build("Llama", attention_dropout=0.1).train(),
        torch.nn.Linear(2, 2),
    ):
        assert not supports_tree_attention(model)
        with pytest.raises(UsageError, match=f"{type(model).__name__} does not compute the same"):
            use_tree_attention(model, pack).__enter__()

    window = build("Mistral", sliding_window=8)
    assert supports_tree_attention(window), "paths within the window are exact"
    with pytest.raises(UsageError, match="reads 8 tokens back; a path here has 12"), use_tree_attention(window, pack):
        window(input_ids=pack.tokens[None], position_ids=pack.positions[None])
    beside = build("Mistral", sliding_window=8)
    with use_tree_attention(build("Llama"), pack):  # as in another thread, whose paths are not this model's
        assert supports_tree_attention(beside)
        with use_tree_attention(beside, pack_tree([[1, 2, 3], [1, 4]])):
            beside(input_ids=torch.tensor([[1, 2, 3, 4]]), position_ids=torch.tensor([[0, 1, 2, 1]]))
    dropped = build("Llama", attention_dropout=0.1)
    assert supports_tree_attention(dropped), "in evaluation mode there is no dropout"

    model = build("Llama")
    call: dict[str, Any] = {"input_ids": pack.tokens[None], "position_ids": pack.positions[None]}
    dense = torch.zeros(1, 1, len(pack.tokens), len(pack.tokens))
    with pytest.raises(UsageError, match="asks for attention_mask"), use_tree_attention(model, pack):
        model(**call, attention_mask=dense)
    with pytest.raises(UsageError, match="expected one packed sequence"), use_tree_attention(model, pack):
        model(input_ids=pack.tokens[None].expand(2, -1), position_ids=pack.positions[None])
    model.config._attn_implementation = "agentropy_tree"
    with pytest.raises(UsageError, match="outside `use_tree_attention`"):
        model(**call)
