"""Memory by formula (model/memory.py) against models that are built, and what their forward passes really keep."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from model import Decoder, ModelConfig, memory, shapes
from model.adapters.config import AdapterConfig
from model.adapters.lora import LoraSpec, attach
from model.kernels.blocked_attention import kept_size
from model.memory import TrainingPlan, estimate
from model.ops import IMPLEMENTATIONS, build_ops
from tests import kernel_checks

assert kernel_checks.KERNEL_MODULES, "the kernels run in Triton's interpreter"

CONFIG = ModelConfig(
    vocab_size=128, hidden_size=96, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
    intermediate_size=160, max_position_embeddings=64,
).resolve()  # fmt: skip
ALL_LINEAR = AdapterConfig(lora_r=4, lora_target_modules="all-linear")
QV = AdapterConfig(lora_r=4)
SHAPES = {
    "llama": CONFIG,
    "tied, biases, norms of heads": replace(CONFIG, tie_word_embeddings=True, attention_bias=True, qk_norm=True),
    "bloom": replace(CONFIG, norm="layernorm", mlp="gelu", mlp_bias=True, embedding_norm=True, qkv_bias=True),
    "yuan": replace(CONFIG, local_filter=True),
    "experts": replace(
        CONFIG, num_local_experts=4, num_shared_experts=2, moe_intermediate_size=32, router_bias=True, dense_layers="0"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_names_and_shapes_are_those_of_the_model(name: str):
    with torch.device("meta"):
        model = Decoder(SHAPES[name])
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes.parameters_of(SHAPES[name]) == built


@pytest.mark.parametrize("adapter", [QV, ALL_LINEAR], ids=["q, v", "all-linear"])
def test_parameters_that_train_are_those_of_the_adapted_model(adapter: AdapterConfig):
    model = Decoder(CONFIG)
    attach(model, LoraSpec.of(adapter), seed=0)
    built = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert shapes.trained_of(CONFIG, adapter) == built


def test_llamas_have_their_numbers_of_parameters():
    """As published: 6.74, 13.02 and 68.98 billion, and TinyLlama's 1.1."""
    numbers = {size: shapes.count(shapes.parameters_of(config.resolve())) for size, (_, config) in memory.SIZES.items()}
    assert numbers["7b"] == 6_738_415_616 and numbers["13b"] == 13_015_864_320 and numbers["70b"] == 68_976_648_192
    assert numbers["1.1b"] == 1_100_048_384 and numbers["125m"] // 1_000_000 == 123


def kept_bytes(model: nn.Module, plan: TrainingPlan) -> float:
    """Bytes of the storages that a forward pass keeps for the backward pass, parameters left out."""
    skipped = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in skipped:
            kept[pointer] = tensor
        return tensor

    ids = torch.zeros(plan.train_batch_size, plan.max_seq_len, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The graph must live while its tensors are counted.
        hidden = model(ids)
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def build(config: ModelConfig, plan: TrainingPlan) -> Decoder:
    """A model with the implementations that a plan names."""
    names = {op: next(name for name, found in named.items() if found.is_plain) for op, named in IMPLEMENTATIONS.items()}
    if plan.fused:
        names |= {"rms_norm": "triton", "rope": "triton", "swiglu": "triton"}
    names["attention"] = "sdpa" if plan.blocked_weights is None else "blocked"
    names["experts"] = "sorted"
    model = Decoder(config, plan.gradient_checkpointing, plan.checkpoint_keeps, build_ops(names))
    if plan.adapter.is_used:
        attach(model, LoraSpec.of(plan.adapter), seed=0)
    return model.to(getattr(torch, plan.dtype)).train()


PLAN = TrainingPlan(train_batch_size=2, max_seq_len=64)
PLAIN = replace(PLAN, fused=False)
BLOCKED = replace(PLAIN, blocked_weights=kept_size(2, 6, 64, 16))
CASES = {
    "bfloat16": (CONFIG, PLAN),
    "float32": (CONFIG, replace(PLAN, dtype="float32")),
    "stream in bfloat16": (replace(CONFIG, residual_in_fp32=False), PLAN),
    "on a CPU": (CONFIG, PLAIN),
    "on a CPU in float32": (CONFIG, replace(PLAIN, dtype="float32")),
    "on a CPU in blocks": (CONFIG, BLOCKED),
    "norms of heads": (replace(CONFIG, qk_norm=True), PLAN),
    "bloom": (SHAPES["bloom"], PLAN),
    "experts on a CPU": (replace(SHAPES["experts"], dense_layers=""), PLAIN),
    "LoRA": (CONFIG, replace(PLAN, adapter=QV)),
    "LoRA of all": (CONFIG, replace(PLAN, adapter=ALL_LINEAR)),
    "LoRA on a CPU": (CONFIG, replace(PLAIN, adapter=QV)),
    "LoRA of all on a CPU in blocks": (CONFIG, replace(BLOCKED, adapter=ALL_LINEAR)),
    "checkpointing": (CONFIG, replace(PLAN, gradient_checkpointing=True)),
    "checkpointing but for matmuls": (CONFIG, replace(PLAIN, gradient_checkpointing=True, checkpoint_keeps="matmuls")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_block_keeps_what_the_formula_says(name: str):
    """The difference of two depths, as the first block of an adapted model needs less."""
    config, plan = CASES[name]
    measured = [kept_bytes(build(replace(config, num_hidden_layers=n), plan), plan) for n in (2, 3)]
    expected = [memory.activation_bytes(replace(config, num_hidden_layers=n), plan) for n in (2, 3)]
    assert measured[1] - measured[0] == pytest.approx(expected[1] - expected[0], rel=0.02)
    if not plan.adapter.is_used:
        # Beside the blocks: rotary tables and token ids, which are not counted.
        assert measured[0] == pytest.approx(expected[0], rel=0.1)
