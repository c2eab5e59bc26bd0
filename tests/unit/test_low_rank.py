"""Adapted layers of one input, and what frozen weights cost: nothing in the backward pass."""

import dataclasses
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.adapters.lora import LoraSpec, adapter_parameters, attach
from model.attend import document_starts
from model.dropout import DropoutKey
from model.kernels import experts
from model.kernels.linear_cross_entropy import linear_cross_entropy_sum, linear_token_logprobs
from model.kernels.low_rank import low_rank_linears, low_rank_linears_reference
from model.linear import merged_linear
from model.loss import head_scores
from model.ops import REFERENCE, Ops, build_ops
from tests.unit.test_lora import tiny, tokens
from tests.unit.test_ops import WritesIntoOwnMemory

ALL = LoraSpec(r=4, alpha=8.0, targets=("all-linear",))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)
    return drawn.to(dtype).requires_grad_()


def inputs_of(dtype: torch.dtype, has_bias: bool, ranks: tuple[int, ...] = (2, 3), widths: tuple[int, ...] = (5, 7)):
    """(x, weights, biases, A, B) of two layers."""
    x = normal(2, 6, 4, dtype=dtype)
    weights = [normal(width, 4, dtype=dtype).detach() for width in widths]
    biases = [normal(width, dtype=dtype).detach() if has_bias else None for width in widths]
    a = [normal(rank, 4, seed=n, dtype=dtype) for n, rank in enumerate(ranks)]
    b = [normal(width, rank, seed=n, dtype=dtype) for n, (width, rank) in enumerate(zip(widths, ranks))]
    return x, weights, biases, a, b


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_adapted_layers_of_one_input(packed: bool, has_bias: bool):
    x, weights, biases, a, b = inputs_of(torch.float64, has_bias)
    expected = low_rank_linears_reference(x, weights, biases, a, b, 0.7)
    found = low_rank_linears(x, weights, biases, a, b, 0.7, packed)
    if packed:
        expected = [torch.cat(expected, dim=-1)]
    upstream = [normal(*y.shape).detach() for y in expected]
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one)
    of = [x, *a, *b]
    for one, other in zip(torch.autograd.grad(expected, of, upstream), torch.autograd.grad(found, of, upstream)):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("packed", [False, True])
def test_rounding_is_that_of_separate_operations(packed: bool):
    """In bfloat16, errors are compared with those of the plain formulas."""
    exact = inputs_of(torch.float64, True, (8, 8), (48, 32))
    rounded = tuple(_as_bfloat16(part) for part in exact)
    exact = tuple(_as(part, torch.float64) for part in rounded)

    def results(function: Callable, inputs: tuple, *more) -> list[Tensor]:
        y = torch.cat(list(function(*inputs, 0.7, *more)), dim=-1)
        return [y, *torch.autograd.grad(y, [inputs[0], *inputs[3], *inputs[4]], normal(*y.shape).to(y.dtype).detach())]

    plain = results(low_rank_linears_reference, rounded)
    for right, one, other in zip(
        results(low_rank_linears_reference, exact), plain, results(low_rank_linears, rounded, packed)
    ):
        of_plain, of_ours = (float((result.double() - right).detach().norm()) for result in (one, other))
        assert of_ours <= 2.0 * of_plain


def _as(part, dtype: torch.dtype):
    if isinstance(part, list):
        return [_as(one, dtype) for one in part]
    return part.detach().to(dtype).requires_grad_(part.requires_grad)


def _as_bfloat16(part):
    return _as(part, torch.bfloat16)


