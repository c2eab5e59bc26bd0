"""Peak memory of a training step, measured, beside the formula of model/memory.py.

    python -m benchmarks.step_memory [--size 125m] [--train_batch_size 1] [--max_seq_len 512]
    python -m benchmarks.step_memory --ranks 4          ways in which ranks share the work: bytes of a rank
    python -m benchmarks.step_memory --ranks 4 --meshes [--size 8x34m]        the same of meshes
    python -m benchmarks.step_memory --gpus             by formula: which GPUs hold 7B, 13B and 70B (docs/memory.md)
    python -m benchmarks.step_memory --offload_time     optimizer's step with and without --offload_optimizer

Each row is a process of its own (with --ranks: so many) that takes two steps. Measured is the memory beyond that of the
same process before it had a model: between the steps, and at the peak of the second. On a CPU that is resident memory,
where freed tensors go back to the system at once; on a GPU it is allocated memory. With --ranks, tensors are also
counted: parameters, gradients after a backward pass, the optimizer's state; figures are of the rank with the most.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import ctypes
import gc
import json
import math
import statistics
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model import Decoder, ModelConfig, hf
from model.adapters.config import AdapterConfig
from model.adapters.lora import LoraSpec, attach
from model.flops import unit_flops
from model.kernels.blocked_attention import kept_size
from model.memory import GB, GPUS_GB, SIZES, TrainingPlan, estimate
from model.ops import build_ops, choose_ops
from model.quantized import quantized_layers
from optimizer.adamw_triton import sum_of_squares
from optimizer.config import AdamWConfig, LionConfig, MuonConfig
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer, choose_kernel
from optimizer.offload import OffloadedOptimizer
from optimizer.rules import new_rules
from parallel import DistContext, ParallelConfig, PowerSGDConfig, destroy_context, init_context
from parallel.contract import GradientSource
from parallel.engine import EngineParts, StepPlan
from parallel.engines import model_cutter, open_engine
from parallel.gradients import square
from parallel.launched import launched_world_size
from parallel.mesh import plan_mesh
from parallel.stages import plan_stages
from tasks.language_model import LanguageModelTask
from training.build_model import build_model, to_device
from training.config import SystemConfig
from utils.terminal import run_main

MB = 1e6
SHAPES = {name: config for name, (_, config) in SIZES.items()} | {
    "34m": ModelConfig(vocab_size=8192, hidden_size=512, num_hidden_layers=8, num_attention_heads=8,
                       max_position_embeddings=2048),
    "8x34m": ModelConfig(vocab_size=8192, hidden_size=512, num_hidden_layers=8, num_attention_heads=8,
                         num_local_experts=8, max_position_embeddings=2048),
}  # fmt: skip
"""Value of --size -> shape."""
LORA = AdapterConfig(lora_r=16, lora_target_modules="all-linear")
FULL = TrainingPlan(fused=False)
ROWS = {
    "AdamW, float32": replace(FULL, dtype="float32"),
    "AdamW": FULL,
    "AdamW, checkpointing but for matmuls": replace(FULL, gradient_checkpointing=True, checkpoint_keeps="matmuls"),
    "AdamW, checkpointing": replace(FULL, gradient_checkpointing=True),
    "AdamW, gradients in bfloat16": replace(FULL, grad_reduce_in_fp32=False),
    "AdamW in 8 bits": replace(FULL, optimizer="adamw8bit"),
    "Lion": replace(FULL, optimizer="lion"),
    "Lion in 8 bits": replace(FULL, optimizer="lion8bit"),
    "Muon": replace(FULL, optimizer="muon"),
    "AdamW, offloaded": replace(FULL, offload_optimizer=True),
    "LoRA of q and v, rank 16": replace(FULL, adapter=replace(LORA, lora_target_modules="q_proj,v_proj")),
    "LoRA of all linear layers, rank 16": replace(FULL, adapter=LORA),
    "the same, checkpointing": replace(FULL, adapter=LORA, gradient_checkpointing=True),
    "QLoRA of all linear layers, rank 16": replace(FULL, adapter=replace(LORA, load_in_4bit=True)),
    "the same in 4 bits, checkpointing": replace(
        FULL, adapter=replace(LORA, load_in_4bit=True), gradient_checkpointing=True
    ),
}
"""In bfloat16 where nothing is said."""
MODES = {
    "DDP": ParallelConfig(),
    "ZeRO-1": ParallelConfig(use_distributed_optimizer=True),
    "FSDP, `--no-reshard_after_forward` (ZeRO-2)": ParallelConfig(data_parallel="fsdp", reshard_after_forward=False),
    "FSDP (ZeRO-3)": ParallelConfig(data_parallel="fsdp"),
    "HSDP": ParallelConfig(data_parallel="hsdp"),
}
"""Ways in which ranks share the training of all weights by AdamW."""
_TENSOR, _PIPE = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
MESHES = {
    "tensor 2": ParallelConfig(**_TENSOR),
    "tensor 2, sequence parallel": ParallelConfig(**_TENSOR, sequence_parallel=True),
    "pipeline 2": ParallelConfig(**_PIPE),
    "pipeline 2, gpipe": ParallelConfig(**_PIPE, pipeline_schedule="gpipe"),
    "tensor 2 x pipeline 2": ParallelConfig(**_TENSOR, **_PIPE),
    "context 2": ParallelConfig(context_parallel_size=2),
    "fsdp x tensor 2": ParallelConfig(data_parallel="fsdp", **_TENSOR),
    "experts over 2 ranks": ParallelConfig(expert_model_parallel_size=2),
}
"""The same where other dimensions than data cut the model or the rows; data has the ranks that are left."""
_SIZES = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size"
)  # fmt: skip

ON_GPU = TrainingPlan(max_seq_len=2048)
RECOMPUTED, ADAPTED = replace(ON_GPU, gradient_checkpointing=True), replace(ON_GPU, adapter=LORA)
NARROW = replace(RECOMPUTED, grad_reduce_in_fp32=False)
BY_FORMULA = {
    "all weights, AdamW": ON_GPU,
    "`--gradient_checkpointing`": RECOMPUTED,
    "the same and `--no-grad_reduce_in_fp32 --optimizer=adamw8bit`": replace(NARROW, optimizer="adamw8bit"),
    "the same and `--no-grad_reduce_in_fp32 --optimizer=lion8bit`": replace(NARROW, optimizer="lion8bit"),
    "the same and `--no-grad_reduce_in_fp32 --offload_optimizer`": replace(NARROW, offload_optimizer=True),
    "LoRA: `--lora_r=16 --lora_target_modules=all-linear`": ADAPTED,
    "LoRA, `--gradient_checkpointing`": replace(RECOMPUTED, adapter=LORA),
    "QLoRA: LoRA, `--load_in_4bit`": replace(ADAPTED, adapter=replace(LORA, load_in_4bit=True)),
    "QLoRA, `--gradient_checkpointing`": replace(RECOMPUTED, adapter=replace(LORA, load_in_4bit=True)),
}  # fmt: skip
"""What docs/memory.md compares: a micro-batch of one row of 2,048 tokens, bfloat16, Triton kernels."""


CUT = replace(RECOMPUTED, data_parallel="fsdp", ranks=8)
SHARED = {
    "8 GPUs, ZeRO-1": replace(RECOMPUTED, ranks=8),
    "8 GPUs, fsdp, `--no-reshard_after_forward`": replace(CUT, reshard_after_forward=False),
    "8 GPUs, fsdp; also hsdp on machines of 8": CUT,
    "16 GPUs, fsdp": replace(CUT, ranks=16, ranks_per_machine=8),
    "32 GPUs, fsdp": replace(CUT, ranks=32, ranks_per_machine=8),
    "64 GPUs, fsdp": replace(CUT, ranks=64, ranks_per_machine=8),
    "8 GPUs, fsdp, `--fsdp_cpu_offload`": replace(CUT, fsdp_cpu_offload=True),
    "8 GPUs, fsdp, LoRA": replace(CUT, adapter=LORA),
}
"""The same with `--gradient_checkpointing`, on machines of 8 GPUs."""


def gpu_lines(plans: Mapping[str, TrainingPlan]) -> list[str]:
    """GB that each plan needs on a GPU, and the smallest GPU that holds it."""
    lines = ["| | 7B | 13B | 70B |", "|---|---|---|---|"]
    for name, plan in plans.items():
        found = [estimate(SIZES[size][1], plan) for size in ("7b", "13b", "70b")]
        gpus = [next((f"**{gb} GB**" for gb in GPUS_GB if its.fits(gb)), "-") for its in found]
        cells = [f"{its.peak / GB:,.1f} {gpu}" for its, gpu in zip(found, gpus)]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return lines


def status_bytes(name: str) -> int:
    """A figure of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def give_back_freed_memory() -> None:
    """Let the C library return freed blocks of 64 KiB and more to the system at once."""
    mmap_threshold = -3
    assert ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 16)


