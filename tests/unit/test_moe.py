"""The layer with experts, against transformers' blocks, the obvious loop in float64 and formulas of its losses."""

import pytest
import torch
from torch import Tensor

from model import ModelConfig
from model.moe import SparseMLP
from model.ops import REFERENCE, build_ops

KERNELS = ("reference", "sorted", "grouped")


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
