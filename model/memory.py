"""Memory of training, by formula: where the bytes of a step go, and which GPUs hold them.

    python -m model.memory --size 7b --lora_r 16 --lora_target_modules all-linear --load_in_4bit --train_batch_size 1
    python -m model.memory --init_from DIR --optimizer adamw8bit --gradient_checkpointing
    python -m model.memory --size 13b --data_parallel fsdp --ranks 8
    python -m model.memory --size 70b --tensor_model_parallel_size 8 --pipeline_model_parallel_size 2

What lies in memory all the time, in bytes a parameter (e: bytes of the dtype, 2 in bfloat16, 4 in float32):

    weights            e; frozen matrices of the blocks in 4 bits 0.516
    gradients          trained parameters: 4, or e with --no-grad_reduce_in_fp32
    main parameters    trained parameters: 4, or 0 where the weights are float32
    optimizer          trained parameters: 4 to 8, in 8 bits 1 to 2 (`MOMENTS`)

The last two are shared by the ranks with ZeRO-1, and lie in host memory with --offload_optimizer. With fsdp, N ranks
share everything (`_estimate_of_shards`), hsdp is the same with N ranks of a machine:

    weights            trained 4 / N, which are the main parameters; frozen e / N
    gradients          trained 4 / N, from the first micro-batch's backward pass to the step
    optimizer          as above, / N
    room for sums      over several machines e, and 4 for what trains, of the largest unit (see below); less on one
    gathered           e: embedding, norm and head, from a forward pass to the end of its backward pass; one block while
                       it computes, and the next one's on its way; without reshard_after_forward all blocks

Activations that the forward pass keeps for the backward pass come on top, in proportion to the tokens of a micro-batch;
`_Block` counts them tensor by tensor, as our layers keep them. The peak of a step is its largest moment:

    loss         all activations are kept, and there are logits and the gradients of the head
    backward     the last block's gradients are computed while all activations are kept
    embedding    its gradient is made, and converted; activations are gone
    step         the optimizer's copies of a bucket's gradients
    sums         fsdp: gradients of a unit (a block, or all that is around the blocks) on their way to the ranks

In a mesh all that is counted for what a rank holds (model/parts.py), on the rank with the most:

    tensor       matrices, heads and widths / T. The residual stream and the inputs of matrices that are cut by columns
                 stay whole; with sequence_parallel the stream is / T
    pipe         the units of a rank's stages, and their activations for each micro-batch on its way (`in_flight`);
                 what passes between stages has room for every micro-batch of a step
    context      tokens / K, but keys and values of whole rows
    expert       stacks of experts / E; the tokens of a rank's experts are as many as its own, if they are balanced

Not counted: what CUDA and its libraries take (see RESERVE), compilation, checkpoints, which are copied to host memory,
and dropout of the model, whose masks our kernels do not keep.

Shapes: N tokens of a micro-batch, C hidden size, V vocabulary, I width of the feed-forward layer.
"""

from utils import environment

if __name__ == "__main__":
    environment.check()

import argparse
import re
import sys
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from model.adapters.config import ALL_LINEAR, AdapterConfig
from model.config import ModelConfig
from model.flops import unit_flops
from model.parts import STAGES_A_RANK, Part, in_flight, is_stack, pipe_part, stages_of, tensor_part, whole
from model.shapes import (
    Shape,
    Shapes,
    adapted_of,
    added_by,
    block_of,
    count,
    linear_of_blocks,
    parameters_of,
    trained_of,
)
from utils.terminal import run_main

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
BLOCK_SCALE = 4 / 256
"""Bytes a parameter of the scales of 8-bit moments: a float32 number for each block of 256."""
MOMENTS = {"adamw": 8.0, "muon": 8.0, "lion": 4.0, "adamw8bit": 2 * (1 + BLOCK_SCALE), "lion8bit": 1 + BLOCK_SCALE}
"""Optimizer -> bytes a parameter of its moments. Muon has 4 for matrices of the blocks, and AdamW's for the rest."""
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes a parameter in 4 bits with double quantization (Dettmers et al., "QLoRA", 2023): half a byte; for each block of
64 a scale of one byte; for each 256 of these a float32 number."""
LOGITS_BYTES = 96 << 20
"""Logits that are computed at a time, see CHUNK_BYTES of model/kernels/linear_cross_entropy.py."""
BUCKET = 6_553_600
"""Parameters of a bucket of gradients, by default."""
GPUS_GB = (24, 40, 80)
RESERVE = 1.5
"""GB of a GPU that CUDA, its libraries' workspace and gaps between tensors take."""
GB = 1 << 30
"""What a GPU's maker calls a GB."""

_LLAMA = ModelConfig(model_type="llama", vocab_size=32000, max_position_embeddings=4096)
SIZES: dict[str, tuple[str, ModelConfig]] = {
    "125m": ("125M", ModelConfig(vocab_size=50304, tie_word_embeddings=True, max_position_embeddings=2048)),
    "1.1b": ("1.1B", replace(
        _LLAMA, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4,
    )),
    "7b": ("7B (llama-2-7b)", replace(
        _LLAMA, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )),
    "13b": ("13B (llama-2-13b)", replace(
        _LLAMA, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    )),
    "70b": ("70B (llama-2-70b)", replace(
        _LLAMA, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8,
    )),
    "8x7b": ("8x7B (mixtral)", replace(
        _LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32768, rope_theta=1e6,
        num_local_experts=8, num_experts_per_tok=2,
    )),
}  # fmt: skip
"""Value of --size -> name and shape."""


