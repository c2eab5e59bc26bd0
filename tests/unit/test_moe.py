"""The layer with experts: against transformers' blocks, and its kernels against the obvious loop in float64."""

import collections

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from model import ModelConfig
from model.decoder import _checkpoint_options
from model.kernels.experts import _ZeroWithoutTokens, experts_reference, grouped_experts, sort_by_expert, sorted_experts
from model.layer_losses import BALANCE, LayerLosses, Z, add_loss, router_sums
from model.moe import Router, SparseMLP
from model.ops import REFERENCE, build_ops

FUNCTIONS = {"reference": experts_reference, "sorted": sorted_experts, "grouped": grouped_experts}
KERNELS = tuple(FUNCTIONS)


def config_with(**fields) -> ModelConfig:
    return ModelConfig(**{
        "vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 32, "num_local_experts": 6, "num_experts_per_tok": 2,
    } | fields).resolve()  # fmt: skip


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def layer_of(config: ModelConfig, kernel: str = "sorted", seed: int = 0) -> SparseMLP:
    layer = SparseMLP(config, build_ops(dict(REFERENCE.names) | {"experts": kernel}))
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed + 100 + number, scale=0.3))
    return layer


def their_block(kind: str, ours: SparseMLP):
    """transformers' block of a kind with our layer's weights, and name of our parameter -> theirs."""
    shape = {"hidden_size": 24, "num_experts_per_tok": 2}
    router, weights = ours.router, {name: p.detach() for name, p in ours.named_parameters()}
    names = {
        "router.weight": "gate.weight", "experts.gate_up_proj": "experts.gate_up_proj",
        "experts.down_proj": "experts.down_proj",
    }  # fmt: skip
    if kind == "mixtral":
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock as Block

        config = MixtralConfig(intermediate_size=40, num_local_experts=6, **shape)
    elif kind == "qwen3_moe":
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock as Block

        config = Qwen3MoeConfig(moe_intermediate_size=40, num_experts=6, norm_topk_prob=router.normalizes, **shape)
    else:
        from transformers import Ernie4_5_MoeConfig
        from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeSparseMoeBlock as Block

        shape["moe_k"] = shape.pop("num_experts_per_tok")
        config = Ernie4_5_MoeConfig(moe_intermediate_size=40, moe_num_experts=6, moe_num_shared_experts=2, **shape)
        shared = {f"shared_expert.{name}_proj.weight": f"shared_experts.{name}_proj.weight"
                  for name in ("gate", "up", "down")}  # fmt: skip
        names |= {"router.selection_bias": "gate.moe_statics.e_score_correction_bias"} | shared
    config._experts_implementation = "eager"
    block = Block(config)
    assert {name for name, _ in block.named_parameters()} == set(names.values())
    theirs = {their: weights[our].view(block.get_parameter(their).shape) for our, their in names.items()}
    block.load_state_dict(theirs)
    return block, names


BLOCKS = {
    "mixtral": {}, "qwen3_moe": {}, "qwen3_moe without a sum of 1": {"norm_topk_prob": False},
    "ernie4_5_moe": {"num_shared_experts": 2, "router_bias": True},
}  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_output_and_gradients_are_those_of_transformers(kind: str, kernel: str):
    ours = layer_of(config_with(**BLOCKS[kind]), kernel)
    theirs, names = their_block(kind.split()[0], ours)
    x, dy = draw(3, 7, 24, seed=1), draw(3, 7, 24, seed=2)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for block, leaf in zip((ours, theirs), inputs):
        y = block(leaf)
        (y[0] if block is ours else y).backward(dy)
    assert torch.allclose(ours(x)[0], theirs(x), rtol=1e-5, atol=1e-5)
    assert torch.allclose(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-5)
    for our, their in names.items():
        found, expected = ours.get_parameter(our).grad, theirs.get_parameter(their).grad
        if our == "router.selection_bias":
            assert found is None and expected is None
        else:
            assert torch.allclose(found, expected.view(found.shape), rtol=1e-5, atol=1e-5), our