def mode_of(row: str, ranks: int) -> ParallelConfig:
    """How the ranks of a row share the work. HSDP's are two machines."""
    parallel = (MODES | MESHES).get(row, ParallelConfig())
    return replace(parallel, ranks_per_machine=ranks // 2) if parallel.data_parallel == "hsdp" else parallel


def planned(args: argparse.Namespace, row: str) -> TrainingPlan:
    plan = replace(ROWS.get(row, FULL), train_batch_size=args.train_batch_size, max_seq_len=args.max_seq_len)
    plan = replace(plan, fused=torch.cuda.is_available())
    if row in MESHES:
        plan = replace(plan, pipeline_model_parallel_size=MESHES[row].pipeline_model_parallel_size)
    config = SHAPES[args.size].resolve()
    if plan.dtype != "bfloat16" or plan.fused:
        return plan
    kept = kept_size(plan.train_batch_size, config.num_attention_heads, plan.max_seq_len, config.head_dim)
    return replace(plan, blocked_weights=kept)


def new_model(config: ModelConfig, plan: TrainingPlan, device: torch.device) -> Decoder:
    """As a run builds it: with the fastest implementations."""
    dtype = getattr(torch, plan.dtype)
    ops = build_ops(choose_ops("auto", {}, device, dtype))
    options = plan.gradient_checkpointing, plan.checkpoint_keeps, ops
    if plan.adapter.load_in_4bit:
        model = hf.outline_in_4bit(config, device, dtype, *options)
        for layer in quantized_layers(model).values():
            layer.set_matrix(torch.randn(layer.out_features, layer.in_features) * 0.02)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.02)
    else:
        model = Decoder(config, *options).to(dtype)
    if plan.adapter.is_used:
        attach(model, LoraSpec.of(plan.adapter), seed=0)
    return model.to(device).train()


