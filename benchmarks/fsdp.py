"""Our FSDP engine against a plain `fully_shard` loop of torch: one training step, alternating in one process group.

    python -m parallel.launch --nproc_per_node=2 -m benchmarks.fsdp --dtype float32
    python -m parallel.launch --nproc_per_node=2 -m benchmarks.fsdp --dtype bfloat16 --no-reshard_after_forward
    python -m parallel.launch --nproc_per_node=4 -m benchmarks.fsdp --data_parallel hsdp --ranks_per_machine 2

Both train the same model (our Decoder, cut block by block) from the same weights, on the same rows, in the same dtype:
forward, backward, gradients summed in float32, clipped by their global norm, AdamW. Torch's loop is what its
documentation shows: fully_shard, clip_grad_norm_, torch.optim.AdamW (fused). A round times both, in an order that
changes. Prints median and quartiles of the slowest rank's seconds, and the median over the rounds of the ratio ours /
torch's. Before, each trains alone for its peak memory: resident memory beyond that of the process without a model, or
CUDA's allocated memory.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import gc
import itertools
import platform
import statistics
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from benchmarks.ddp import describe, timed
from benchmarks.step_memory import give_back_freed_memory, in_use, peak_in_use, watch_peak
from model import Decoder, ModelConfig
from optimizer.adamw_triton import sum_of_squares
from optimizer.config import AdamWConfig, LionConfig, MuonConfig
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer, choose_kernel
from optimizer.rules import new_rules
from parallel import DistContext, Mesh, ParallelConfig, PowerSGDConfig, destroy_context, init_context
from parallel.engine import EngineParts, StepPlan
from parallel.engines import ModelCutter, model_cutter, open_engine
from parallel.gradients import square
from parallel.mesh import plan_mesh
from tasks.language_model import LanguageModelTask
from training.build_model import build_model
from training.config import SystemConfig
from utils.machine import cpu_name, keep_freed_memory
from utils.terminal import run_main

VOCAB_SIZE = 8192
LR, CLIP, ADAMW = 1e-4, 1.0, AdamWConfig()
MB = 1e6


def new_model(args: argparse.Namespace, device: torch.device, cutter: ModelCutter | None = None) -> Decoder:
    """The same weights for both and on every rank, float32 but rounded to the dtype of the matrix products."""
    dtype = getattr(torch, args.dtype)
    config = ModelConfig(
        vocab_size=args.vocab_size, hidden_size=args.hidden_size, num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 64, max_position_embeddings=args.seq_len,
    ).resolve(max_seq_len=args.seq_len)  # fmt: skip
    model = build_model(config, SystemConfig(), 0, device, dtype, None, cutter=cutter)
    return (model if cutter else model.float()).train()


class Ours:
    """The engine, as a run opens it."""

    name = "ours"

    def __init__(self, args: argparse.Namespace, context: DistContext, mesh: Mesh, config: ParallelConfig):
        dtype, scaler = getattr(torch, args.dtype), LossScaler(enabled=False)
        self._tokens = args.rows * args.seq_len * context.world_size
        cutter = model_cutter(config, context, mesh, dtype)
        self.model = new_model(args, context.device, cutter)
        kernel = choose_kernel("auto", "", context.device)
        rules = new_rules("adamw", ADAMW, MuonConfig(), LionConfig(), kernel, self.model.roles())
        self._task = LanguageModelTask(self.model, 0, torch.ones(args.vocab_size, device=context.device))
        self.engine = open_engine(
            EngineParts(
                config, PowerSGDConfig(), context, mesh, self.model, to_device=lambda batch: batch,
                new_optimizer=lambda gradients: MixedPrecisionOptimizer(gradients, rules, CLIP, scaler),
                square=sum_of_squares if kernel == "triton" else square,
                loss_scale=lambda: 1.0, is_fp16=False, seed=0, compute_dtype=dtype,
                division=cutter.division if cutter is not None else None,
                groups=cutter.groups if cutter is not None else None,
            )
        )  # fmt: skip
        self._number = 0

    def step(self, batch: dict[str, Tensor], before_update: Callable[[], None] = lambda: None) -> Tensor:
        """Take a step; returns the mean loss of this rank's tokens."""
        self._number += 1
        plan = StepPlan(self._number, LR, self._tokens, before_update)
        sums = self.engine.forward_backward([batch], self._task, plan)
        assert sums is not None
        return sums.loss / batch["labels"].numel(), self.engine.step(plan).grad_norm

    def close(self) -> None:
        self.engine.close()


class LossModule(nn.Module):
    """Model with its loss: a plain loop keeps both within the module that gathers the weights around the blocks."""

    def __init__(self, model: Decoder):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
        return self.model.loss_sum(self.model(input_ids, positions), labels) / labels.numel()