_SIZES_OF_MESH = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size"
)  # fmt: skip


@dataclass(frozen=True)
class TrainingPlan:
    """What the memory of a run depends on, besides the model. Names and meanings are those of the flags."""

    task_type: str = "pretrain"
    dtype: str = "bfloat16"
    optimizer: str = "adamw"
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    train_batch_size: int = 1
    max_seq_len: int = 2048
    gradient_checkpointing: bool = False
    checkpoint_keeps: str = "nothing"
    grad_reduce_in_fp32: bool = True
    offload_optimizer: bool = False
    data_parallel: str = "auto"
    reshard_after_forward: bool = True
    fsdp_cpu_offload: bool = False
    ranks_per_machine: int = 0
    """With fsdp over several machines: processes of each."""
    ranks: int = 1
    """Processes that share the optimizer's state (ZeRO-1); 1: it is whole on each. With fsdp all processes, with hsdp
    those of a machine: they share weights and gradients, too. In a mesh, data ranks."""
    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False
    pipeline_model_parallel_size: int = 1
    pipeline_schedule: str = "1f1b"
    num_layers_per_virtual_pipeline_stage: int = 0
    pipeline_parts: str = ""
    """Units of each stage. Empty: as equally many as possible."""
    pipeline_micro_batches: int = 0
    """Micro-batches of a step on each data rank; 0: four for each rank of the pipeline."""
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    fused: bool = True
    """Our Triton kernels, as on a GPU; otherwise plain PyTorch, as on a CPU."""
    fused_loss: bool = True
    """The loss is computed in chunks of tokens; otherwise from all logits."""
    blocked_weights: int | None = None
    """Attention is that of model/kernels/blocked_attention.py, of which each block keeps so many weights (`kept_size`).
    None: it is one kernel that keeps its result and a number for each query and head."""

    def check(self) -> None:
        """
        Raises:
            ValueError: a value that no run can have.
        """
        self.adapter.check()
        if self.adapter.load_in_4bit and not self.adapter.is_used:
            raise ValueError("--load_in_4bit freezes the weights: give --lora_r, so that something trains")
        for name in ("train_batch_size", "max_seq_len", "ranks", *_SIZES_OF_MESH):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("fsdp_cpu_offload", "ranks_per_machine", "reshard_after_forward"):
            if not self.is_cut and getattr(self, name) != getattr(TrainingPlan, name):
                flag = "no-reshard_after_forward" if name == "reshard_after_forward" else name
                raise ValueError(f"--{flag} is for shards of a model: add --data_parallel=fsdp")
        self._check_machines()
        if self.fsdp_cpu_offload and self.offload_optimizer:
            raise ValueError("--fsdp_cpu_offload keeps the state in host memory, too: leave out --offload_optimizer")
        if self.is_cut and self.adapter.load_in_4bit:
            raise ValueError(f"--load_in_4bit does not go with --data_parallel={self.data_parallel}: leave out one")
        self._check_mesh()
        if self.checkpoint_keeps != "nothing" and not self.gradient_checkpointing:
            raise ValueError("--checkpoint_keeps says what --gradient_checkpointing keeps: add that")

    def _check_machines(self) -> None:
        machine, ranks = self.ranks_per_machine, self.ranks
        if machine < 0:
            raise ValueError(f"ranks_per_machine must not be negative, got {machine}")
        if machine and self.data_parallel == "hsdp" and machine != ranks:
            raise ValueError(f"with --data_parallel=hsdp, --ranks counts a machine's: give only --ranks={machine}")
        if machine and ranks % machine:
            raise ValueError(f"--ranks_per_machine={machine}: --ranks={ranks} is no whole number of such machines")

    def _check_mesh(self) -> None:
        if not re.fullmatch(r"|[1-9][0-9]*(,[1-9][0-9]*)*", self.pipeline_parts):
            raise ValueError(f"pipeline_parts must be numbers of units, such as 5,4,4,5, got {self.pipeline_parts!r}")
        if self.has_mesh and self.adapter.load_in_4bit:
            raise ValueError("--load_in_4bit keeps matrices whole on every rank, so no mesh can cut them: leave it out")
        if self.tensor_model_parallel_size > 1 and not self.optimizer_can_be_cut:
            raise ValueError(
                f"--optimizer={self.optimizer} does not go with --tensor_model_parallel_size, which cuts the matrices: "
                f"give --optimizer=adamw"
            )
        if self.context_parallel_size > 1 and self.max_seq_len % (2 * self.context_parallel_size):
            raise ValueError(
                f"--context_parallel_size={self.context_parallel_size} cuts each row into "
                f"{2 * self.context_parallel_size} equal parts: give a --max_seq_len that is a multiple of that"
            )
        for name in ("pipeline_model_parallel_size", "expert_model_parallel_size"):
            if getattr(self, name) > 1 and self.is_cut:
                raise ValueError(f"--{name} does not go with --data_parallel={self.data_parallel}: leave out one")
        if self.ranks % self.expert_model_parallel_size and self.ranks > 1:
            raise ValueError(
                f"--expert_model_parallel_size={self.expert_model_parallel_size} must divide --ranks={self.ranks}, the "
                f"data ranks"
            )

    @property
    def optimizer_can_be_cut(self) -> bool:
        """Whether the optimizer steps parts of matrices: Muon and the scales of 8-bit moments need whole rows."""
        return self.optimizer in ("adamw", "lion")

    @property
    def has_mesh(self) -> bool:
        """Whether there are ranks beside those of the data dimension, or they share experts."""
        return any(getattr(self, name) > 1 for name in _SIZES_OF_MESH)

    @property
    def micro_batches(self) -> int:
        return self.pipeline_micro_batches or 4 * self.pipeline_model_parallel_size

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on a rank; a pair of DPO has two answers."""
        rows = self.train_batch_size * (2 if self.task_type == "dpo" else 1)
        return rows * -(-self.max_seq_len // self.context_parallel_size)

    @property
    def stream_tokens(self) -> float:
        """Tokens of a micro-batch whose residual stream a rank keeps."""
        return self.tokens / (self.tensor_model_parallel_size if self.sequence_parallel else 1)

    def ranks_of(self, name: str) -> int:
        """Ranks that share a parameter, by ZeRO-1 or fsdp."""
        return max(1, self.ranks // self.expert_model_parallel_size) if is_stack(name) else self.ranks

    @property
    def is_cut(self) -> bool:
        """Whether each rank keeps a shard of the model."""
        return self.data_parallel != "auto"

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]


class _Block:
    """Bytes that a block keeps for the backward pass."""

    def __init__(self, config: ModelConfig, layer: int, plan: TrainingPlan):
        self.config, self.layer, self.plan = config, layer, plan
        self.tokens, self.itemsize = plan.tokens, plan.itemsize
        self.shapes = {f"layers.{layer}.{name}": shape for name, shape in block_of(config, layer).items()}
        self.adapted = adapted_of(self.shapes, plan.adapter)
        self.trains = not plan.adapter.is_used

    def kept(self) -> float:
        if self.plan.gradient_checkpointing:
            stream = self.plan.stream_tokens * self.config.hidden_size * residual_itemsize(self.config, self.plan)
            return stream + (self._outputs() if self.plan.checkpoint_keeps == "matmuls" else 0.0)
        return self.computed()

    def computed(self) -> float:
        """What it keeps without checkpointing, or after it has been computed again."""
        return 2 * norm_bytes(self.config, self.plan) + self._attention() + self._feed_forward() + self._adapters()

    def _keeps_input(self, *ends: str) -> bool:
        """Whether one of these layers needs its input in the backward pass: its own weight or an adapter trains."""
        adapts = any(name.endswith(f"{end}.weight") for name in self.adapted for end in ends)
        # With a dropout, the adapter keeps what that leaves.
        return self.trains or (adapts and not self.plan.adapter.lora_dropout)

    def _attention(self) -> float:
        config, plan, size = self.config, self.plan, self.itemsize
        query, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        kept = float(size * (query + 2 * kv * plan.context_parallel_size))
        kept += size * config.hidden_size if self._keeps_input("q_proj", "k_proj", "v_proj") else 0
        keeps_out = self._keeps_input("o_proj")
        if plan.blocked_weights is not None:
            kept += size * query * keeps_out + size * plan.blocked_weights / self.tokens
        else:
            # On a CPU, the result has the layout of plain rotary positions' output and is copied for the projection.
            kept += size * query * (1 + (keeps_out and not plan.fused)) + 4 * config.num_attention_heads
        if config.qk_norm:
            wide = (size if plan.fused else 4 + size * self.trains) * (query + kv)
            kept += wide + rstd_bytes(plan) * (config.num_attention_heads + config.num_key_value_heads)
        if config.local_filter:
            # Inputs of its two layers, each of a token and the one before it, and of its norm.
            kept += size * 3 * config.hidden_size
            kept += norm_bytes(config, plan) / self.tokens
        return self.tokens * kept

    def _feed_forward(self) -> float:
        if self.config.has_experts(self.layer):
            return self._experts()
        kept = self.itemsize * self.config.hidden_size if self._keeps_input("gate_proj", "up_proj") else 0
        return self.tokens * (kept + self._activation(self.config.intermediate_size))

    def _activation(self, width: int) -> float:
        """Bytes a token between the projections."""
        kinds = 1 if self.config.mlp == "gelu" else 2 if self.plan.fused else 3
        return self.itemsize * width * (kinds + self._keeps_input("down_proj"))

    def _experts(self) -> float:
        """Of the router: input and scores in float32. Of the experts, for each pair of token and expert: the gates and
        ups; the grouped kernel keeps input and activation, too."""
        config, chosen, size = self.config, self.config.num_experts_per_tok, self.itemsize
        hidden, width = config.hidden_size, config.moe_intermediate_size
        router = (4 * hidden if size < 4 else 0) + 2 * 4 * config.num_local_experts
        pair = size * (hidden + 4 * width) if self.plan.fused else size * 2 * width
        shared = self._activation(config.num_shared_experts * width) if config.num_shared_experts else 0
        # Its number, its place and its weight.
        return self.tokens * (size * hidden + router + chosen * (pair + 20) + shared)

    def _adapters(self) -> float:
        """Each keeps the product with its first matrix, with a dropout the mask and what that leaves of the input, and
        with DoRA the result before its lengths."""
        adapter, size, kept = self.plan.adapter, self.itemsize, 0
        for outputs, inputs in self.adapted.values():
            kept += size * (adapter.lora_r or 0)
            kept += (size + 1) * inputs if adapter.lora_dropout else 0
            kept += size * outputs if adapter.use_dora else 0
        return self.tokens * kept

    def _outputs(self) -> float:
        """Results of matrix multiplications and of attention."""
        config, size, rank = self.config, self.itemsize, self.plan.adapter.lora_r or 0
        query = config.num_attention_heads * config.head_dim
        outputs = query + sum(outputs for outputs, _ in linear_of_blocks(self.shapes).values())
        adapter = self.plan.adapter
        is_apart = adapter.lora_dropout > 0.0 or adapter.load_in_4bit
        outputs += sum(rank + is_apart * outputs for outputs, _ in self.adapted.values())
        kept = float(size * outputs) + 4 * config.num_attention_heads * (self.plan.blocked_weights is None)
        kept += size * (self.plan.blocked_weights or 0) / self.tokens
        if config.has_experts(self.layer):
            kept += size * config.hidden_size + 4 * config.num_local_experts
            kept += size * config.num_experts_per_tok * 2 * config.moe_intermediate_size
        return self.tokens * kept

    def working(self) -> float:
        """Bytes that its backward pass needs beside what is kept: gradients of the feed-forward layer's activations, of
        the stream, and of the widest matrix."""
        config, size = self.config, self.itemsize
        width = config.intermediate_size
        if config.has_experts(self.layer):
            width = config.moe_intermediate_size * (config.num_experts_per_tok + config.num_shared_experts)
        joined = 2 if config.mlp == "swiglu" else 1
        stream = config.hidden_size * (size + residual_itemsize(config, self.plan))
        matrix = max(prod(shape) for shape in self.shapes.values())
        if self.trains:
            matrix *= size * joined + (4 if self.plan.grad_reduce_in_fp32 and size < 4 else 0)
        else:
            # A frozen matrix is restored from 4 bits, or joined with its neighbour.
            matrix *= size * (1 if self.plan.adapter.load_in_4bit else joined)
        recomputed = self.computed() if self.plan.gradient_checkpointing else 0.0
        return self.tokens * (size * width * (joined + 1) + stream) + matrix + recomputed


def residual_itemsize(config: ModelConfig, plan: TrainingPlan) -> int:
    """Bytes of an element of the residual stream."""
    return 4 if config.residual_in_fp32 else plan.itemsize


def rstd_bytes(plan: TrainingPlan) -> int:
    """Bytes of a row's scale in RMSNorm."""
    return 8 if plan.fused and plan.dtype == "float32" else 4


