"""Tensor and sequence parallelism on groups of gloo processes, against one process that has the whole model in float64.

A group is spawned once and works through all cases.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from model import Decoder, ModelConfig, hf
from model.adapters import lora
from model.adapters.lora import LoraSpec
from model.divided import outline_of_part
from model.ops import build_ops
from parallel.config import ParallelConfig
from parallel.context import DistContext, destroy_context, init_context
from parallel.mesh import Mesh, plan_mesh
from parallel.torch_engines.cutting import Cutter
from parallel.torch_engines.tensor import check
from serving.generation import generate
from tasks.language_model import LanguageModelTask
from tests.dist.group import run_ranks

ROWS, LENGTH, VOCAB = 3, 12, 32
CPU = torch.device("cpu")
LLAMA = ModelConfig(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=LENGTH,
).resolve()  # fmt: skip
MIXTRAL = ModelConfig(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=8, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=4, num_local_experts=5, moe_intermediate_size=8, router_aux_loss_coef=0.1,
    router_z_loss_coef=0.05, max_position_embeddings=LENGTH,
).resolve()  # fmt: skip
ERNIE = replace(
    MIXTRAL, num_shared_experts=1, intermediate_size=16, dense_layers="0", router_aux_loss="batch", router_bias=True,
    rope_interleaved=True,
).resolve()  # fmt: skip
ALL_LINEAR = LoraSpec(r=3, alpha=6.0, targets=("all-linear",))


@dataclass(frozen=True)
class Case:
    model: ModelConfig = LLAMA
    sequence_parallel: bool = False
    adapter: LoraSpec | None = None
    dtype: torch.dtype = torch.float32
    keeps: str = "all"
    is_packed: bool = False
    is_compiled: bool = False
    length: int = LENGTH
    experts: str = "reference"
    tolerance: float = 1e-6
    """Largest relative norm of the difference of all gradients, and relative difference of the loss."""


CASES = {
    "llama": Case(),
    "llama sp": Case(sequence_parallel=True),
    "qwen2": Case(replace(LLAMA, qkv_bias=True, tie_word_embeddings=True), is_packed=True),
    "qwen3 sp": Case(replace(LLAMA, qk_norm=True, tie_word_embeddings=True, sliding_window=5), True, is_packed=True),
    "biases": Case(replace(LLAMA, attention_bias=True, mlp_bias=True, residual_in_fp32=True)),
    "biases sp": Case(replace(LLAMA, attention_bias=True, mlp_bias=True), True, length=11),
    "baichuan 2": Case(replace(LLAMA, num_key_value_heads=8, normalized_head=True)),
    "glm": Case(replace(LLAMA, rope_interleaved=True, partial_rotary_factor=0.5, hidden_dropout=0.1)),
    "mixtral": Case(MIXTRAL, is_packed=True),
    "mixtral sp": Case(MIXTRAL, True, length=11, experts="sorted"),
    "ernie": Case(ERNIE, keeps="nothing"),
    "ernie sp": Case(ERNIE, True, keeps="matmuls", experts="sorted"),
    "lora": Case(adapter=ALL_LINEAR, model=replace(LLAMA, attention_bias=True)),
    "lora sp": Case(adapter=replace(ALL_LINEAR, modules_to_save=("embed_tokens", "norm")), sequence_parallel=True),
    "lora ernie": Case(ERNIE, adapter=ALL_LINEAR),
    "recomputed": Case(keeps="nothing"),
    "recomputed sp": Case(sequence_parallel=True, keeps="nothing"),
    "matmuls kept": Case(keeps="matmuls"),
    "matmuls kept sp": Case(sequence_parallel=True, keeps="matmuls"),
    "bf16": Case(dtype=torch.bfloat16, tolerance=2e-2),
    "bf16 sp": Case(dtype=torch.bfloat16, sequence_parallel=True, tolerance=2e-2),
    "fp16 sp": Case(dtype=torch.float16, sequence_parallel=True, tolerance=4e-3),
    "compiled": Case(is_compiled=True),
    "compiled sp": Case(is_compiled=True, sequence_parallel=True, keeps="matmuls"),
}
ON_FOUR = ("llama sp", "mixtral sp", "lora sp", "qwen2")


def whole_model(case: Case) -> Decoder:
    model = Decoder(case.model)
    model.initialize(0)
    if case.adapter is not None:
        lora.attach(model, case.adapter, 0)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            # So that biases, norms and LoRA's B are not what they begin as.
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.05 * noise).copy_(parameter.to(case.dtype))
    return model.train()


def part_of(whole: Decoder, case: Case, context: DistContext) -> tuple[Decoder, Cutter]:
    """This rank's part of the model, with its values."""
    config = ParallelConfig(
        tensor_model_parallel_size=context.world_size, sequence_parallel=case.sequence_parallel
    )  # fmt: skip
    cutter = Cutter(config, context, plan_mesh(config, context), case.dtype)
    ops = build_ops({**whole.ops.names, "experts": case.experts, "cross_entropy": "chunked"})
    options = case.keeps != "all", case.keeps if case.keeps != "all" else "nothing", ops
    model = outline_of_part(case.model, options, CPU, case.dtype, case.adapter, cutter)
    values = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        model.filling.put(parameter, values[name])
    if case.is_compiled:
        model.compile_blocks(backend="aot_eager")
    return model.train(), cutter