LOADS = {
    "drawn": lambda: draw(40, 6).topk(2).indices,
    "experts without tokens": lambda: draw(40, 3).topk(2).indices * 2,
    "all to the same two": lambda: torch.tensor([[4, 1]]).expand(40, 2),
    "one token": lambda: torch.tensor([[5, 0]]),
    "all experts": lambda: draw(9, 6).topk(6).indices,
    "one expert each": lambda: draw(40, 6).topk(1).indices,
}  # fmt: skip


def results(function, chosen: Tensor, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """(y, dx, dW, dD, dw) of a kernel on rounded inputs that do not depend on the dtype."""
    num, places = chosen.shape
    x, gate_up, down, dy = (
        draw(*shape, seed=10 * seed + number, scale=1.0 if len(shape) == 2 else 0.3).bfloat16().to(dtype)
        for number, shape in enumerate(((num, 24), (6, 32, 24), (6, 24, 16), (num, 24)))
    )
    weights = draw(num, places, seed=10 * seed + 9).softmax(-1).to(torch.promote_types(dtype, torch.float32))
    leaves = [leaf.requires_grad_() for leaf in (x, gate_up, down, weights)]
    y = function(x, gate_up, down, chosen, weights)
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["sorted", "grouped"])
def test_kernels_err_no_more_than_the_obvious_loop(kernel: str, dtype: torch.dtype, load: str):
    """Largest error at most twice the loop's, or one unit in the last place; root mean square at most 1.5 times it."""
    chosen = LOADS[load]()

    def drawn(function, dtype: torch.dtype) -> list[Tensor]:
        seeds = range(8 if len(chosen) > 1 else 64)
        return [torch.stack(draws) for draws in zip(*(results(function, chosen, dtype, seed) for seed in seeds))]

    functions = (FUNCTIONS[kernel], dtype), (experts_reference, dtype), (experts_reference, torch.float64)
    all_results = zip(*(drawn(function, of_dtype) for function, of_dtype in functions))
    for name, (ours, eager, exact) in zip(("y", "dx", "dW", "dD", "dw"), all_results):
        assert ours.dtype == eager.dtype and ours.shape == eager.shape
        error, eager_error = (x.double() - exact for x in (ours, eager))
        unit = torch.finfo(ours.dtype).eps * 2.0 ** exact.abs().max().log2().floor().item()
        assert error.square().mean().sqrt() <= max(1.5 * eager_error.square().mean().sqrt(), unit / 4), name
        # The largest error of a few numbers is luck.
        assert len(chosen) == 1 or error.abs().max() <= max(2 * eager_error.abs().max(), unit), name


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_expert_without_a_token_has_a_gradient_of_zero(kernel: str):
    *_, dgate_up, ddown, _ = results(FUNCTIONS[kernel], LOADS["experts without tokens"](), torch.bfloat16)
    for gradient in (dgate_up, ddown):
        assert not gradient[1::2].any() and gradient[::2].flatten(1).any(1).all()


def test_what_a_grouped_multiplication_leaves_for_experts_without_tokens_is_not_a_gradient():
    matrices, ends = draw(4, 3, 2).requires_grad_(), torch.tensor([0, 5, 5, 9], dtype=torch.int32)
    garbage = draw(4, 3, 2, seed=1)
    garbage[[0, 2]] = torch.nan
    _ZeroWithoutTokens.apply(matrices, ends).backward(garbage)
    assert torch.equal(matrices.grad, garbage.nan_to_num(0.0))


def test_gradients_of_the_sorted_kernel_are_those_of_its_output():
    chosen = LOADS["experts without tokens"]()[:5]
    leaves = [draw(*shape, seed=seed).double().requires_grad_()
              for seed, shape in enumerate(((5, 4), (6, 6, 4), (6, 4, 3), (5, 2)))]  # fmt: skip
    assert torch.autograd.gradcheck(lambda x, w, d, weights: sorted_experts(x, w, d, chosen, weights), leaves)


