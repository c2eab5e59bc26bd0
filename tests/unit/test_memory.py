"""Memory by formula (model/memory.py) against models that are built, and what their forward passes really keep."""

import itertools
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, UntypedStorage
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from model import Decoder, ModelConfig, decoder, hf, memory, shapes
from model.adapters.config import AdapterConfig
from model.adapters.lora import LoraSpec, attach
from model.dropout import DropoutKey
from model.flops import unit_flops
from model.kernels.blocked_attention import kept_size
from model.memory import TrainingPlan
from model.ops import IMPLEMENTATIONS, build_ops
from parallel.config import ParallelConfig
from parallel.division import Division
from parallel.mesh import Mesh
from parallel.stages import plan_stages
from parallel.torch_engines import cutting

CONFIG = ModelConfig(
    vocab_size=128, hidden_size=96, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
    intermediate_size=160, max_position_embeddings=64,
).resolve()  # fmt: skip
ALL_LINEAR = AdapterConfig(lora_r=4, lora_target_modules="all-linear")
QV = AdapterConfig(lora_r=4)
SAVING = replace(ALL_LINEAR, use_dora=True, lora_modules_to_save="lm_head,embed_tokens")
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


@pytest.mark.parametrize("adapter", [QV, SAVING], ids=["q, v", "all-linear, heads"])
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


def kept_bytes(config: ModelConfig, plan: TrainingPlan) -> int:
    """Bytes of the storages that a forward pass keeps for the backward pass, parameters left out. Nothing is computed,
    so kernels for GPUs may take part."""
    with FakeTensorMode():
        model = build(config, plan)
        kept: dict[int, UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        # With checkpoint_keeps=matmuls, torch keeps these results in dictionaries, where no hook sees them.
        shown = decoder._checkpoint_options("matmuls") | {"context_fn": lambda: contexts_that_show(pack)}
        options = {"nothing": decoder._checkpoint_options("nothing"), "matmuls": shown}
        rows = torch.zeros(plan.train_batch_size, plan.max_seq_len, dtype=torch.int64)
        key = DropoutKey(0, torch.arange(len(rows))) if model.drops else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoder, "_checkpoint_options", options.__getitem__)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                hidden = model(rows, dropout_key=key)
        pack(hidden)
        skipped = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        return sum(storage.nbytes() for at, storage in kept.items() if at not in skipped)


