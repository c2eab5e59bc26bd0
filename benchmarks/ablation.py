"""Value of each fused operation in a whole training step: none of them, all, and all but one.

    python -m benchmarks.ablation                                     (a GPU: configs/1.1b.yaml, 65,536 tokens a step)
    OMP_NUM_THREADS=2 python -m benchmarks.ablation                   (a CPU: reduced shapes)
    python -m benchmarks.ablation configs/124m.yaml --steps 10 --train_batch_size=8

A step is that of the training loop: micro-batches with float32 gradient buffers, clipping, AdamW on float32 main
parameters. This script also takes the flags of train_my_ddp.py. Tokens are random, one document per row.

naive: plain PyTorch for every op, step-by-step attention, gate and up as two matmuls, and AdamW's formula on one tensor
after another. All fused: the choices of --kernels=auto. A CPU has no Triton. There, fused means attention in blocks (in
float32 torch's sdpa), the loss in chunks, torch's fused AdamW, and compiled blocks, in which the compiler fuses norms,
rotary embedding and SwiGLU; these three cannot be removed one by one.

Each contender runs in its own process, so that its peak memory is its own. On a GPU this is the allocator's maximum; on
a CPU (Linux) it is the bytes of weights, gradients and optimizer state, by their formula, plus the growth of the
resident set within a step. On a CPU all processes live at the same time and take turns, step by step; on a GPU they run
one after the other. Losses of the first step must agree. MFU strict and seed: model/flops.py.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import ctypes
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from configurator import parse_config
from model import Decoder, flops
from model.ops import CHOICES, build_ops, choose_ops, needs_of
from optimizer import adamw_triton
from optimizer.adamw import AdamW, adamw_reference
from optimizer.clip import clip_factor
from optimizer.config import AdamWConfig
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer, choose_kernel, resolve_dtype
from optimizer.param_groups import is_matrix
from optimizer.rule import Rule
from parallel import BucketGradients, DistContext, DistributedDataParallel
from parallel.contract import GradientSource
from parallel.gradients import square
from training.config import Config
from utils.machine import cpu_name
from utils.terminal import run_main

CONFIG = "configs/1.1b.yaml"
LEARNING_RATE = 1e-4
ON_A_CPU = [
    "--dtype=auto", "--vocab_size=8192", "--hidden_size=384", "--intermediate_size=1024", "--num_hidden_layers=6",
    "--num_attention_heads=6", "--num_key_value_heads=2", "--max_seq_len=512", "--train_batch_size=2",
    "--gradient_accumulation_steps=4",
]  # fmt: skip
PLAIN = {op: "plain" if op == "attention" else "reference" for op in CHOICES}


@dataclass(frozen=True)
class Contender:
    name: str
    ops: dict[str, str] = field(default_factory=dict)
    """Op -> implementation; missing ops are those of --kernels=auto."""
    adamw: str = "fused"
    """Implementation of AdamW; "plain" is the formula."""
    compiled: bool = False


def contenders(device: torch.device) -> list[Contender]:
    naive = Contender("naive", PLAIN, "plain")
    if device.type == "cuda":
        return [
            naive, Contender("all fused"), *(Contender(f"without {op}", {op: PLAIN[op]}) for op in CHOICES),
            Contender("without adamw", adamw="plain"), Contender("all fused, blocks compiled", compiled=True),
        ]  # fmt: skip
    return [
        naive,
        Contender("all fused", compiled=True),
        *(Contender(f"without {op}", {op: PLAIN[op]}, compiled=True) for op in ("attention", "cross_entropy")),
        Contender("without compiled blocks"),
        Contender("without adamw", adamw="plain", compiled=True),
    ]


class PlainAdamW:
    """The formula of optimizer/adamw.py, slice by slice; each operation is a pass over memory."""

    def __init__(self, gradients: GradientSource, config: AdamWConfig, grad_clip: float):
        self.gradients, self.config, self.grad_clip, self.num_steps = gradients, config, grad_clip, 0
        self.states = []
        for pieces in gradients.slices:
            mains = [p.param if p.param.dtype == torch.float32 else p.param.float() for p in pieces]
            self.states.append([(main, torch.zeros_like(main), torch.zeros_like(main)) for main in mains])

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self.num_steps += 1
        buckets = range(len(self.states))
        squares = torch.stack([self.gradients.sum_of_squares(bucket) for bucket in buckets])
        factor = clip_factor(squares.sum().sqrt().item(), self.grad_clip)
        for bucket in buckets:
            taken = zip(self.gradients.slices[bucket], self.gradients.take(bucket), self.states[bucket])
            for piece, grad, (main, exp_avg, exp_avg_sq) in taken:
                decay = self.config.weight_decay if is_matrix(piece) else 0.0
                adamw_reference(
                    main, grad.float() * factor, exp_avg, exp_avg_sq, self.num_steps, lr, decay, self.config
                )
                if main is not piece.param:
                    piece.param.copy_(main)
            self.gradients.release(bucket)


def build_step(config: Config, contender: Contender, device: torch.device) -> tuple[Callable[[], float], int]:
    """A function that does one training step and returns the loss in nats per token; bytes kept between steps."""
    dtype = resolve_dtype(config.system.dtype, device)
    model_config = config.model.resolve(max_seq_len=config.data.max_seq_len)
    ops = choose_ops("auto", contender.ops, device, dtype, needs_of(model_config))
    model = Decoder(model_config, ops=build_ops(ops))
    model.initialize(0)
    model.to(device=device, dtype=dtype).train()
    if contender.compiled:
        model.compile_blocks()
    ddp = DistributedDataParallel(model, DistContext(0, 1, 0, 1, device), overlap_grad_reduce=False)
    grad_clip, kernel = config.optimizer.grad_clip, choose_kernel("auto", "", device)
    if contender.adamw == "plain":
        optimizer = PlainAdamW(BucketGradients(ddp), config.adamw, grad_clip)
    else:
        gradients = BucketGradients(ddp, square=adamw_triton.sum_of_squares if kernel == "triton" else square)
        rules: list[Rule] = [AdamW(config.adamw, kernel=kernel)]
        optimizer = MixedPrecisionOptimizer(gradients, rules, grad_clip, LossScaler(enabled=False))
    shape = (config.data.gradient_accumulation_steps, config.data.train_batch_size, config.data.max_seq_len + 1)
    tokens = torch.randint(0, model_config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    count = tokens[:, :, 1:].numel()

    def step() -> float:
        total = torch.zeros((), dtype=torch.float64, device=device)
        for index, rows in enumerate(tokens):
            with nullcontext() if index == len(tokens) - 1 else ddp.no_sync():
                loss_sum = model.loss_sum(ddp(rows[:, :-1]), rows[:, 1:])
                (loss_sum / count).backward()
            total += loss_sum.detach()
        ddp.finish_grad_sync()
        optimizer.step(LEARNING_RATE)
        return total.item() / count

    num_parameters = sum(p.numel() for p in model.parameters())
    # Weights, float32 gradients, two moments, and main parameters unless the weights are their own.
    return step, num_parameters * (16 if dtype == torch.float32 else dtype.itemsize + 16)


def resident_bytes(field_name: str) -> int:
    """VmRSS (now) or VmHWM (peak so far) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field_name))