class Products(TorchDispatchMode):
    """Counts matrix multiplications, by name."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        if function in PRODUCTS:
            self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


PRODUCTS = (
    torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default,
    torch.ops.aten.bmm.default, torch.ops.zero2all.low_rank_linears.default,
)  # fmt: skip


LABELS = torch.tensor([1, 4, -100, 0, 2, 6])
WITH_A_WEIGHT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": nn.functional.linear,
    "merged_linear": lambda x, weight: merged_linear(x, weight[:3], weight[3:]),
    "half head": lambda x, weight: head_scores(x.half(), weight.half()),
    "linear_cross_entropy_sum": lambda x, weight: linear_cross_entropy_sum(x, weight, LABELS, use_triton=False),
    "linear_token_logprobs": lambda x, weight: linear_token_logprobs(x, weight, LABELS, use_triton=False),
}


@pytest.mark.parametrize("name", WITH_A_WEIGHT)
def test_a_frozen_weight_costs_no_product(name: str):
    """Of the three products of a layer, only two run; and its input is kept only for a weight that is trained."""
    counts, kept = {}, {}
    for is_trained in (True, False):
        x, weight = normal(6, 4, dtype=torch.float32), normal(7, 4, dtype=torch.float32)
        weight.requires_grad_(is_trained)
        sizes: list[tuple[int, ...]] = []

        def note(saved: Tensor, sizes=sizes) -> Tensor:
            sizes.append(tuple(saved.shape))
            return saved

        with Products() as products:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
                y = WITH_A_WEIGHT[name](x, weight)
            y.backward(torch.ones_like(y))
        assert (weight.grad is not None) == is_trained and x.grad is not None
        counts[is_trained], kept[is_trained] = products.counts.total(), sizes.count((6, 4))
    assert counts[True] - counts[False] == 1
    if name in ("linear", "merged_linear"):
        assert kept == {True: 1, False: 0}


def test_frozen_experts_cost_no_product(monkeypatch: pytest.MonkeyPatch):
    wanted, backward = [], experts._backward

    def noted(*arguments):
        wanted.append(arguments[-1])
        return backward(*arguments)

    monkeypatch.setattr(experts, "_backward", noted)
    x = normal(6, 4, dtype=torch.float32)
    matrices = [normal(2, 6, 4, dtype=torch.float32), normal(2, 4, 3, dtype=torch.float32)]
    chosen, weights = torch.tensor([[0], [1], [0], [1], [1], [0]]), torch.ones(6, 1)
    for are_trained in (True, False):
        for matrix in matrices:
            matrix.requires_grad_(are_trained)
        experts.sorted_experts(x, *matrices, chosen, weights).sum().backward()
    assert wanted == [True, False] and x.grad is not None


def trained(spec: LoraSpec, ops: Ops = REFERENCE, backend: Callable | None = None, **options):
    """(loss, gradients) of a model with an adapter, whose rows hold documents."""
    model = tiny(ops=ops, options=options)
    attach(model, spec, seed=3)
    with torch.no_grad():
        for number, parameter in enumerate(adapter_parameters(model).values()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    model.train()
    if backend is not None:
        torch._dynamo.reset()
        model.compile_blocks(backend=backend)
    documents = torch.tensor([[0] * 5 + [1] * 6, [0] * 11])
    starts = document_starts(documents) if model.wants_document_starts else None
    key = DropoutKey(3, torch.arange(2)) if model.drops else None
    hidden = model(tokens(), None, documents, dropout_key=key, document_starts=starts)
    loss = model.loss_sum(hidden, tokens().roll(-1, 1))
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in adapter_parameters(model).items()}


VARIANTS = {
    "lora": ALL, "dropout": dataclasses.replace(ALL, dropout=0.3), "dora": dataclasses.replace(ALL, use_dora=True),
    "dora, dropout": dataclasses.replace(ALL, use_dora=True, dropout=0.3),
    "some": LoraSpec(r=4, alpha=8.0, targets=("q_proj", "v_proj", "gate_proj"), modules_to_save=("lm_head",)),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_recomputation_gives_the_same_bits(name: str):
    loss, gradients = trained(VARIANTS[name])
    for keeps in ("nothing", "matmuls"):
        again, recomputed = trained(VARIANTS[name], gradient_checkpointing=True, checkpoint_keeps=keeps)
        assert again == loss
        assert all(torch.equal(gradient, recomputed[name]) for name, gradient in gradients.items())


BLOCKED = build_ops(dict(REFERENCE.names) | {"attention": "blocked"})
"""Told where documents begin, its attention needs no mask."""


def assert_alike(found: tuple[Tensor, dict], expected: tuple[Tensor, dict]) -> None:
    torch.testing.assert_close(found[0], expected[0])
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("name", VARIANTS)
def test_attention_by_documents(name: str):
    assert_alike(trained(VARIANTS[name], BLOCKED), trained(VARIANTS[name]))


@pytest.mark.parametrize("name", ["dora", "one with dropout"])
def test_compiled_blocks(name: str):
    one = LoraSpec(r=4, alpha=8.0, dropout=0.3, targets=("o_proj",))
    spec = (VARIANTS | {"one with dropout": one})[name]
    options = {"gradient_checkpointing": True, "checkpoint_keeps": "matmuls"}
    assert_alike(trained(spec, BLOCKED, WritesIntoOwnMemory(), **options), trained(spec))


def test_selective_recomputation_multiplies_once():
    counts = {}
    for keeps in ("all", "nothing", "matmuls"):
        options = {} if keeps == "all" else {"gradient_checkpointing": True, "checkpoint_keeps": keeps}
        with Products() as products:
            trained(ALL, **options)
        counts[keeps] = products.counts["low_rank_linears"]
    # Four groups in each of two blocks.
    assert counts == {"all": 8, "nothing": 16, "matmuls": 8}