def test_frozen_experts_pass_the_gradient_on():
    layer = layer_of(config_with())
    layer.experts.requires_grad_(False)
    x = draw(2, 5, 24).requires_grad_()
    layer(x)[0].sum().backward()
    frozen, layer = x.grad.clone(), layer_of(config_with())
    assert layer.experts.down_proj.grad is None
    x.grad = None
    layer(x)[0].sum().backward()
    assert torch.equal(frozen, x.grad)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_arrive_in_reverse_of_their_use(kernel: str):
    layer, arrived = layer_of(config_with(num_shared_experts=1), kernel), []
    for name, parameter in layer.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    layer(draw(2, 5, 24))[0].sum().backward()
    assert arrived == [name for name, _ in layer.named_parameters()][::-1]


def test_pairs_are_sorted_by_expert():
    chosen = torch.tensor([[3, 0], [0, 2], [3, 2]])
    tokens, places, ends = sort_by_expert(chosen, 5)
    assert tokens.tolist() == [0, 1, 1, 2, 0, 2] and ends.tolist() == [2, 2, 4, 6, 6] and ends.dtype == torch.int32
    assert torch.equal(chosen.flatten().sort(stable=True)[0][places], chosen)


def test_without_gradients_nothing_is_kept_and_the_output_is_the_same():
    chosen = LOADS["drawn"]()
    tensors = draw(40, 16), draw(6, 24, 16), draw(6, 16, 12), chosen, draw(40, 2).softmax(-1)
    with torch.no_grad():
        alone = sorted_experts(*tensors)
    assert torch.equal(alone, sorted_experts(*tensors))


def loss_and_gradients(layer: nn.Module, run) -> list[Tensor]:
    x = draw(3, 7, 24, seed=1).requires_grad_()
    losses = LayerLosses(torch.tensor([7.0, 5.0, 6.0]), torch.tensor(0.3), torch.rand(3, 7) < 2.0)
    y, sums = run(x, losses)
    (y * draw(3, 7, 24, seed=2)).sum().backward()
    found = [y.detach(), sums, x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]
    layer.zero_grad()
    return found


SPARSE = {"router_z_loss_coef": 0.1, "router_aux_loss_coef": 0.1, "num_shared_experts": 1, "router_bias": True}


@pytest.mark.parametrize("kernel", ["sorted", "grouped"])
def test_the_same_bits_again_and_when_recomputed(kernel: str):
    layer = layer_of(config_with(**SPARSE), kernel)
    expected = loss_and_gradients(layer, layer)
    for keeps in ("nothing", "matmuls"):
        found = loss_and_gradients(
            layer, lambda x, losses, keeps=keeps: checkpoint(layer, x, losses, **_checkpoint_options(keeps))
        )
        assert all(map(torch.equal, expected, found)), keeps


class Count(TorchDispatchMode):
    """Counts the calls of operators, by their names."""

    def __init__(self):
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.name()] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kernel", "operator", "again", "once"), [
    ("sorted", "zero2all::sorted_experts", 2, 1), ("grouped", "aten::_grouped_mm", 4 + 4, 2 + 4),
])  # fmt: skip
def test_recomputation_that_keeps_matmuls_runs_the_experts_once(kernel: str, operator: str, again: int, once: int):
    layer = layer_of(config_with(), kernel)
    for keeps, expected in (("nothing", again), ("matmuls", once)):
        with Count() as count:
            loss_and_gradients(layer, lambda x, losses, k=keeps: checkpoint(layer, x, losses, **_checkpoint_options(k)))
        assert count.calls[operator] == expected, keeps