def resident_growth(work: Callable[[], object]) -> int | None:
    """Peak growth of this process's resident set while `work` runs, in bytes; None if the system does not report it.
    Before that, malloc returns its freed memory and the kernel's record of the peak is reset."""
    if platform.libc_ver()[0] != "glibc":
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    work()
    return resident_bytes("VmHWM") - before


def peak_bytes(step: Callable[[], float], device: torch.device, state_bytes: int) -> int | None:
    """Peak memory of a step, including bytes kept between steps; None if the system does not report it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    # Compiling took memory that is not the model's and is not given back, so only the growth counts.
    growth = resident_growth(step)
    return None if growth is None else state_bytes + growth


def serve(connection: Connection, config: Config, contender: Contender, device: torch.device, threads: int) -> None:
    """Process of a contender: builds the model, does the first step and sends its loss; then answers "step" with the
    seconds of a step, and "end" with the peak memory."""
    torch.set_num_threads(threads)
    try:
        step, state_bytes = build_step(config, contender, device)
        connection.send(step())
        while connection.recv() == "step":
            started = time.perf_counter()
            step()
            connection.send(time.perf_counter() - started)
        connection.send(peak_bytes(step, device, state_bytes))
    except Exception as error:  # a contender that fails (out of memory) must not cost the others' figures
        connection.send(f"{type(error).__name__}: {str(error).splitlines()[0][:100]}" if str(error) else repr(error))


class Worker:
    """A contender's process, seen from outside."""

    def __init__(self, config: Config, contender: Contender, device: torch.device):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, config, contender, device, torch.get_num_threads())
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.seconds: list[float] = []
        self.peak: int | None = None
        self.problem = ""
        self.first_loss = self._receive()

    def _receive(self) -> object:
        try:
            answer = self._connection.recv()
        except EOFError:
            answer = "its process died"
        if isinstance(answer, str):
            self.problem = answer
        return answer

    def step(self, is_timed: bool) -> None:
        if self.problem:
            return
        self._connection.send("step")
        answer = self._receive()
        if is_timed and not self.problem:
            self.seconds.append(answer)

    def end(self) -> None:
        if not self.problem:
            self._connection.send("end")
            self.peak = self._receive()
        self._process.join()