def norm_bytes(config: ModelConfig, plan: TrainingPlan) -> float:
    """Bytes that a norm of the residual stream keeps: its input, and a number or two for each token; in plain PyTorch
    the input is float32, and a weight that trains needs the normed values."""
    if config.norm == "layernorm":
        return plan.stream_tokens * (4 * config.hidden_size + 8)
    if plan.fused:
        return plan.stream_tokens * (config.hidden_size * residual_itemsize(config, plan) + rstd_bytes(plan))
    normed = 0 if plan.adapter.is_used else plan.itemsize
    return plan.stream_tokens * (config.hidden_size * (4 + normed) + 4)


def activation_bytes(config: ModelConfig, plan: TrainingPlan) -> float:
    """Bytes that the forward pass of a whole model up to the last norm keeps for the backward pass."""
    return _activations(whole(config), plan)


def _activations(part: Part, plan: TrainingPlan) -> float:
    """Bytes that the forward passes of a part keep for the backward pass."""
    config = part.config
    blocks = sum(_Block(config, layer, plan).kept() for layer in part.layers)
    norms = (part.has_head + (config.embedding_norm and part.has_embedding)) * norm_bytes(config, plan)
    # The hidden states that the head sees, or the next stage.
    result = (plan.tokens if part.has_head else plan.stream_tokens) * config.hidden_size * plan.itemsize
    return part.in_flight * (blocks + norms + result)