def batch_of(case: Case) -> dict[str, Tensor]:
    tokens = torch.randint(0, VOCAB, (ROWS, case.length + 1), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(case.length).expand(ROWS, -1)
    batch = {"row_ids": torch.arange(ROWS), "input_ids": tokens[:, :-1], "labels": tokens[:, 1:].clone()}
    batch["labels"][0, 2:5] = -100
    if case.is_packed:
        starts = torch.tensor([[4, 7], [3, 11], [1, 2]])
        documents = (positions[..., None] >= starts[:, None]).sum(-1)
        begins = torch.cat((torch.zeros(ROWS, 1, dtype=torch.int64), starts), dim=1)
        batch |= {"document_ids": documents}
        positions = positions - begins.gather(1, documents)
    return batch | {"positions": positions}


def loss_of(model: Decoder, case: Case) -> Tensor:
    """The mean loss and the layers' own, with gradients."""
    batch, scale = batch_of(case), 1 / (ROWS * LENGTH)
    task = LanguageModelTask(model, 3, torch.ones(VOCAB))
    loss = task(batch, task.layer_losses(batch, scale))[0] * scale
    loss.backward()
    return loss.detach()


def errors_of(case: Case, context: DistContext) -> dict[str, float]:
    whole = whole_model(case).double()
    expected = loss_of(whole, case)
    model, cutter = part_of(whole, case, context)
    loss = loss_of(model, case)
    mine = total = torch.zeros((), dtype=torch.float64)
    worst = 0.0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        gradient, held = parameter.grad.double(), cutter.division.held(name)
        assert held is not None and held.shape == tuple(parameter.shape)
        counts, summed_over = cutter.division.counts(name), cutter.division.summed_over(name)
        if len(summed_over) > 1:
            gradient = context.all_sum(gradient)
            counts = context.rank == summed_over[0]
        exact = whole.get_parameter(name).grad
        assert exact is not None
        for box, part in held.piece.parts_of(gradient.contiguous()):
            same = exact[tuple(slice(start, start + n) for start, n in zip(box.start, box.length))]
            difference = (part - same).square().sum()
            worst = max(worst, (difference / exact.square().mean() / same.numel()).sqrt().item())
            mine, total = mine + counts * difference, total + counts * same.square().sum()
    # The whole norm, of what counts on each rank.
    norm = context.all_sum(total).sqrt().item()
    full = torch.stack([p.grad.square().sum() for p in whole.parameters() if p.grad is not None]).sum().sqrt().item()
    return {
        "loss": abs(loss.item() / expected.item() - 1), "gradient": context.all_sum(mine).sqrt().item() / norm,
        "norm": abs(norm / full - 1), "worst": worst,
    }  # fmt: skip


def work_through(names: list[str]) -> dict:
    context = init_context("cpu")
    found = {}
    for name in names:
        try:
            found[name] = errors_of(CASES[name], context)
        except Exception as error:
            raise RuntimeError(f"case {name}") from error
    destroy_context(context)
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_gradients(world_size: int):
    check_cases(world_size, [name for name in CASES if not CASES[name].is_compiled] if world_size == 2 else ON_FOUR)


@pytest.mark.soak
def test_gradients_of_compiled_blocks():
    check_cases(2, ["compiled", "compiled sp"])


def check_cases(world_size: int, names: Sequence[str]) -> None:
    for found in run_ranks(world_size, work_through, list(names)):
        for name, errors in found.items():
            tolerance = CASES[name].tolerance
            assert errors["loss"] <= tolerance and errors["gradient"] <= tolerance, (name, errors)
            assert errors["norm"] <= 1e-9 and errors["worst"] <= 20 * tolerance, (name, errors)


def other_uses() -> dict:
    """Log-probabilities with gradients, and texts with a cache."""
    context = init_context("cpu")
    case, found = Case(replace(LLAMA, qk_norm=True), sequence_parallel=True), {}
    whole, batch = whole_model(case), batch_of(case)
    model, cutter = part_of(whole, case, context)
    weights = torch.linspace(-1.0, 2.0, ROWS * LENGTH)
    logprobs = []
    for its in (model, whole):
        logprobs.append(its.token_logprobs(its(batch["input_ids"]), batch["labels"]))
        (logprobs[-1] * weights).sum().backward()
    found["logprobs"] = (logprobs[0] - logprobs[1]).abs().max().item()
    gradient, exact = (its.layers[0].self_attn.v_proj.weight.grad for its in (model, whole))
    found["gradient"] = (gradient - exact.chunk(context.world_size)[context.rank]).abs().max().item()
    logits = [its.logits(its(batch["input_ids"])) for its in (model, whole)]
    found["logits"] = (logits[0] - logits[1]).abs().max().item()
    found["texts"] = [
        list(generate(its.eval(), [3, 1, 4], 8, frozenset(), temperature=0.0)) for its in (model, whole)
    ]  # fmt: skip
    destroy_context(context)
    return found


def test_other_uses():
    for found in run_ranks(2, other_uses):
        assert found["logprobs"] <= 2e-6 and found["gradient"] <= 2e-5 and found["logits"] <= 2e-6, found
        assert found["texts"][0] == found["texts"][1] and len(found["texts"][0]) == 8


WIDE = replace(LLAMA, num_attention_heads=6, num_key_value_heads=6, hidden_size=24, head_dim=4, vocab_size=60)


@pytest.mark.parametrize(
    "model, size, sentence",
    [
        (WIDE, 4, "cannot cut num_attention_heads=6: --tensor_model_parallel_size=3 is the nearest possible"),
        (replace(WIDE, num_key_value_heads=2), 3, "cannot cut num_key_value_heads=2: --tensor_model_parallel_size=2"),
        (replace(WIDE, vocab_size=31), 2, "cannot cut vocab_size=31: --tensor_model_parallel_size=1"),
        (replace(WIDE, intermediate_size=21), 2, "cannot cut intermediate_size=21: --tensor_model_parallel_size=1"),
        (replace(MIXTRAL, moe_intermediate_size=6), 4, "cannot cut moe_intermediate_size=6: "),
        (replace(LLAMA, position_embedding="alibi"), 2, "does not go with ALiBi"),
        (replace(LLAMA, local_filter=True), 2, "does not go with a local filter"),
        (replace(LLAMA, attention_dropout=0.1), 2, "give --attention_dropout=0"),
        (replace(LLAMA, hidden_dropout=0.1), 2, "--sequence_parallel does not go with hidden_dropout"),
    ],
)
def test_refused_shapes(model: ModelConfig, size: int, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        check(hf.outline(model), Mesh(0, tensor_size=size), sequence_parallel=True)


@pytest.mark.parametrize(
    "changes, sentence",
    [({"use_dora": True}, "leave out --use_dora"), ({"dropout": 0.1}, "give --lora_dropout=0"),
     ({"token_ids": (30, 31)}, "give --train_added_tokens=all")],
)  # fmt: skip
def test_refused_adapters(changes: dict, sentence: str):
    model = hf.outline(LLAMA)
    lora.attach(model, replace(ALL_LINEAR, **changes), 0)
    with pytest.raises(ValueError, match=sentence):
        check(model, Mesh(0, tensor_size=2), sequence_parallel=False)
