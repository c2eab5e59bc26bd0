"""Time for which a save holds up training, and its cost while it is written: ours and torch's, alternating.

    python -m parallel.launch --nproc_per_node=2 -m benchmarks.checkpoint [--directory DISK] [--rounds 12]
    python -m parallel.launch --nproc_per_node=2 -m benchmarks.checkpoint --data_parallel fsdp

All contenders save the same tensors: on each rank, those that our checkpoint takes from it (weights on the first rank,
and the rank's part of the float32 main parameters and moments; the main parameters share memory with the weights). If
FSDP has cut the model, its weights are first exchanged, so that each rank has its files' parameters whole. In its turn,
a contender first takes some steps without a save, then saves, and trains on until everything is on disk and flushed on
all ranks. The order of turns rotates.

    hold-up         seconds for which the slowest rank waited for the save: in the call, and before the weights change
    steps           seconds of a step while the save is written, divided by those of a step without a save
    memory          growth of this process's peak memory through its first save, and the peak of a helper process

Ours also computes a checksum of every file, which torch's does not. Prints median and quartiles.
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
import itertools
import logging
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save

from benchmarks.ddp import VOCAB_SIZE, LossModule, new_module
from benchmarks.fsdp import Ours as OurEngine
from benchmarks.fsdp import batch_of
from checkpoint.retention import Retention
from checkpoint.saving import CheckpointSaver
from checkpoint.stores import StorePlace
from checkpoint.writing import CheckpointWriter
from model.families import family_of
from model.hf import named_weights
from model.hf_saved import saved_files
from optimizer.adamw import AdamW
from optimizer.config import AdamWConfig
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer
from parallel import (
    BucketGradients,
    DistContext,
    DistributedDataParallel,
    ParallelConfig,
    Zero1,
    init_context,
    sum_hook,
)
from parallel.mesh import plan_mesh
from training.saving import add_weights
from utils.machine import cpu_name
from utils.paths import a_path
from utils.terminal import run_main

LEARNING_RATE = 1e-4


class Training:
    """A model that takes steps, and the tensors of its checkpoint."""

    def __init__(self, context: DistContext, args: argparse.Namespace):
        self.context = context
        self.module: LossModule = new_module(torch.float32, args).to(context.device)
        self.ddp = DistributedDataParallel(self.module, context)
        self.zero1 = None
        if args.zero1:
            self.ddp.use_hook(sum_hook(self.ddp.collectives, None, True))
            self.zero1 = Zero1(self.ddp)
        gradients = BucketGradients(self.ddp, self.zero1)
        self.optimizer = MixedPrecisionOptimizer(gradients, [AdamW(AdamWConfig())], 1.0, LossScaler(enabled=False))
        generator = torch.Generator().manual_seed(context.rank)
        rows = torch.randint(0, VOCAB_SIZE, (args.rows, args.seq_len + 1), generator=generator)
        self._rows = rows.to(context.device)
        self.place = StorePlace(context.rank, context.world_size, tuple(range(context.world_size)))

    def step(self, before_update: Callable[[], float] | None = None) -> tuple[float, float]:
        """Seconds of a step, and the part of them that `before_update` reports as waiting."""
        started, waited = time.perf_counter(), 0.0
        self.ddp(self._rows).backward()
        self.ddp.finish_grad_sync()
        if before_update is not None:
            waited = before_update()
        self.optimizer.step(LEARNING_RATE, self.zero1.gather if self.zero1 else None)
        if self.zero1 is not None:
            self.zero1.wait()
        if self.context.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started, waited

    def add_share(self, writer: CheckpointWriter) -> None:
        holders = [self.context.rank] if self.zero1 is not None else self.place.store
        writer.add_named_state(self.optimizer.named_state(), holders)
        if self.context.is_main:
            writer.add_tensors("model.safetensors", named_weights(self.module.model), {"format": "pt"})

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())

    def close(self) -> None:
        self.ddp.close()

    def share(self) -> dict[str, Tensor]:
        """The same tensors as a flat dictionary."""
        recorder = _Recorder(Path(), 0, self.place, "")
        self.add_share(recorder)
        return recorder.tensors


class CutTraining(Training):
    """The same with FSDP2, by the engine of a run."""

    def __init__(self, context: DistContext, args: argparse.Namespace):
        self.context, size = context, context.world_size
        config = ParallelConfig(data_parallel=args.data_parallel, ranks_per_machine=args.ranks_per_machine)
        args = argparse.Namespace(**vars(args), vocab_size=VOCAB_SIZE, dtype="float32")
        self._ours = OurEngine(args, context, plan_mesh(config, context), config)
        self._batch = batch_of(args, context)
        self.place = StorePlace(context.rank, size, tuple(range(size)))

    def step(self, before_update: Callable[[], float] | None = None) -> tuple[float, float]:
        started, waited = time.perf_counter(), [0.0]

        def wait() -> None:
            waited[0] += before_update() if before_update is not None else 0.0

        self._ours.step(self._batch, wait)
        if self.context.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started, waited[0]

    def add_share(self, writer: CheckpointWriter) -> None:
        engine, config = self._ours.engine, self._ours.model.config
        writer.add_named_state(engine.named_state(), engine.state_holders)
        outlines = engine.outlines()
        most = -(-sum(outline.nbytes for outline in outlines.values()) // self.context.world_size)
        files, _ = saved_files(config, outlines, family_of(config), config.vocab_size, most)
        add_weights(engine, files, writer)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._ours.model.parameters())

    def close(self) -> None:
        self._ours.close()


class _Recorder(CheckpointWriter):
    """Takes the tensors that would be written."""

    def __init__(self, *arguments: object):
        super().__init__(*arguments)
        self.tensors: dict[str, Tensor] = {}

    def add_tensors(self, name: str, tensors: dict[str, Tensor], *_: object, **__: object) -> None:
        self.tensors |= {f"{name}:{key}": tensor for key, tensor in tensors.items()}


class Contender(Protocol):
    def begin(self, step: int) -> None:
        """Save; return when training may go on."""

    def before_update(self) -> float:
        """Wait until the weights may change; returns the seconds waited."""

    def is_done(self) -> bool:
        """Whether this rank's part is on disk."""

    def finish(self) -> Path:
        """Finish once all ranks are done; returns the written directory."""