def _loss_bytes(config: ModelConfig, plan: TrainingPlan, trains_head: bool) -> float:
    """Bytes at the loss: logits, and gradients of the hidden states and of the head."""
    size, tokens, vocabulary = plan.itemsize, plan.tokens, config.vocab_size
    if not plan.fused_loss:
        return tokens * vocabulary * (2 * size + 8)
    gradient = 4.0 * vocabulary * config.hidden_size if trains_head else 0.0
    if trains_head and not plan.fused and size < 4:
        # A CPU rounds a chunk's product, and widens it again before it is added.
        gradient += (size + 4) * vocabulary * config.hidden_size
    return min(LOGITS_BYTES, tokens * vocabulary * size) + tokens * config.hidden_size * size + gradient


def weight_bytes(config: ModelConfig, plan: TrainingPlan) -> float:
    """Bytes of all weights of a whole model, those of an adapter included."""
    return _weight_bytes(whole(config), plan)


def _weight_bytes(part: Part, plan: TrainingPlan) -> float:
    shapes = _shapes(part, plan)
    in_blocks = count({n: shape for n, shape in linear_of_blocks(shapes).items() if ".lora_" not in n})
    four = NF4 if plan.adapter.load_in_4bit else plan.itemsize
    return four * in_blocks + plan.itemsize * (count(shapes) - in_blocks)


def _shapes(part: Part, plan: TrainingPlan) -> Shapes:
    """The parameters of a part, those of an adapter included."""
    return part.own(parameters_of(part.config) | added_by(plan.adapter, part.config))