class Training:
    """A model and what it needs to take steps."""

    def __init__(self, config: ModelConfig, plan: TrainingPlan, context: DistContext, parallel: ParallelConfig):
        self.plan, dtype, device = plan, getattr(torch, plan.dtype), context.device
        mesh = plan_mesh(parallel, context)
        stages = None
        # Of a pipeline so many micro-batches are on their way as in the formula. Otherwise two: with shards, gradients
        # of the first one are there during the second.
        self.micro_batches = plan.micro_batches if mesh.pipe_size > 1 else 2
        if mesh.pipe_size > 1:
            stages = plan_stages(parallel, unit_flops(config, plan.max_seq_len, 1.0))
        cutter = model_cutter(parallel, context, mesh, dtype, stages)
        self.model = (
            new_model(config, plan, device) if cutter is None
            else build_model(config, SystemConfig(), 0, device, dtype, None, cutter=cutter).train()
        )  # fmt: skip
        self.task = LanguageModelTask(self.model, 0, torch.ones(config.vocab_size))
        rows = self.micro_batches * plan.train_batch_size * mesh.data_size
        self.tokens, self.steps = rows * plan.max_seq_len, 0
        self.device, self.scaler = device, LossScaler(enabled=False)
        kernel = choose_kernel("auto", "", device) if not plan.offload_optimizer else "torch"
        self.rules = new_rules(
            plan.optimizer, AdamWConfig(), MuonConfig(), LionConfig(), kernel, self.model.roles()
        )
        self.engine = open_engine(
            EngineParts(
                parallel, PowerSGDConfig(), context, mesh, self.model,
                to_device=lambda batch: to_device(batch, self.model, device),
                new_optimizer=self._new_optimizer, square=sum_of_squares if kernel == "triton" else square,
                loss_scale=lambda: 1.0, is_fp16=False, seed=0, compute_dtype=dtype,
                division=cutter.division if cutter is not None else None,
                groups=cutter.groups if cutter is not None else None, stages=stages,
                micro_batches=self.micro_batches,
            )
        )  # fmt: skip

    def _new_optimizer(self, gradients: GradientSource) -> MixedPrecisionOptimizer:
        self.gradients = gradients
        if self.plan.offload_optimizer:
            self.optimizer = OffloadedOptimizer(gradients, self.rules, 1.0, self.scaler, self.device)
        else:
            self.optimizer = MixedPrecisionOptimizer(gradients, self.rules, 1.0, self.scaler)
        return self.optimizer

    def forward_backward(self) -> StepPlan:
        rows, length = self.plan.train_batch_size, self.plan.max_seq_len
        tokens = torch.randint(0, 64, (rows, length + 1)).to(self.device)
        positions = torch.arange(length, device=self.device).expand(rows, -1)
        batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "positions": positions}
        self.steps += 1
        plan = StepPlan(self.steps, 1e-4, self.tokens, lambda: None)
        self.engine.forward_backward([batch] * self.micro_batches, self.task, plan)
        return plan

    def step(self) -> None:
        self.engine.step(self.forward_backward())

    def count(self) -> dict[str, int]:
        """Bytes of this rank's tensors, from a step's backward pass on; a tensor that is several things counts once."""
        plan, seen = self.forward_backward(), set[int]()
        parameters = list(self.model.parameters())
        found = {
            "parameters": storage_bytes(parameters, seen),
            "gradients": storage_bytes([p.grad for p in parameters if p.grad is not None], seen),
            "states": storage_bytes([t for _, its in self.engine.named_state() for t in its.values()], seen),
        }
        self.engine.step(plan)
        return found