class Ours:
    def __init__(self, training: Training, home: Path, background: bool):
        self._training, self._home, self._background = training, home, background
        self._saver = CheckpointSaver(
            home, training.place, "bench", training.context.device, Retention(1, 0), background, training.context.gather
        )
        self._step = 0

    def begin(self, step: int) -> None:
        self._step = step
        writer = self._saver.begin(step)
        self._training.add_share(writer)
        self._saver.start(writer, None)
        if not self._background:
            self._check(self._saver.settle())

    def before_update(self) -> float:
        started = time.perf_counter()
        self._saver.before_update()
        return time.perf_counter() - started

    def is_done(self) -> bool:
        return not self._saver.in_flight or any(self._saver.signs())

    def finish(self) -> Path:
        if self._saver.in_flight:
            self._check(self._saver.conclude())
        return self._home / f"step-{self._step}"

    @staticmethod
    def _check(outcome: object) -> None:
        if outcome.problem is not None:
            raise OSError(outcome.problem)


class Torch:
    """torch.distributed.checkpoint.async_save.

    Args:
        options: of a stager that is kept, with its memory, between saves. None: the default, a new one for each save.
    """

    def __init__(self, training: Training, home: Path, kind: AsyncCheckpointerType, options: StagingOptions | None):
        self._training, self._home, self._kind = training, home, kind
        self._stager = DefaultStager(options) if options is not None else None
        # Its threads issue collectives, so the group must be its own.
        self._group = dist.new_group(backend="gloo")
        self._staged: Future | None = None
        self._written: Future | None = None
        self._directory = home

    def begin(self, step: int) -> None:
        self._directory = self._home / f"step-{step}"
        answer = async_save(
            self._training.share(), checkpoint_id=self._directory, process_group=self._group,
            async_checkpointer_type=self._kind, async_stager=self._stager,
        )  # fmt: skip
        split = isinstance(answer, AsyncSaveResponse)
        self._staged = answer.staging_completion if split else None
        self._written = answer.upload_completion if split else answer

    def before_update(self) -> float:
        started = time.perf_counter()
        if self._staged is not None:
            self._staged.result()
        return time.perf_counter() - started

    def is_done(self) -> bool:
        return self._written.done()

    def finish(self) -> Path:
        self._written.result()
        return self._directory