def _trained(part: Part, plan: TrainingPlan) -> Shapes:
    return part.own(trained_of(part.config, plan.adapter))


def _moment_bytes(trained: Shapes, plan: TrainingPlan) -> float:
    """Bytes of the optimizer's moments on a rank."""
    total = 0.0
    for name, shape in trained.items():
        has_one = plan.optimizer == "muon" and _is_muons(name, shape)
        total += (4 if has_one else MOMENTS[plan.optimizer]) * prod(shape) / plan.ranks_of(name)
    return total


def _is_muons(name: str, shape: Shape) -> bool:
    return name.startswith("layers.") and len(shape) in (2, 3) and ".router." not in name


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device."""

    parameters: int
    trained: int
    lasting: dict[str, float]
    """What is there between steps."""
    activations: float
    """What the forward pass keeps for the backward pass."""
    moments: dict[str, float]
    """Moment of a step -> bytes that are there beside what is lasting."""
    host: dict[str, float]
    """What lies in host memory instead."""

    @property
    def largest(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: self.moments[name])

    @property
    def peak(self) -> float:
        return sum(self.lasting.values()) + self.moments[self.largest]

    def fits(self, gpu_gb: float) -> bool:
        return self.peak <= (gpu_gb - RESERVE) * GB


def estimate(config: ModelConfig, plan: TrainingPlan) -> Estimate:
    """Memory of a run; in a pipeline, of the rank that needs most.

    Raises:
        ValueError: a value that no run can have.
    """
    plan.check()
    if config.num_local_experts and plan.adapter.load_in_4bit:
        raise ValueError("--load_in_4bit: the matrices of experts are not quantized: leave it out")
    config = config.resolve(max_seq_len=plan.max_seq_len)
    of_part = _estimate_of_shards if plan.is_cut else _estimate_of_part
    found = max((of_part(part, plan) for part in parts_of(config, plan)), key=lambda its: its.peak)
    everything = whole(config)
    return replace(found, parameters=count(_shapes(everything, plan)), trained=count(_trained(everything, plan)))


def parts_of(config: ModelConfig, plan: TrainingPlan) -> list[Part]:
    """What the ranks of a pipeline hold of a model, in order; without a pipeline, what each rank holds.

    Args:
        config: resolved.
    Raises:
        ValueError: the model cannot be divided in this way.
    """
    ranks, schedule, experts = plan.pipeline_model_parallel_size, plan.pipeline_schedule, config.num_local_experts
    if plan.expert_model_parallel_size > 1 and (not experts or experts % plan.expert_model_parallel_size):
        raise ValueError(
            f"--expert_model_parallel_size={plan.expert_model_parallel_size}: "
            + (f"{experts} experts cannot be shared evenly: give a divisor" if experts
               else "the model has no experts: leave it out")
        )  # fmt: skip
    part = replace(whole(tensor_part(config, plan.tensor_model_parallel_size)),
                   expert_size=plan.expert_model_parallel_size)  # fmt: skip
    if ranks == 1:
        return [part]
    parts = list(map(int, plan.pipeline_parts.split(","))) if plan.pipeline_parts else []
    costs = unit_flops(config, plan.max_seq_len)
    stages = stages_of(costs, ranks, schedule, parts, plan.num_layers_per_virtual_pipeline_stage)
    return [
        pipe_part(part, own, in_flight(schedule, rank, ranks, len(own), plan.micro_batches))
        for rank, own in enumerate(stages)
    ]  # fmt: skip


def _estimate_of_part(part: Part, plan: TrainingPlan) -> Estimate:
    """Memory of a rank that holds all of its part."""
    trained = _trained(part, plan)
    number, size = count(trained), plan.itemsize
    grad_size = 4 if plan.grad_reduce_in_fp32 else size
    shared = sum(prod(shape) / plan.ranks_of(name) for name, shape in trained.items())
    state = {
        "main parameters": (0 if size == 4 and not plan.offload_optimizer else 4) * shared,
        "optimizer state": _moment_bytes(trained, plan),
    }
    lasting = {"weights": _weight_bytes(part, plan), "gradients": float(grad_size * number)}
    if plan.ranks > 1 and not plan.fused:
        largest = min(number, max(BUCKET, *map(prod, trained.values())))
        lasting |= {"room for sums": grad_size * largest * (plan.ranks - 1) / plan.ranks}
    lasting |= _room_between_stages(part, plan)
    host: dict[str, float] = {}
    if plan.offload_optimizer:
        # A bucket holds whole parameters, and the largest takes turns with one of the usual size.
        largest = max(BUCKET, *map(prod, trained.values()))
        host = state | {"buckets on their way": float(grad_size + size) * (min(number, BUCKET) + min(number, largest))}
    else:
        lasting |= state
    kept = _activations(part, plan)
    return Estimate(number, number, lasting, kept, _moments(part, plan, trained, kept), host)


def _room_between_stages(part: Part, plan: TrainingPlan) -> dict[str, float]:
    """Bytes for the activations that come from the stage before, and the gradients from the stage after, for every
    micro-batch of a step."""
    if plan.pipeline_model_parallel_size == 1:
        return {}
    arrivals = 2 * part.stages - part.has_embedding - part.has_head
    stream = plan.stream_tokens * part.config.hidden_size * residual_itemsize(part.config, plan)
    return {"room between stages": float(arrivals * plan.micro_batches * stream)}


def _estimate_of_shards(part: Part, plan: TrainingPlan) -> Estimate:
    """Memory of a run with fsdp. The optimizer's state is that of the shards, whatever their padding."""
    shapes, trained = _shapes(part, plan), _trained(part, plan)
    frozen = {name: shape for name, shape in shapes.items() if name not in trained}
    # Frozen vectors, such as norms below an adapter, stay whole.
    vectors = sum(prod(shape) for shape in frozen.values() if len(shape) == 1)
    shared = _shard({name: shape for name, shape in frozen.items() if len(shape) > 1}, plan)
    state = {
        "weights": 4.0 * _shard(trained, plan) + plan.itemsize * (vectors + shared),
        "gradients": 4.0 * _shard(trained, plan),
        "main parameters": 4.0 * _shard(trained, plan) * plan.offload_optimizer,
        "optimizer state": _moment_bytes(trained, plan),
    }
    moved = [*state] if plan.fsdp_cpu_offload else ["main parameters", "optimizer state"] * plan.offload_optimizer
    lasting = {name: size for name, size in state.items() if name not in moved}
    host = {name: size for name, size in state.items() if name in moved}
    room, kept = _room_for_sums(plan, shapes, trained), _activations(part, plan)
    lasting |= {"room for sums": room} if room else {}
    moments = _moments_of_shards(part.config, plan, shapes, trained, kept)
    return Estimate(count(shapes), count(trained), lasting, kept, moments, host)