def storage_bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of the memory behind tensors, of which this rank may hold a part, beside what was seen before."""
    total = 0
    for tensor in tensors:
        local = getattr(tensor, "to_local", lambda tensor=tensor: tensor)().detach()
        storage = local.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def in_use(device: torch.device) -> int:
    """Bytes of memory at this moment."""
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else status_bytes("VmRSS")


def watch_peak(device: torch.device) -> None:
    """Count the peak from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_in_use(device: torch.device) -> int:
    """Most bytes of memory since `watch_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status_bytes("VmHWM")


def measure(config: ModelConfig, plan: TrainingPlan, parallel: ParallelConfig) -> None:
    """Program of a row, on each of its ranks: the first prints a line of JSON."""
    give_back_freed_memory()
    context = init_context()
    device = context.device
    # A small model first, which loads all code.
    small = replace(config, hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2,
                    num_hidden_layers=2, vocab_size=64, head_dim=32, moe_intermediate_size=64)  # fmt: skip
    training = Training(small, plan, context, parallel)
    training.step()
    training.engine.close()
    del training
    bare = in_use(device)
    training = Training(config, plan, context, parallel)
    training.step()
    found = {"between steps": in_use(device) - bare}
    context.barrier()
    watch_peak(device)
    training.step()
    found = found | {"peak": peak_in_use(device) - bare} | training.count()
    of_ranks = context.gather(found)
    if context.is_main:
        print(json.dumps({name: max(its[name] for its in of_ranks) for name in found}))
    training.engine.close()
    destroy_context(context)


def offload_time(config: ModelConfig, steps: int = 7) -> str:
    """Seconds of the optimizer's step with its state offloaded and not, which take turns. Here both are on the CPU, so
    the difference is what the copies cost when nothing hides them."""
    context = init_context()
    both = [Training(config, replace(ON_GPU, fused=False, offload_optimizer=offloads), context, ParallelConfig())
            for offloads in (False, True)]  # fmt: skip
    seconds: list[list[float]] = [[], []]
    for _ in range(steps):
        for training, found in zip(both, seconds):
            for bucket in range(len(training.gradients.slices)):
                for grad in training.gradients.take(bucket):
                    grad.fill_(1e-3)
            started = time.perf_counter()
            training.optimizer.step(1e-4)
            found.append(time.perf_counter() - started)
    for training in both:
        training.engine.close()
    destroy_context(context)
    plain, offloaded = ([f"{at(found[1:]):.3f}" for at in (statistics.median, min)] for found in seconds)
    return f"seconds a step (median, least): {', '.join(plain)} without, {', '.join(offloaded)} with"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.step_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="125m")
    parser.add_argument("--train_batch_size", type=int, default=1)
    parser.add_argument("--max_seq_len", type=int, default=512)
    rows = [*ROWS, *MODES, *MESHES]
    parser.add_argument("--row", choices=rows, help="measure this row in this process, or on these ranks")
    parser.add_argument("--ranks", type=int, default=0, help="compare the ways in which so many ranks share the work")
    parser.add_argument("--meshes", action="store_true", help="with --ranks: compare meshes")
    parser.add_argument("--gpus", action="store_true", help="print the table for GPUs, by formula alone")
    parser.add_argument("--offload_time", action="store_true", help="time the optimizer's step alone")
    args = parser.parse_args()
    config = SHAPES[args.size].resolve(max_seq_len=args.max_seq_len)
    if args.offload_time:
        print(offload_time(config))
    elif args.gpus:
        print("\n".join([*gpu_lines(BY_FORMULA), "", *gpu_lines(SHARED)]))
    elif args.row:
        measure(config, planned(args, args.row), mode_of(args.row, launched_world_size()))
    else:
        print_table(args)


def print_table(args: argparse.Namespace) -> None:
    across = f", {args.ranks} ranks" if args.ranks else ""
    size = f"micro-batch {args.train_batch_size} x {args.max_seq_len}"
    print(f"{args.size}, {size}{across}, torch {torch.__version__}; MB")
    columns = ["between steps", "peak", *(["parameters", "gradients", "states"] if args.ranks else [])]
    print(f"| mode | {' | '.join(f'{name} | by the formula' for name in columns)} | ratio of the peaks |")
    print(f"|{'---|' * (2 * len(columns) + 2)}")
    for row in (MESHES if args.meshes else MODES) if args.ranks else ROWS:
        if not is_possible(mode_of(row, args.ranks), args.ranks, SHAPES[args.size]):
            continue
        launcher = ["parallel.launch", "--standalone", f"--nproc_per_node={args.ranks}", "-m"] if args.ranks else []
        command = [sys.executable, "-m", *launcher, "benchmarks.step_memory", "--row", row, "--size", args.size,
                   f"--train_batch_size={args.train_batch_size}", f"--max_seq_len={args.max_seq_len}"]  # fmt: skip
        done = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(next(line for line in done.splitlines() if line.startswith("{")))
        print(line_of(row, found, by_formula(args, row), columns), flush=True)


def is_possible(parallel: ParallelConfig, ranks: int, config: ModelConfig) -> bool:
    """Whether so many ranks can share the work in this way. (HSDP's machines are two.)"""
    cut = math.prod(getattr(parallel, name) for name in _SIZES)
    has_experts = config.num_local_experts > 0 or parallel.expert_model_parallel_size == 1
    least = 4 if parallel.data_parallel == "hsdp" else 1
    return has_experts and ranks >= least and max(ranks, 1) % cut == 0


def by_formula(args: argparse.Namespace, row: str) -> dict[str, float]:
    """Bytes of a rank. On a CPU, host memory is the device's."""
    parallel = mode_of(row, args.ranks or 1)
    outside = math.prod(getattr(parallel, name) for name in _SIZES if not name.startswith("expert"))
    data = max(args.ranks, 1) // outside
    sharing = {"auto": data if parallel.use_distributed_optimizer else 1, "fsdp": data,
               "hsdp": parallel.ranks_per_machine}  # fmt: skip
    plan = replace(
        planned(args, row), data_parallel=parallel.data_parallel, ranks=sharing[parallel.data_parallel],
        reshard_after_forward=parallel.reshard_after_forward, sequence_parallel=parallel.sequence_parallel,
        pipeline_schedule=parallel.pipeline_schedule, **{name: getattr(parallel, name) for name in _SIZES},
    )  # fmt: skip
    expected = estimate(SHAPES[args.size], plan)
    host, lasting = sum(expected.host.values()), expected.lasting
    # With fsdp, gradients are there from a backward pass to the step.
    between = sum(lasting.values()) - (lasting["gradients"] if plan.is_cut else 0)
    state = lasting.get("main parameters", 0) + lasting.get("optimizer state", 0)
    return {
        "between steps": between + host, "peak": expected.peak + host, "parameters": lasting["weights"],
        "gradients": lasting["gradients"], "states": state,
    }


def line_of(row: str, found: dict[str, float], expected: dict[str, float], columns: list[str]) -> str:
    """A line of the table."""
    cells = [f"{found[name] / MB:,.0f} | {expected[name] / MB:,.0f}" for name in columns]
    return f"| {row} | {' | '.join(cells)} | {found['peak'] / expected['peak']:.2f} |"


if __name__ == "__main__":
    run_main(main)