class Plain:
    """The loop that torch's documentation shows: gradients are means over the ranks."""

    name = "torch"

    def __init__(self, args: argparse.Namespace, context: DistContext, mesh: Mesh, config: ParallelConfig):
        kind, replicas = context.device.type, mesh.data_size // mesh.shard_size
        device_mesh = (
            init_device_mesh(kind, (replicas, mesh.shard_size), mesh_dim_names=("replicate", "shard"))
            if replicas > 1 else init_device_mesh(kind, (mesh.shard_size,))
        )  # fmt: skip
        policy = MixedPrecisionPolicy(
            param_dtype=getattr(torch, args.dtype), reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        model = new_model(args, context.device)
        for block in model.layers:
            fully_shard(
                block, mesh=device_mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward
            )
        self._module = LossModule(model)
        fully_shard(self._module, mesh=device_mesh, mp_policy=policy)
        matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": ADAMW.weight_decay}, {"params": norms, "weight_decay": 0.0}],
            LR, (ADAMW.beta1, ADAMW.beta2), ADAMW.adam_eps, fused=True,
        )  # fmt: skip

    def step(self, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
        """Take a step; returns the mean loss of this rank's tokens, and the global gradient norm."""
        loss = self._module(batch["input_ids"], batch["positions"], batch["labels"])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._module.parameters(), CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach(), cast(DTensor, norm).full_tensor().item()

    def close(self) -> None: ...


def batch_of(args: argparse.Namespace, context: DistContext) -> dict[str, Tensor]:
    """This rank's rows."""
    generator = torch.Generator().manual_seed(context.rank)
    rows = torch.randint(0, args.vocab_size, (args.rows, args.seq_len + 1), generator=generator).to(context.device)
    return {
        "input_ids": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous(),
        "positions": torch.arange(args.seq_len, device=context.device).expand(args.rows, -1),
    }  # fmt: skip


def peak_memory(new: Callable[[], Ours | Plain], batch: dict[str, Tensor], context: DistContext) -> tuple[float, float]:
    """Bytes of the rank that holds the most, between steps and at the peak of the third one."""
    bare = in_use(context.device)
    contender = new()
    for _ in range(2):
        contender.step(batch)
    between = in_use(context.device)
    context.barrier()
    watch_peak(context.device)
    contender.step(batch)
    peak = peak_in_use(context.device)
    contender.close()
    del contender
    gc.collect()
    lasting, most = (max(context.gather(value - bare)) for value in (between, peak))
    return lasting, most


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.fsdp", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--data_parallel", choices=["fsdp", "hsdp"], default="fsdp")
    parser.add_argument("--ranks_per_machine", type=int, default=0)
    parser.add_argument("--reshard_after_forward", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--vocab_size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    give_back_freed_memory()
    context = init_context()
    config = ParallelConfig(
        data_parallel=args.data_parallel, ranks_per_machine=args.ranks_per_machine,
        reshard_after_forward=args.reshard_after_forward,
    )  # fmt: skip
    config.check()
    mesh, batch = plan_mesh(config, context), batch_of(args, context)
    kinds = (Ours, Plain)
    # A small model first, which loads all code.
    small = argparse.Namespace(**{**vars(args), "hidden_size": 64, "layers": 1})
    for kind in kinds:
        peak_memory(lambda kind=kind: kind(small, context, mesh, config), batch, context)
    memory = {k.name: peak_memory(lambda k=k: k(args, context, mesh, config), batch, context) for k in kinds}
    if context.device.type == "cpu":
        keep_freed_memory()
    contenders = [kind(args, context, mesh, config) for kind in kinds]
    seconds, results = time_steps(contenders, batch, context, args.rounds)
    if context.is_main:
        report(args, context, mesh, seconds, results, memory)
    for contender in contenders:
        contender.close()
    destroy_context(context)


def time_steps(
    contenders: list[Ours | Plain], batch: dict[str, Tensor], context: DistContext, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[tuple[Tensor, float]]]]:
    """(Seconds of each round, loss and gradient norm of each step), by name."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    results: dict[str, list[tuple[Tensor, float]]] = {contender.name: [] for contender in contenders}
    orders = itertools.cycle(itertools.permutations(contenders))
    for round_number in range(-2, rounds):
        for contender in next(orders):
            its = results[contender.name]
            elapsed = timed(context, lambda c=contender, its=its: its.append(c.step(batch)))
            if round_number >= 0:
                seconds[contender.name].append(elapsed)
    return seconds, results


def report(
    args: argparse.Namespace, context: DistContext, mesh: Mesh, seconds: dict[str, list[float]],
    results: dict[str, list[tuple[Tensor, float]]], memory: dict[str, tuple[float, float]],
) -> None:  # fmt: skip
    is_cuda = context.device.type == "cuda"
    device = torch.cuda.get_device_name() if is_cuda else f"{cpu_name()}, {torch.get_num_threads()} thread(s) each"
    parameters = sum(p.numel() for p in new_model(args, context.device).parameters())
    print(
        f"{parameters / 1e6:.1f} M parameters, {args.rows}x{args.seq_len} tokens a rank, {args.dtype}, "
        f"{args.data_parallel} over {mesh.shard_size} of {context.world_size} ranks, "
        f"reshard_after_forward={args.reshard_after_forward}; {device}, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )
    for name, values in seconds.items():
        lasting, peak = memory[name]
        print(f"{describe(name, values)}   {lasting / MB:,.0f} MB between steps, {peak / MB:,.0f} MB at the peak")
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    ours, theirs = results.values()
    print(
        f"ours / torch: median of the rounds {median:.3f} (quartiles {low:.3f} .. {high:.3f}); gradient norms of the "
        f"first step {ours[0][1]:.7f} and {theirs[0][1]:.7f}, losses of step {len(ours)} {ours[-1][0].item():.6f} and "
        f"{theirs[-1][0].item():.6f}"
    )


if __name__ == "__main__":
    run_main(main)