def _room_for_sums(plan: TrainingPlan, shapes: Shapes, trained: Shapes) -> float:
    """Memory that our collectives keep for the largest unit: on a CPU for what arrives; over several machines also for
    weights and gradients in order of the machines."""
    units = _units(shapes)
    on_wire = 4 if plan.grad_reduce_in_fp32 else plan.itemsize
    summed = on_wire * max(count(_only(trained, unit)) for unit in units)
    room = 0.0 if plan.fused else summed * (plan.ranks - 1) / plan.ranks
    if 1 < plan.ranks_per_machine < plan.ranks:
        room += summed + plan.itemsize * max(map(count, units))
    return room


def _units(shapes: Shapes) -> list[Shapes]:
    """What is gathered at once: each block, and at the end all around the blocks."""
    units: dict[str, Shapes] = {}
    for name, shape in shapes.items():
        units.setdefault(name.split(".")[1] if name.startswith("layers.") else "around", {})[name] = shape
    around = units.pop("around")
    return [*units.values(), around]


def _only(trained: Shapes, unit: Shapes) -> Shapes:
    return {name: shape for name, shape in unit.items() if name in trained}


def shard_size(shapes: Shapes, ranks: int) -> int:
    """Elements of a rank's shard of these parameters: so many rows of each that those of all ranks suffice."""
    return sum(-(-shape[0] // ranks) * prod(shape[1:]) for shape in shapes.values())


def _shard(shapes: Shapes, plan: TrainingPlan) -> int:
    """Elements of a rank's shard of the parameters that it and others hold."""
    return sum(shard_size({name: shape}, plan.ranks_of(name)) for name, shape in shapes.items())


def _moments_of_shards(
    config: ModelConfig, plan: TrainingPlan, shapes: Shapes, trained: Shapes, kept: float
) -> dict[str, float]:
    """Moment of a step -> bytes beside what is lasting, with fsdp."""
    size = plan.itemsize
    on_wire = 4 if plan.grad_reduce_in_fp32 else size
    *blocks, around = _units(shapes)
    block = max(blocks, key=count)
    head = "embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    gathered = size * count(around) + (0 if plan.reshard_after_forward else size * sum(map(count, blocks)))
    # The gradient of the head waits for the end of the backward pass, as all around the blocks does.
    waiting = size * config.vocab_size * config.hidden_size if head in trained else 0
    # With reshard: the block's weights, and the next one's on their way. Without: nothing to gather.
    moving = 2 * size * count(block) if plan.reshard_after_forward else 0
    sums = _sums_of(block, trained, size, on_wire)
    working = max(_Block(config, layer, plan).working() for layer in range(config.num_hidden_layers))
    # On a GPU, a block's gradients are summed while the next block computes.
    working = working + on_wire * count(_only(trained, block)) if plan.fused else max(working, sums)
    moments = {
        "loss": gathered + size * count(block) * plan.reshard_after_forward
        + kept + _loss_bytes(config, plan, head in trained),
        "backward": gathered + moving + kept + waiting + working,
        "sums": gathered + _sums_of(around, trained, size, on_wire),
        "step": 4.0 * count(block) if plan.optimizer == "muon" else 0.0,
    }  # fmt: skip
    return moments


def _sums_of(unit: Shapes, trained: Shapes, itemsize: int, on_wire: int) -> float:
    """Bytes while the gradients of a unit are summed: those of the backward pass, and a copy in order of the ranks."""
    return float(itemsize + on_wire) * count(_only(trained, unit))


def _moments(part: Part, plan: TrainingPlan, trained: Shapes, kept: float) -> dict[str, float]:
    """Moment of a step -> bytes beside what is lasting."""
    config, size = part.config, plan.itemsize
    head = "embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    table = config.vocab_size * config.hidden_size
    # A tied matrix gets its gradient once the embedding's is there, too.
    held = 4.0 * table if config.tie_word_embeddings and head in trained else 0.0
    block = max((_Block(config, layer, plan).working() for layer in part.layers), default=0.0)
    moments = {"backward": kept + held + block}
    if part.has_head:
        moments["loss"] = kept + _loss_bytes(config, plan, head in trained)
    if part.has_embedding and "embed_tokens.weight" in trained:
        moments["embedding"] = held + table * (size + (4 if plan.grad_reduce_in_fp32 and size < 4 else 0))
    copies = 0 if plan.grad_reduce_in_fp32 or plan.fused or size == 4 else 4
    scratch = grad_bytes_of_bucket(plan) * (plan.ranks - 1) / plan.ranks
    moments["step"] = (copies + scratch) * min(count(trained), BUCKET)
    return moments


def grad_bytes_of_bucket(plan: TrainingPlan) -> int:
    """Bytes of an element of a bucket."""
    return 4 if plan.grad_reduce_in_fp32 else plan.itemsize


def savings(config: ModelConfig, plan: TrainingPlan) -> list[tuple[str, TrainingPlan]]:
    """Flags that save memory, and the plan with them: first what costs the least time or quality."""
    recomputes = replace(plan, gradient_checkpointing=True, checkpoint_keeps="nothing")
    found = [
        ("--gradient_checkpointing --checkpoint_keeps=matmuls", replace(recomputes, checkpoint_keeps="matmuls")),
        ("--gradient_checkpointing", recomputes),
    ]
    has_pipeline = plan.pipeline_model_parallel_size > 1
    if plan.ranks > 1 and not plan.is_cut and not plan.adapter.load_in_4bit and not has_pipeline:
        found.append(("--gradient_checkpointing --data_parallel=fsdp", replace(recomputes, data_parallel="fsdp")))
    if plan.is_cut and not plan.reshard_after_forward:
        sharded = replace(recomputes, reshard_after_forward=True)
        found.append(("--gradient_checkpointing --reshard_after_forward", sharded))
    adapter, with_lora = plan.adapter, "--gradient_checkpointing"
    if not adapter.is_used:
        leaner = replace(recomputes, grad_reduce_in_fp32=False)
        narrow = ("--gradient_checkpointing --no-grad_reduce_in_fp32", leaner)
        if plan.tensor_model_parallel_size == 1:
            narrow = ("--gradient_checkpointing --optimizer=adamw8bit --no-grad_reduce_in_fp32",
                      replace(leaner, optimizer="adamw8bit"))  # fmt: skip
        on_host = replace(recomputes, grad_reduce_in_fp32=False, offload_optimizer=not plan.is_cut,
                          fsdp_cpu_offload=plan.is_cut)  # fmt: skip
        adapter = AdapterConfig(lora_r=16, lora_target_modules=ALL_LINEAR)
        with_lora += " --lora_r=16 --lora_target_modules=all-linear"
        found += [
            narrow,
            (f"--gradient_checkpointing --{'fsdp_cpu_offload' if plan.is_cut else 'offload_optimizer'} "
             "--no-grad_reduce_in_fp32", on_host),
            (with_lora, replace(recomputes, adapter=adapter)),
        ]  # fmt: skip
    if not config.num_local_experts and not plan.is_cut and not plan.has_mesh:
        found.append((f"{with_lora} --load_in_4bit", replace(recomputes, adapter=replace(adapter, load_in_4bit=True))))
    return found


def verdict(config: ModelConfig, plan: TrainingPlan, gpu_gb: int) -> str:
    """Whether a GPU holds it, as a sentence without a dot; if not, with which flags it does."""
    room = gpu_gb - RESERVE
    needed = estimate(config, plan).peak / GB
    if needed <= room:
        return f"fits, {room - needed:.1f} GB are left"
    help_by = next((flags for flags, leaner in savings(config, plan) if estimate(config, leaner).fits(gpu_gb)), None)
    text = f"does not fit: {needed:.1f} GB are needed, and there is room for {room:.1f}"
    return text + (f"; it fits with {help_by}" if help_by else "")


def table(name: str, config: ModelConfig, plan: TrainingPlan) -> str:
    """The estimate for a reader."""
    found = estimate(config, plan)
    lines = [
        f"{name}: {found.parameters:,} parameters, {found.trained:,} of them train with {plan.optimizer}",
        f"a micro-batch of {plan.train_batch_size} x {'2 x ' if plan.task_type == 'dpo' else ''}{plan.max_seq_len} "
        f"tokens in {plan.dtype}",
        *([_mesh(plan)] if plan.has_mesh else []),
        *([_sharing(plan)] if plan.ranks > 1 or plan.is_cut else []),
        "",
        f"{'':<44}{'GB':>9}{'bytes a parameter':>20}",
    ]
    rows = [*found.lasting.items()]
    whose = f"{config.num_hidden_layers} blocks" if plan.pipeline_model_parallel_size == 1 else "its blocks"
    rows += [(f"activations of {whose}", found.activations)]
    beside = found.moments[found.largest] - found.activations
    rows += [(f"the largest moment beside them: {found.largest}", beside), ("peak on the device", found.peak)]
    lines += [_row(what, size, found.parameters) for what, size in rows]
    lines += [_row(f"in host memory: {what}", size, found.parameters) for what, size in found.host.items()]
    return "\n".join([*lines, "", *(f"{gb} GB: {verdict(config, plan, gb)}" for gb in GPUS_GB)])


def _mesh(plan: TrainingPlan) -> str:
    """Who holds a part of the model or of its rows."""
    sizes = {"pipe": plan.pipeline_model_parallel_size, "context": plan.context_parallel_size,
             "tensor": plan.tensor_model_parallel_size, "expert": plan.expert_model_parallel_size}  # fmt: skip
    told = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    told += " with sequence parallelism" if plan.sequence_parallel else ""
    if plan.pipeline_model_parallel_size == 1:
        return f"on a rank of {told}"
    return f"on the fullest rank of {told}, {plan.micro_batches} micro-batches by {plan.pipeline_schedule}"


def _sharing(plan: TrainingPlan) -> str:
    """Who shares what."""
    flag = f"--data_parallel={plan.data_parallel}" if plan.is_cut else "--use_distributed_optimizer"
    if plan.ranks == 1:
        return f"{flag} on one rank, which shares nothing: say with --ranks how many there are"
    ranks = f"{plan.ranks} ranks" + (" of each machine" if plan.data_parallel == "hsdp" else "")
    what = "weights, gradients and the optimizer's state" if plan.is_cut else "the optimizer's state"
    return f"on each of {ranks}, which share {what} ({flag})"


def _row(what: str, size: float, parameters: int) -> str:
    return f"{what:<44}{size / GB:>9.2f}{size / parameters:>20.3f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m model.memory", description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--size", choices=SIZES, help="a well-known shape")
    source.add_argument("--init_from", metavar="DIR", help="a Hugging Face folder, run or checkpoint, for its shape")
    parser.add_argument("--dtype", choices=ITEMSIZE, default=TrainingPlan.dtype)
    parser.add_argument("--optimizer", choices=MOMENTS, default=TrainingPlan.optimizer)
    parser.add_argument("--lora_r", type=int)
    parser.add_argument("--lora_target_modules", default=AdapterConfig.lora_target_modules)
    parser.add_argument("--lora_modules_to_save", default="")
    parser.add_argument("--lora_dropout", type=float, default=0.0)
    parser.add_argument("--use_dora", action="store_true")
    parser.add_argument("--load_in_4bit", action="store_true")
    parser.add_argument("--train_batch_size", type=int, default=TrainingPlan.train_batch_size)
    parser.add_argument("--max_seq_len", type=int, default=TrainingPlan.max_seq_len)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--checkpoint_keeps", choices=("nothing", "matmuls"), default="nothing")
    parser.add_argument("--grad_reduce_in_fp32", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--offload_optimizer", action="store_true")
    parser.add_argument("--task_type", choices=("pretrain", "sft", "dpo"), default="pretrain")
    parser.add_argument("--data_parallel", choices=("auto", "fsdp", "hsdp"), default="auto")
    parser.add_argument("--reshard_after_forward", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--fsdp_cpu_offload", action="store_true")
    parser.add_argument("--ranks_per_machine", type=int, default=0)
    parser.add_argument("--tensor_model_parallel_size", type=int, default=1)
    parser.add_argument("--sequence_parallel", action="store_true")
    parser.add_argument("--pipeline_model_parallel_size", type=int, default=1)
    parser.add_argument("--pipeline_schedule", choices=STAGES_A_RANK, default=TrainingPlan.pipeline_schedule)
    parser.add_argument("--num_layers_per_virtual_pipeline_stage", type=int, default=0)
    parser.add_argument("--pipeline_parts", default="")
    parser.add_argument("--pipeline_micro_batches", type=int, default=0, help="0: four for each rank of the pipeline")
    parser.add_argument("--context_parallel_size", type=int, default=1)
    parser.add_argument("--expert_model_parallel_size", type=int, default=1)
    parser.add_argument(
        "--ranks", type=int, default=1,
        help="processes that share the optimizer's state by ZeRO-1, or with fsdp everything (hsdp: on a machine)",
    )  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    given = vars(_parser().parse_args(argv))
    adapter = {name: given.pop(name) for name in [*given] if name in AdapterConfig.__dataclass_fields__}
    size, folder = given.pop("size"), given.pop("init_from")
    plan = TrainingPlan(**given, adapter=AdapterConfig(**adapter))
    try:
        _check_effects(plan)
        name, config = SIZES[size] if size else (folder, _read_shape(folder))
        print(table(name, config.resolve(max_seq_len=plan.max_seq_len), plan))
    except (ValueError, OSError) as error:
        print(f"memory: {error}", file=sys.stderr)
        return 2
    return 0


def _check_effects(plan: TrainingPlan) -> None:
    """Refuse flags of a dimension that the mesh lacks, since the figures would not show that they count for nothing.
    (Training names them, and does without.)

    Raises:
        ValueError: the first such flag.
    """
    pipe = "pipeline_model_parallel_size"
    sizes = {
        "sequence_parallel": "tensor_model_parallel_size", "pipeline_schedule": pipe, "pipeline_parts": pipe,
        "pipeline_micro_batches": pipe, "num_layers_per_virtual_pipeline_stage": pipe,
    }  # fmt: skip
    for name, size in sizes.items():
        if getattr(plan, size) == 1 and getattr(plan, name) != getattr(TrainingPlan, name):
            raise ValueError(f"--{name} has no effect without --{size}: add that")


def _read_shape(folder: str) -> ModelConfig:
    # Loads torch, which takes seconds; named shapes do without.
    from model.hf import read_config

    if (Path(folder) / "config.json").exists():
        return read_config(folder)
    from checkpoint.choosing import resolve_checkpoint_dir

    return read_config(resolve_checkpoint_dir(Path(folder)))


if __name__ == "__main__":
    run_main(main)