def measure(config: Config, chosen: list[Contender], device: torch.device, steps: int) -> dict[str, Worker]:
    """The first two steps are not timed."""
    workers = {}
    for contender in chosen:
        workers[contender.name] = worker = Worker(config, contender, device)
        if device.type == "cuda":
            for number in range(-1, steps):
                worker.step(number >= 0)
            worker.end()
    if device.type != "cuda":
        names = list(workers)
        for number in range(-1, steps):
            # Each round begins with another contender.
            for name in names[number % len(names) :] + names[: number % len(names)]:
                workers[name].step(number >= 0)
        for worker in workers.values():
            worker.end()
    return workers


def check_losses(workers: dict[str, Worker], dtype: torch.dtype) -> None:
    """Raises: ValueError: contenders that should compute the same do not."""
    losses = {name: worker.first_loss for name, worker in workers.items() if isinstance(worker.first_loss, float)}
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    if losses and max(losses.values()) - min(losses.values()) > tolerance * min(losses.values()):
        raise ValueError(f"the first losses differ by more than rounding: {losses}")


def row(name: str, worker: Worker, tokens: int, strict: float, seed: float, peak_flops: float | None) -> str:
    if worker.problem or not worker.seconds:
        return f"| {name} | not measured: {worker.problem} | | | | | |"
    seconds, lowest, highest = statistics.median(worker.seconds), min(worker.seconds), max(worker.seconds)
    rate = tokens / seconds
    shares = (f"{rate * operations / peak_flops:.1%}" if peak_flops else "-" for operations in (strict, seed))
    memory = "-" if worker.peak is None else f"{worker.peak / 1e9:.2f}"
    return f"| {name} | {seconds:.3f} | {lowest:.3f} .. {highest:.3f} | {' | '.join(shares)} | {memory} | {rate:,.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each contender")
    parser.add_argument("--only", default="", help="names of contenders, separated by commas")
    parser.add_argument("--on", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    args, flags = parser.parse_known_args()
    device = torch.device(args.on)
    config_file = flags.pop(0) if flags and not flags[0].startswith("-") else CONFIG
    reduced = [] if device.type == "cuda" else ON_A_CPU
    try:
        # Given twice, a flag's last value counts.
        config, _ = parse_config([config_file, *reduced, *flags, "--data_dir=none"])
        dtype = resolve_dtype(config.system.dtype, device)
        everyone = contenders(device)
        wanted = [name.strip() for name in args.only.split(",") if name.strip()]
        if unknown := set(wanted) - {contender.name for contender in everyone}:
            raise ValueError(f"--only knows no {', '.join(sorted(unknown))}")
    except ValueError as error:
        parser.error(str(error))
    chosen = [contender for contender in everyone if not wanted or contender.name in wanted]
    model_config = config.model.resolve(max_seq_len=config.data.max_seq_len)
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in Decoder(model_config).parameters())
    seq_len, rows = config.data.max_seq_len, config.data.train_batch_size
    micro_batches = config.data.gradient_accumulation_steps
    strict = flops.flops_per_token_strict(model_config, seq_len)
    seed = flops.flops_per_token_seed(model_config, seq_len, num_parameters)
    peak_flops = flops.device_peak_flops(device, dtype)
    workers = measure(config, chosen, device, args.steps)
    if device.type == "cpu":
        # A matmul timed before and after: other work on the machine may disturb one of them.
        peak_flops = max(peak_flops, flops.device_peak_flops(device, dtype))
    check_losses(workers, dtype)
    cpu = f"{torch.get_num_threads()} threads of {cpu_name()}"
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu} (not measured on a GPU)"
    tokens = micro_batches * rows * seq_len
    print(f"{machine}, torch {torch.__version__}, Python {platform.python_version()}, {str(dtype)[6:]}")
    print(f"{num_parameters / 1e6:.1f} M parameters, {micro_batches} x {rows} x {seq_len} = {tokens:,} tokens a step, "
          f"median of {args.steps} steps")  # fmt: skip
    print(f"peak: {peak_flops / 1e12:,.3f} TFLOP/s" if peak_flops else "this device's peak is not known: no MFU")
    print("\n| contender | s/step | lowest .. highest | MFU strict | MFU seed | GB | tokens/s |\n|" + "---|" * 7)
    for name, worker in workers.items():
        print(row(name, worker, tokens, strict, seed, peak_flops))
    if device.type != "cuda":
        print("\nrms_norm, rope and swiglu are fused by the compiler here, all three or none: without compiled blocks.")


if __name__ == "__main__":
    run_main(main)