def contexts_that_show(show: Callable[[Tensor], object]) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of selective checkpointing that show what is kept."""

    def policy(context, operator, *args, **kwargs) -> CheckpointPolicy:
        chosen = decoder._keep_matmuls(context, operator, *args, **kwargs)
        if chosen == CheckpointPolicy.MUST_SAVE:
            tree_map_only(Tensor, show, context.op_output)
        return chosen

    return create_selective_checkpoint_contexts(policy)


def build(config: ModelConfig, plan: TrainingPlan) -> Decoder:
    """A model with the implementations that a plan names."""
    names = {op: next(name for name, found in named.items() if found.is_plain) for op, named in IMPLEMENTATIONS.items()}
    if plan.fused:
        names |= {"rms_norm": "triton", "rope": "triton", "swiglu": "triton"}
    names["attention"] = "sdpa" if plan.blocked_weights is None else "blocked"
    names["experts"] = "sorted"
    before = torch.get_default_dtype()
    # Tensors that are not computed cannot be converted in their places.
    torch.set_default_dtype(getattr(torch, plan.dtype))
    try:
        model = Decoder(config, plan.gradient_checkpointing, plan.checkpoint_keeps, build_ops(names))
    finally:
        torch.set_default_dtype(before)
    if plan.adapter.is_used:
        attach(model, LoraSpec.of(plan.adapter), seed=0)
    return model.train()


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
    "DoRA on a CPU": (CONFIG, replace(PLAIN, adapter=replace(ALL_LINEAR, use_dora=True))),
    "LoRA with a dropout": (CONFIG, replace(PLAN, adapter=replace(ALL_LINEAR, lora_dropout=0.5))),
    "LoRA on a CPU": (CONFIG, replace(PLAIN, adapter=QV)),
    "LoRA of all on a CPU in blocks": (CONFIG, replace(BLOCKED, adapter=ALL_LINEAR)),
    "checkpointing": (CONFIG, replace(PLAN, gradient_checkpointing=True)),
    "checkpointing but for matmuls": (CONFIG, replace(PLAIN, gradient_checkpointing=True, checkpoint_keeps="matmuls")),
    "LoRA, checkpointing but for matmuls": (
        CONFIG, replace(PLAIN, gradient_checkpointing=True, checkpoint_keeps="matmuls", adapter=ALL_LINEAR),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_block_keeps_what_the_formula_says(name: str):
    """The difference of two depths, as the first block of an adapted model needs less."""
    config, plan = CASES[name]
    measured = [kept_bytes(replace(config, num_hidden_layers=n), plan) for n in (2, 3)]
    expected = [memory.activation_bytes(replace(config, num_hidden_layers=n), plan) for n in (2, 3)]
    assert measured[1] - measured[0] == pytest.approx(expected[1] - expected[0], rel=0.02)
    if not plan.adapter.is_used:
        # Beside the blocks: rotary tables and token ids, which are not counted.
        assert measured[0] == pytest.approx(expected[0], rel=0.03)


def test_what_lasts_is_a_number_of_bytes_a_parameter():
    config = memory.SIZES["125m"][1].resolve()
    number = shapes.count(shapes.parameters_of(config))

    def lasting(**changes) -> dict[str, float]:
        found = memory.estimate(config, TrainingPlan(**changes)).lasting
        return {name: round(size / number, 2) for name, size in found.items()}

    assert lasting() == {"weights": 2, "gradients": 4, "main parameters": 4, "optimizer state": 8}
    assert lasting(dtype="float32") == {"weights": 4, "gradients": 4, "main parameters": 0, "optimizer state": 8}
    assert lasting(grad_reduce_in_fp32=False)["gradients"] == 2
    assert lasting(ranks=4) == lasting() | {"main parameters": 1, "optimizer state": 2}
    assert lasting(offload_optimizer=True) == {"weights": 2, "gradients": 4}
    states = {name: lasting(optimizer=name)["optimizer state"] for name in memory.MOMENTS}
    # A third of the parameters is the embedding, which AdamW steps.
    assert states == {"adamw": 8, "muon": 5.25, "lion": 4, "adamw8bit": 2.03, "lion8bit": 1.02}


def test_what_each_mode_leaves_on_a_rank():
    """Bytes a parameter. ZeRO-1 shares the state, fsdp everything, hsdp everything among the ranks of a machine."""
    config = memory.SIZES["125m"][1].resolve()
    number = shapes.count(shapes.parameters_of(config))

    def a_rank(data_parallel: str, ranks: int, **changes) -> list[float]:
        found = memory.estimate(config, TrainingPlan(data_parallel=data_parallel, ranks=ranks, **changes)).lasting
        return [round(size / number, 2) for size in found.values()]

    # weights, gradients, main parameters, state
    assert a_rank("auto", 1) == [2, 4, 4, 8]
    assert a_rank("auto", 8) == [2, 4, 0.5, 1]
    assert a_rank("fsdp", 8) == a_rank("hsdp", 8) == a_rank("fsdp", 8, dtype="float32") == [0.5, 0.5, 0, 1]
    assert a_rank("fsdp", 8, grad_reduce_in_fp32=False) == [0.5, 0.5, 0, 1]
    assert a_rank("fsdp", 8, fsdp_cpu_offload=True) == []
    assert a_rank("fsdp", 8, offload_optimizer=True) == [0.5, 0.5]
    lora = AdapterConfig(lora_r=16, lora_target_modules="all-linear")
    frozen = memory.estimate(config, TrainingPlan(data_parallel="fsdp", ranks=8, adapter=lora)).lasting
    assert frozen["weights"] == pytest.approx((2 * number + 4 * frozen["gradients"] / 4 * 8) / 8, rel=0.01)


def test_rows_of_a_shard():
    """Every rank has room for as many rows; 3 rows over 2 ranks are 2 and 1."""
    assert memory.shard_size({"w": (3, 5), "v": (7,)}, 2) == 2 * 5 + 4
    assert memory.shard_size({"w": (3, 5)}, 4) == 5


def test_fsdp_without_resharding_keeps_the_blocks():
    config = memory.SIZES["125m"][1].resolve()
    shards = TrainingPlan(data_parallel="fsdp", ranks=4)
    kept = memory.estimate(config, replace(shards, reshard_after_forward=False))
    given_up = memory.estimate(config, shards)
    blocks = shapes.count({n: s for n, s in shapes.parameters_of(config).items() if n.startswith("layers.")})
    assert kept.moments["loss"] - given_up.moments["loss"] == pytest.approx(2 * blocks * 11 / 12)
    assert kept.lasting == given_up.lasting


MESHES = {
    "tensor": {"tensor_model_parallel_size": 2},
    "pipe": {"pipeline_model_parallel_size": 4, "pipeline_parts": "4,3,3,4"},
    "interleaved": {"pipeline_model_parallel_size": 2, "pipeline_schedule": "interleaved", "pipeline_parts": "4,3,3,4"},
    "v": {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zbv", "pipeline_parts": "3,3,3,5"},
    "expert": {"expert_model_parallel_size": 2, "ranks": 2},
    "all": {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2, "expert_model_parallel_size": 2,
            "ranks": 2, "num_layers_per_virtual_pipeline_stage": 6},
}  # fmt: skip


@pytest.mark.parametrize(("name", "shape"), [
    *itertools.product(("tensor", "pipe", "interleaved", "v"), ("llama", "tied", "experts")),
    *itertools.product(("expert", "all"), ("experts",)),
])  # fmt: skip
def test_a_rank_of_a_mesh_holds_what_the_division_says(name: str, shape: str):
    config = replace(CONFIG, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2, vocab_size=512,
                     tie_word_embeddings=shape == "tied", num_local_experts=4 * (shape == "experts"))  # fmt: skip
    config, plan = config.resolve(), TrainingPlan(**MESHES[name])
    flags = {flag: value for flag, value in MESHES[name].items() if flag != "ranks"}
    with torch.device("meta"):
        model = Decoder(config)
    holders = ranks_by_name(ParallelConfig(**flags), config.tie_word_embeddings)
    place = Mesh(0, plan.pipeline_model_parallel_size, plan.ranks, 1, plan.tensor_model_parallel_size,
                 expert_size=plan.expert_model_parallel_size)  # fmt: skip
    division = Division(cutting.whole_outlines(model, ParallelConfig()), place, holders)
    for part, rank in zip(memory.parts_of(config, plan), place.ranks_of("pipe"), strict=True):
        held = {its: division.held(its, rank) for its in division.outlines}
        expected = {its: found.shape for its, found in held.items() if found is not None}
        assert part.own(shapes.parameters_of(part.config)) == expected


def ranks_by_name(flags: ParallelConfig, is_tied: bool) -> Callable[[str], tuple[int, ...]]:
    """Name of a parameter of a model of 12 blocks -> the pipe ranks that hold it."""
    if flags.pipeline_model_parallel_size == 1:
        return lambda name: (0,)
    stages = plan_stages(flags, [1.0] * 14)

    def ranks_of(name: str) -> tuple[int, ...]:
        first, *rest = name.split(".")
        units = {"embed_tokens": (0, 13) if is_tied else (0,), "norm": (13,), "lm_head": (13,)}
        return tuple({stages.rank_of_unit(unit) for unit in units.get(first) or (int(rest[0]) + 1,)})

    return ranks_of


def test_what_a_mesh_leaves_of_activations():
    config = memory.SIZES["125m"][1].resolve()

    def kept(**changes) -> float:
        return memory.estimate(config, TrainingPlan(gradient_checkpointing=True, **changes)).activations

    stream = 2048 * 768 * 4
    assert kept() == pytest.approx(14 * stream, rel=0.05)
    # The residual streams alone remain, and the hidden states that the head sees.
    assert kept(tensor_model_parallel_size=4) == kept()
    assert kept(tensor_model_parallel_size=4, sequence_parallel=True) == pytest.approx(kept() / 4, rel=0.15)
    assert kept(context_parallel_size=4) == pytest.approx(kept() / 4)
    # The head costs as much as three blocks, so the first rank has 8 of 12, and 2 micro-batches on their way.
    first, *_ = memory.parts_of(config, TrainingPlan(pipeline_model_parallel_size=2))
    assert (first.layers, first.in_flight) == (tuple(range(8)), 2)
    for schedule, size in itertools.product(("gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"), (2, 4)):
        flags = ParallelConfig(pipeline_model_parallel_size=size, pipeline_schedule=schedule)
        trained = plan_stages(flags, unit_flops(config, 2048))
        parts = memory.parts_of(config, TrainingPlan(pipeline_model_parallel_size=size, pipeline_schedule=schedule))
        assert [part.layers for part in parts] == [
            tuple(sorted(unit - 1 for stage in trained.stages_of(rank) for unit in trained.units(stage)
                         if 0 < unit <= config.num_hidden_layers))
            for rank in range(size)
        ]  # fmt: skip
    flights = {
        schedule: [part.in_flight for part in memory.parts_of(config, TrainingPlan(
            pipeline_model_parallel_size=4, pipeline_schedule=schedule, pipeline_micro_batches=6))]
        for schedule in ("gpipe", "1f1b", "interleaved", "zero_bubble", "zbv")
    }  # fmt: skip
    assert flights == {
        "gpipe": [6, 6, 6, 6], "1f1b": [4, 3, 2, 1], "interleaved": [5.5, 4.5, 3.5, 2.5], "zero_bubble": [4, 4, 4, 4],
        "zbv": [4, 4, 4, 4],
    }  # fmt: skip


def test_a_pair_has_two_answers():
    config = memory.SIZES["125m"][1].resolve()
    pairs = memory.estimate(config, TrainingPlan(task_type="dpo"))
    assert pairs.activations == memory.estimate(config, TrainingPlan(train_batch_size=2)).activations


def test_four_bits_are_half_a_byte_and_scales():
    config = memory.SIZES["7b"][1].resolve()
    adapter = AdapterConfig(lora_r=16, lora_target_modules="all-linear", load_in_4bit=True)
    matrices = shapes.count(shapes.linear_of_blocks(shapes.parameters_of(config)))
    others = 6_738_415_616 - matrices + 39_976_960
    expected = matrices * (0.5 + 1 / 64 + 4 / 64 / 256) + 2 * others
    assert memory.weight_bytes(config, TrainingPlan(adapter=adapter)) == pytest.approx(expected)


def test_a_command_says_what_fits(capsys: pytest.CaptureFixture, tmp_path: Path):
    memory.main(["--size=7b", "--lora_r=16", "--lora_target_modules=all-linear", "--load_in_4bit"])
    said = capsys.readouterr().out
    assert "6,778,392,576 parameters, 39,976,960 of them train" in said and "24 GB: fits" in said
    memory.main(["--size=7b"])
    said = capsys.readouterr().out
    assert "24 GB: does not fit" in said and "it fits with --gradient_checkpointing --lora_r=16" in said
    memory.main(["--size=125m", "--ranks=8", "--data_parallel=fsdp"])
    assert "on each of 8 ranks, which share weights, gradients and" in capsys.readouterr().out
    memory.main(["--size=7b", "--ranks=8"])
    assert "room for 22.5; it fits with --gradient_checkpointing --data_parallel=fsdp" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps(hf.to_hf_config(CONFIG, torch.bfloat16)))
    memory.main([f"--init_from={tmp_path}", "--offload_optimizer"])
    assert "in host memory: optimizer state" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--init_from=/nowhere"], "/nowhere"),
        (["--size=7b", "--lora_r=0"], "lora_r must be positive"),
        (["--size=7b", "--lora_r=4", "--lora_target_modules=query"], "fits no layer"),
        (["--size=7b", "--load_in_4bit"], "give --lora_r"),
        (["--size=7b", "--checkpoint_keeps=matmuls"], "add that"),
        (["--size=7b", "--train_batch_size=0"], "train_batch_size must be positive"),
        (["--size=7b", "--fsdp_cpu_offload"], "add --data_parallel=fsdp"),
        (["--size=7b", "--no-reshard_after_forward"], "--no-reshard_after_forward is for shards of a model: add"),
        (["--size=7b", "--ranks=8", "--ranks_per_machine=4"], "add --data_parallel=fsdp"),
        (["--size=7b", "--data_parallel=fsdp", "--ranks=8", "--ranks_per_machine=3"], "no whole number of such"),
        (["--size=7b", "--data_parallel=hsdp", "--ranks=8", "--ranks_per_machine=4"], "give only --ranks=4"),
        (["--size=7b", "--tensor_model_parallel_size=3"], "does not divide num_attention_heads 32: give a divisor"),
        (["--size=7b", "--pipeline_model_parallel_size=4", "--pipeline_parts=9,9,9"], "of 4, and their sum 34"),
        (["--size=7b", "--pipeline_model_parallel_size=2", "--data_parallel=fsdp"], "does not go with --data_p"),
        (["--size=7b", "--expert_model_parallel_size=2"], "has no experts: leave it out"),
        (["--size=8x7b", "--expert_model_parallel_size=3"], "8 experts cannot be shared evenly: give a divisor"),
        (["--size=7b", "--tensor_model_parallel_size=2", "--optimizer=adamw8bit"], "give --optimizer=adamw"),
        (["--size=7b", "--tensor_model_parallel_size=2", "--optimizer=muon"], "give --optimizer=adamw"),
        (["--size=7b", "--context_parallel_size=3"], "a multiple of that"),
        (["--size=7b", "--sequence_parallel"], "no effect without --tensor_model_parallel_size: add that"),
        (["--size=7b", "--pipeline_schedule=zbv"], "no effect without --pipeline_model_parallel_size: add that"),
        (["--size=8x7b", "--expert_model_parallel_size=4", "--ranks=6"], "must divide --ranks=6"),
        (["--size=7b", "--data_parallel=fsdp", "--offload_optimizer", "--fsdp_cpu_offload"], "keeps the state in"),
    ],
)
def test_a_mistake_is_one_sentence(flags: list[str], sentence: str, capsys: pytest.CaptureFixture):
    assert memory.main(flags) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_advice_for_cut_matrices_has_no_optimizer_that_cannot_cut_them(capsys: pytest.CaptureFixture):
    assert memory.main(["--size=13b", "--tensor_model_parallel_size=2"]) == 0
    assert "8bit" not in capsys.readouterr().out