def new_contenders(training: Training, home: Path) -> dict[str, Callable[[Path], Contender]]:
    """Name -> factory of a contender that saves below a directory."""
    cuda = training.context.device.type == "cuda"
    threads, process = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS

    def options(shared: bool, in_thread: bool) -> StagingOptions:
        return StagingOptions(cuda, shared, in_thread, cuda)

    def of_torch(kind: AsyncCheckpointerType, staging: StagingOptions | None) -> Callable[[Path], Contender]:
        return lambda directory: Torch(training, directory, kind, staging)

    return {
        "ours, synchronous": lambda directory: Ours(training, directory, False),
        "ours": lambda directory: Ours(training, directory, True),
        "torch, default": of_torch(threads, None),
        "torch, kept staging": of_torch(threads, options(False, False)),
        "torch, kept staging in a thread": of_torch(threads, options(False, True)),
        "torch, process": of_torch(process, None),
        "torch, process, kept staging": of_torch(process, options(True, False)),
        "torch, process, kept staging in a thread": of_torch(process, options(True, True)),
    }


@dataclass
class Result:
    """Figures of one contender: one number per round, from the slowest rank."""

    hold_ups: list[float] = field(default_factory=list)
    until_written: list[float] = field(default_factory=list)
    slowdowns: list[float] = field(default_factory=list)
    extra: list[float] = field(default_factory=list)
    """Extra seconds of the steps during which the save was written."""
    bytes_written: int = 0
    growth: int = 0
    helper: int = 0
    problem: str | None = None