@pytest.mark.parametrize("aux", ["row", "batch"])
def test_the_layer_compiles_into_one_graph(aux: str):
    torch._dynamo.reset()
    layer = layer_of(config_with(router_aux_loss=aux, **SPARSE))
    expected = loss_and_gradients(layer, layer)
    found = loss_and_gradients(layer, torch.compile(layer, backend="aot_eager", fullgraph=True))
    for ours, other in zip(found, expected):
        assert torch.allclose(ours, other, rtol=1e-5, atol=1e-6)


def test_grouped_multiplication_compiles_into_one_graph_in_bfloat16():
    torch._dynamo.reset()
    layer = layer_of(config_with(), "grouped").bfloat16()
    x = draw(3, 7, 24).bfloat16()
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x)[0], layer(x)[0])


def test_widths_that_the_grouped_multiplication_cannot_take_are_refused():
    with pytest.raises(ValueError, match="multiples of 8, not 24 and 20: give --experts_kernel=sorted"):
        layer_of(config_with(moe_intermediate_size=20), "grouped")


def test_the_bias_acts_on_the_choice_alone():
    router = Router(config_with(router_bias=True, norm_topk_prob=False))
    with torch.no_grad():
        router.weight.copy_(draw(6, 24))
    x = draw(11, 24, seed=1)
    _, probs, before, weights = router(x)
    assert torch.equal(weights, probs.gather(1, before))
    with torch.no_grad():
        router.selection_bias[3] = 2.0
    _, again, after, weights = router(x)
    assert (after[:, 0] == 3).all() and torch.equal(again, probs) and torch.equal(weights, probs.gather(1, after))
    weights.sum().backward()
    assert router.selection_bias.grad is None and router.weight.grad is not None


def test_equal_probabilities_are_chosen_among_as_by_topk():
    probs = torch.full((4, 6), 1 / 6)
    assert torch.equal(Router(config_with())(draw(4, 24))[2], probs.topk(2).indices)


def test_the_bias_stays_in_float32():
    layer = layer_of(config_with(router_bias=True))
    values = layer.router.selection_bias.detach().clone()
    layer.to(torch.bfloat16)
    assert layer.router.weight.dtype == torch.bfloat16 and layer(draw(1, 3, 24).bfloat16())[0].dtype == torch.bfloat16
    assert layer.router.selection_bias.dtype == torch.float32 and torch.equal(layer.router.selection_bias, values)
    assert [name for name, _ in layer.router.named_parameters()] == ["weight", "selection_bias"]
    with torch.device("meta"):
        empty = SparseMLP(config_with(router_bias=True))
    empty.to_empty(device="cpu").bfloat16().load_state_dict(layer.state_dict())
    assert torch.equal(empty.router.selection_bias, values) and not empty.router.selection_bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_enter_the_gradient_as_if_they_had_been_added(dtype: torch.dtype):
    config = config_with(router_aux_loss_coef=0.7, router_z_loss_coef=0.2)
    layer = layer_of(config).to(dtype)
    x, dy = draw(2, 5, 24, seed=1).to(dtype), draw(2, 5, 24, seed=2).to(dtype)
    losses = LayerLosses(torch.tensor([5.0, 3.0]), torch.tensor(0.25))
    y, sums = layer(x, losses)
    assert torch.equal(y, layer(x)[0]) and not sums.requires_grad
    y.backward(dy)
    found = layer.router.weight.grad.clone()
    layer.zero_grad()
    y, _ = layer(x)
    scores, probs, chosen, _ = layer.router(x.flatten(0, 1))
    by_hand = router_sums(*(t.unflatten(0, (2, 5)) for t in (scores, probs, chosen)), losses, True)
    ((y * dy).sum() + 0.25 * (0.7 * by_hand[BALANCE] + 0.2 * by_hand[Z])).backward()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    assert torch.allclose(found, layer.router.weight.grad, **tolerance)
    assert torch.equal(add_loss(x, sums[BALANCE], losses.scale), x)