def peak_bytes(pid: int | str = "self") -> int:
    with open(f"/proc/{pid}/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def take_turn(training: Training, contender: Contender, result: Result, number: int, quiet_steps: int) -> None:
    """One save, with the steps before and during it. Collective."""
    gather, first = training.context.gather, number < 0
    training.step()
    forget_peak()
    quiet = statistics.median(training.step()[0] for _ in range(quiet_steps))
    peak = peak_bytes()
    forget_peak()
    training.context.barrier()
    started = time.perf_counter()
    contender.begin(number + 1000)
    hold_up, waited, steps = time.perf_counter() - started, 0.0, []
    while not all(gather(contender.is_done())):
        elapsed, waited_now = training.step(contender.before_update)
        waited += waited_now
        steps.append(elapsed - waited_now)
    seconds = time.perf_counter() - started
    directory = contender.finish()
    helpers = sum(peak_bytes(child.pid) for child in multiprocessing.active_children())
    answers = gather([hold_up + waited, seconds, quiet, sum(steps), peak_bytes() - peak, helpers])
    if training.context.is_main:
        result.bytes_written = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        shutil.rmtree(directory)
    hold_up, seconds, quiet, total, growth, helpers = (max(column) for column in zip(*answers))
    if first:
        result.growth, result.helper = growth, helpers
        return
    result.hold_ups.append(hold_up)
    result.until_written.append(seconds)
    if steps:
        result.slowdowns.append(total / (len(steps) * quiet))
        result.extra.append(total - len(steps) * quiet)


def spread(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    if len(values) < 2:
        return f"{scale * values[0]:.{digits}f}" if values else "-"
    low, median, high = (scale * value for value in statistics.quantiles(values, n=4, method="inclusive"))
    return f"{median:.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})"


def report(results: dict[str, Result]) -> None:
    print(
        "\n| | hold-up, ms | share of the synchronous save, % | until written, s | steps meanwhile | extra, s a save | "
        "MB written | memory, MB | helper, MB |\n|---|---|---|---|---|---|---|---|---|"
    )
    synchronous = results["ours, synchronous"].hold_ups
    for name, result in results.items():
        if result.problem is not None:
            print(f"| {name} | failed: {result.problem} |")
            continue
        shares = [mine / whole for mine, whole in zip(result.hold_ups, synchronous)]
        print(
            f"| {name} | {spread(result.hold_ups, 1e3)} | {spread(shares, 100)} | {spread(result.until_written, 1, 2)} "
            f"| {spread(result.slowdowns, 1, 2)} | {spread(result.extra, 1, 2)} | {result.bytes_written / 1e6:.1f} "
            f"| {result.growth / 1e6:.0f} | {result.helper / 1e6:.0f} |"
        )


def run(training: Training, home: Path, args: argparse.Namespace) -> dict[str, Result]:
    context = training.context
    contenders, results = {}, {}
    for name, make in new_contenders(training, home).items():
        if args.only and not any(word in name for word in ("synchronous", *args.only.split(","))):
            continue
        results[name] = Result()
        directory = home / name.replace(",", "").replace(" ", "-")
        if context.is_main:
            directory.mkdir(parents=True)
        context.barrier()
        # Some settings of torch's need CUDA, or a version that has them.
        try:
            contender = make(directory)
            take_turn(training, contender, results[name], -1, args.quiet_steps)
            contenders[name] = contender
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            results[name].problem = f"{type(error).__name__}: {error}".splitlines()[0]
    failed = [bool(result.problem) for result in results.values()]
    if any(other != failed for other in context.gather(failed)):
        raise SystemExit("a contender failed on some ranks only")
    names = list(contenders)
    for number in range(args.rounds):
        for name in itertools.chain(names[number % len(names) :], names[: number % len(names)]):
            take_turn(training, contenders[name], results[name], number, args.quiet_steps)
        if context.is_main:
            print(f"round {number + 1} of {args.rounds}", end="\r", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=1, help="rows of a rank's batch")
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--data_parallel", choices=["auto", "fsdp", "hsdp"], default="auto")
    parser.add_argument("--ranks_per_machine", type=int, default=0)
    parser.add_argument("--zero1", action="store_true", help="each rank holds and saves its own shard")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--quiet_steps", type=int, default=4, help="steps without a save before each save")
    parser.add_argument("--directory", type=a_path, help="where to write (default: the machine's temporary directory)")
    parser.add_argument("--only", help="run contenders whose name has one of these words, separated by commas")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    context = init_context(device=args.device)
    if context.world_size == 1 and not dist.is_initialized():
        # torch's process-based saver needs a group, even of one process.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    home = Path(context.decide_on_main(lambda: tempfile.mkdtemp(prefix="checkpoints-", dir=args.directory)))
    training = (Training if args.data_parallel == "auto" else CutTraining)(context, args)
    try:
        results = run(training, home, args)
    finally:
        if context.is_main:
            shutil.rmtree(home, ignore_errors=True)
    if context.is_main:
        mode = "ZeRO-1, " if args.zero1 else f"{args.data_parallel}, " if args.data_parallel != "auto" else ""
        device = cpu_name() if context.device.type == "cpu" else torch.cuda.get_device_name()
        print(
            f"{training.num_parameters / 1e6:.1f} M parameters, float32, {mode}{context.world_size} "
            f"rank(s) on {device}, {torch.get_num_threads()} thread(s) each, {args.rows}x{args.seq_len} tokens a rank, "
            f"{args.rounds} rounds, torch {torch.__version__}, Python {platform.python_version()}"
        )
        report(results)
    training.close()
    context.barrier()
    # torch's helper process and its groups do not shut down cleanly.
    for child in multiprocessing.active_children():
        child.terminate()
    context.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    run_main(main)
