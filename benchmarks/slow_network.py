"""A whole training step over a slow network: seconds and bytes sent, for several kinds of data parallelism.

    python -m benchmarks.slow_network --rates 1gbit,200mbit --dtypes float32,bfloat16    (as root)
    python -m benchmarks.slow_network --rates 200mbit --dtypes float32 --ranks_per_host 2

The two "hosts" are network namespaces of this machine, joined by a veth pair that is throttled at both ends:

    rank 0, 10.77.0.1 | eth0 tbf ======== tbf eth0 | 10.77.0.2, rank 1

With several ranks on each host, ours add inside a host first; those "on one level" do not, for comparison. Ranks of a
host talk over its loopback, which is not throttled.

A step is forward, backward, summing of gradients, clipping at norm 1, AdamW, zeroing of gradients. All contenders of
one rate and dtype share one process group and take turns, in a rotating order. After an untimed step, a few steps of
one contender are timed in a row, until none of their communication is in flight: the next forward pass may hide
communication, as in training, but none is left to the next contender.

Exit codes: 0 finished; 1 a rank failed; 2 the command is wrong, or this machine can't make such hosts; 128 + signal
when stopped. The namespaces are removed in every case except SIGKILL (`ip netns list`, `ip netns del`).
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from benchmarks.ddp import VOCAB_SIZE, new_module, timed
from optimizer.adamw import AdamW
from optimizer.config import AdamWConfig
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer
from parallel import (
    BucketGradients,
    Collectives,
    DistContext,
    DistributedDataParallel,
    PowerSGD,
    PowerSGDConfig,
    Zero1,
    destroy_context,
    init_context,
    sum_hook,
)
from utils.files import atomic_write_json
from utils.machine import cpu_name
from utils.paths import a_path
from utils.terminal import run_main

LEARNING_RATE = 1e-4
GRAD_CLIP = 1.0
ADAMW = AdamWConfig()

INTERFACE = "eth0"
"""Name of either host's interface, inside its namespace."""
ADDRESSES = ("10.77.0.1", "10.77.0.2")
BASELINE = "no communication"


class Contender:
    """One kind of data parallelism, with its own model."""

    def step(self, rows: Tensor) -> None:
        """One training step on rows [B, T + 1]; may leave communication in flight for the next step to hide."""
        raise NotImplementedError

    def drain(self) -> None:
        """Wait for communication that the last step left in flight."""

    def describe(self) -> str:
        """Remark for the report."""
        return ""

    def close(self) -> None:
        pass


class Ours(Contender):
    """DistributedDataParallel with a hook, and the training loop's optimizer on its slices or shards."""

    def __init__(self, ddp: DistributedDataParallel, communicate: bool = True, zero1: Zero1 | None = None):
        self.ddp, self.communicate, self.zero1 = ddp, communicate, zero1
        gradients = BucketGradients(ddp, zero1)
        self.optimizer = MixedPrecisionOptimizer(gradients, [AdamW(ADAMW)], GRAD_CLIP, LossScaler(enabled=False))

    def step(self, rows: Tensor) -> None:
        with nullcontext() if self.communicate else self.ddp.no_sync():
            # The ranks' gradients are summed, so the mean is taken here.
            (self.ddp(rows) / self.ddp.context.world_size).backward()
        if self.communicate:
            self.ddp.finish_grad_sync()
        self.optimizer.step(LEARNING_RATE, self.zero1.gather if self.zero1 else None)

    def drain(self) -> None:
        if self.zero1 is not None:
            self.zero1.wait()

    def describe(self) -> str:
        flat = self.ddp.flat_buffers
        megabytes = flat.grad_data.numel() * flat.grad_data.itemsize / 1e6
        sender = "host" if self.ddp.collectives.has_levels else "rank"
        sent = self.ddp.bytes_sent(by_machine=True) + (self.zero1.bytes_sent(by_machine=True) if self.zero1 else 0)
        return (
            f"{megabytes:.1f} MB of {dtype_name(flat.grad_data.dtype)} gradients in {len(self.ddp.buckets)} buckets, "
            f"{sent * self.communicate / 1e6:.2f} MB a step a {sender} by formula"
        )

    def close(self) -> None:
        self.ddp.close()


class Torch(Contender):
    """torch's DistributedDataParallel, with an optimizer on its parameters in their own dtype."""

    def __init__(
        self, ddp: nn.parallel.DistributedDataParallel, optimizer: torch.optim.Optimizer, communicate: bool = True
    ):
        self.ddp, self.optimizer, self.communicate = ddp, optimizer, communicate

    def step(self, rows: Tensor) -> None:
        with nullcontext() if self.communicate else self.ddp.no_sync():
            self.ddp(rows).backward()
        nn.utils.clip_grad_norm_(self.ddp.parameters(), GRAD_CLIP)
        self.optimizer.step()
        self.ddp.zero_grad(set_to_none=False)


Builder = Callable[[DistContext, torch.dtype, argparse.Namespace], Contender]


def ours(
    communicate: bool = True,
    wire_dtype: torch.dtype | None = None,
    zero1: bool = False,
    rank: int = 0,
    error_in_grad: bool = True,
    levels: bool = True,
) -> Builder:
    """Builds ours: with `rank`, PowerSGD of that rank; with `zero1`, ZeRO-1 that gathers under the next forward
    pass; with `levels`, sums inside a host before those between hosts."""

    def build(context: DistContext, dtype: torch.dtype, args: argparse.Namespace) -> Contender:
        ddp = DistributedDataParallel(
            new_module(dtype, args), context, bucket_size=args.bucket_size,
            collectives=Collectives(context.grad_group, context.local_world_size if levels else 1),
        )  # fmt: skip
        if rank:
            config = PowerSGDConfig(matrix_approximation_rank=rank, grad_buffer_is_powerSGD_error=error_in_grad)
            ddp.use_hook(PowerSGD(ddp.buckets, ddp.collectives, config, wire_dtype))
        else:
            ddp.use_hook(sum_hook(ddp.collectives, wire_dtype, zero1))
        return Ours(ddp, communicate, Zero1(ddp, overlap_gather=True) if zero1 else None)

    return build


def torchs(communicate: bool = True, zero1: bool = False) -> Builder:
    """Builds torch's DDP with its own bucket sizes, with or without ZeroRedundancyOptimizer."""

    def build(context: DistContext, dtype: torch.dtype, args: argparse.Namespace) -> Contender:
        ddp = nn.parallel.DistributedDataParallel(new_module(dtype, args), gradient_as_bucket_view=True)
        options = dict(
            lr=LEARNING_RATE, betas=(ADAMW.beta1, ADAMW.beta2), eps=ADAMW.adam_eps, weight_decay=ADAMW.weight_decay,
            fused=True,
        )  # fmt: skip
        if zero1:
            # Parameters as views of its buckets: its faster setting.
            optimizer = ZeroRedundancyOptimizer(
                ddp.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, **options
            )
        else:
            optimizer = torch.optim.AdamW(ddp.parameters(), **options)
        return Torch(ddp, optimizer, communicate)

    return build


CONTENDERS: dict[str, Builder] = {
    BASELINE: ours(communicate=False),
    "torch without communication": torchs(communicate=False),
    "torch DDP": torchs(),
    "torch ZeroRedundancyOptimizer": torchs(zero1=True),
    "ours": ours(),
    "ours + bf16 hook": ours(wire_dtype=torch.bfloat16),
    "ours + ZeRO-1": ours(zero1=True),
    "ours + ZeRO-1 + bf16 hook": ours(zero1=True, wire_dtype=torch.bfloat16),
    "PowerSGD 4": ours(rank=4, wire_dtype=torch.bfloat16),
    "PowerSGD 8": ours(rank=8, wire_dtype=torch.bfloat16),
    "PowerSGD 16": ours(rank=16, wire_dtype=torch.bfloat16),
    "PowerSGD 32": ours(rank=32, wire_dtype=torch.bfloat16),
    "PowerSGD 16 + float32 factors": ours(rank=16),
    "PowerSGD 16 + residual apart": ours(rank=16, wire_dtype=torch.bfloat16, error_in_grad=False),
    "PowerSGD 16 + ZeRO-1": ours(rank=16, wire_dtype=torch.bfloat16, zero1=True),
    "ours on one level": ours(levels=False),
    "ours + bf16 hook on one level": ours(wire_dtype=torch.bfloat16, levels=False),
    "ours + ZeRO-1 on one level": ours(zero1=True, levels=False),
    "ours + ZeRO-1 + bf16 hook on one level": ours(zero1=True, wire_dtype=torch.bfloat16, levels=False),
    "PowerSGD 16 on one level": ours(rank=16, wire_dtype=torch.bfloat16, levels=False),
}
"""PowerSGD with bf16 factors and the residual in the gradient buffer, unless said otherwise."""
ONE_LEVEL = " on one level"
"""End of the names of contenders that need several ranks on each host."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sent_bytes() -> int:
    """Bytes sent by this host so far: frames with headers and acknowledgements, counted before the kernel cuts large
    ones to the wire's size."""
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


def measure(context: DistContext, contender: Contender, rows: Tensor, steps: int) -> tuple[float, float]:
    """Seconds per step of the slowest rank, and bytes per step of the host that sends most."""

    def unit() -> None:
        for _ in range(steps):
            contender.step(rows)
        contender.drain()

    contender.step(rows)
    contender.drain()
    # A gather is two exchanges on the one queue of the link: after it, what was sent before it has left this host.
    # `timed` ends with one too.
    context.gather(None)
    before = sent_bytes()
    seconds = timed(context, unit)
    sent = sent_bytes() - before
    return seconds / steps, max(context.gather(sent)) / steps


def work(args: argparse.Namespace) -> None:
    """One rank: measure every contender; rank 0 writes the result."""
    torch.set_num_threads(1)
    context = init_context(device="cpu")
    dtype = getattr(torch, args.dtypes[0])
    contenders = {name: CONTENDERS[name](context, dtype, args) for name in args.modes}
    generator = torch.Generator().manual_seed(context.rank)
    rows = torch.randint(0, VOCAB_SIZE, (args.rows, args.seq_len + 1), generator=generator)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    sent: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(-1, args.rounds):
        first = round_number % len(args.modes)
        for name in args.modes[first:] + args.modes[:first]:
            seconds_a_step, bytes_a_step = measure(context, contenders[name], rows, args.steps_per_round)
            if round_number >= 0:
                seconds[name].append(seconds_a_step)
                sent[name].append(bytes_a_step)
    if context.is_main:
        result = {
            "parameters": sum(p.numel() for p in new_module(dtype, args).parameters()),
            "seconds": seconds,
            "bytes_sent": sent,
            "remarks": {name: contender.describe() for name, contender in contenders.items()},
        }
        atomic_write_json(Path(args.worker), result)
    for contender in contenders.values():
        contender.close()
    # No rank leaves while another still communicates with it.
    context.barrier()
    destroy_context(context)


class Unusable(Exception):
    """This machine can't run the benchmark, or the command is wrong; the sentence says why."""


class StopRequest:
    """Signal handler that only records the signal, so that nothing is interrupted between being started and noted."""

    def __init__(self):
        self.signum = 0

    def __call__(self, signum: int, _frame: object) -> None:
        self.signum = signum

    def check(self) -> None:
        if self.signum:
            raise SystemExit(128 + self.signum)


def system(command: str) -> None:
    """Run a command of iproute2, out of reach of the terminal's Ctrl-C.

    Raises:
        Unusable: the command failed.
    """
    done = subprocess.run(command.split(), capture_output=True, text=True, start_new_session=True)
    if done.returncode:
        raise Unusable(f"`{command}` failed: {' '.join(done.stderr.split()) or 'it does not say why'}")


@contextmanager
def two_hosts(rate: str) -> Iterator[list[str]]:
    """Names of two network namespaces, joined by a link of `rate` (as tc spells it) each way."""
    hosts = [f"zero2all-{os.getpid()}-{rank}" for rank in range(2)]
    with ExitStack() as stack:
        for host in hosts:
            system(f"ip netns add {host}")
            stack.callback(system, f"ip netns del {host}")
        system(f"ip link add {INTERFACE} netns {hosts[0]} type veth peer name {INTERFACE} netns {hosts[1]}")
        for host, address in zip(hosts, ADDRESSES):
            system(f"ip -n {host} address add {address}/24 dev {INTERFACE}")
            system(f"ip -n {host} link set lo up")
            system(f"ip -n {host} link set {INTERFACE} up")
            system(f"tc -n {host} qdisc add dev {INTERFACE} root tbf rate {rate} burst 128kb latency 50ms")
        yield hosts


def start_worker(
    rank: int, host: str, dtype: str, result: Path, output: Path, args: argparse.Namespace
) -> subprocess.Popen:
    """Start a rank on its host, in its own process group; its output goes to `output`."""
    options = ["hidden_size", "layers", "rows", "seq_len", "rounds", "steps_per_round", "bucket_size", "ranks_per_host"]
    command = ["ip", "netns", "exec", host, sys.executable, "-m", "benchmarks.slow_network", "--worker", str(result)]
    command += ["--dtypes", dtype, "--modes", ",".join(args.modes)]
    command += [f"--{name}={getattr(args, name)}" for name in options]
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": str(2 * args.ranks_per_host),
        "LOCAL_RANK": str(rank % args.ranks_per_host),
        "LOCAL_WORLD_SIZE": str(args.ranks_per_host),
        "MASTER_ADDR": ADDRESSES[0],
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "OMP_NUM_THREADS": "1",
    }
    with open(output, "wb") as stream:
        return subprocess.Popen(
            command, cwd=Path(__file__).resolve().parent.parent, env=os.environ | environment,
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True,
        )  # fmt: skip


def run_workers(hosts: list[str], dtype: str, args: argparse.Namespace, stop: StopRequest) -> dict:
    """Run the ranks of both hosts to their end; returns rank 0's result.

    Raises:
        SystemExit: a rank failed (its output is shown), or a signal asked to stop. No process is left.
    """
    with tempfile.TemporaryDirectory(prefix="slow_network-") as directory:
        result = Path(directory) / "result.json"
        on_hosts = [host for host in hosts for _ in range(args.ranks_per_host)]
        outputs = [Path(directory) / f"rank-{rank}.txt" for rank in range(len(on_hosts))]
        workers: list[subprocess.Popen] = []
        try:
            for rank, host in enumerate(on_hosts):
                workers.append(start_worker(rank, host, dtype, result, outputs[rank], args))
            while any(worker.poll() is None for worker in workers):
                stop.check()
                if any(worker.poll() for worker in workers):
                    break
                time.sleep(0.1)
            failed = [(rank, worker.returncode) for rank, worker in enumerate(workers) if worker.returncode]
        finally:
            for worker in workers:
                if worker.poll() is None:
                    os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
        if failed:
            for rank, code in failed:
                print(outputs[rank].read_text(errors="replace"), file=sys.stderr)
                print(f"rank {rank} ended with exit code {code}, see above", file=sys.stderr)
            raise SystemExit(1)
        return json.loads(result.read_text())


def setting(rate: str, dtype: str, args: argparse.Namespace, result: dict) -> dict:
    return {
        "rate": rate,
        "dtype": dtype,
        "parameters": result["parameters"],
        "layers": args.layers,
        "hidden_size": args.hidden_size,
        "rows": args.rows,
        "seq_len": args.seq_len,
        "ranks_per_host": args.ranks_per_host,
        "steps_per_round": args.steps_per_round,
        "rounds": args.rounds,
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores",
        "kernel": platform.release(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def table(about: dict, result: dict) -> str:
    """Report of one rate and dtype, in Markdown."""
    lines = [
        f"{about['rate']}, {about['dtype']}: {about['parameters'] / 1e6:.1f} M parameters ({about['layers']} layers, "
        f"{about['hidden_size']} wide), {about['rows']}x{about['seq_len']} tokens a rank, 2 hosts with "
        f"{about['ranks_per_host']} rank(s) of one thread each; "
        f"{about['rounds']} rounds of {about['steps_per_round']} steps; {about['cpu']}, Linux {about['kernel']}, "
        f"torch {about['torch']}, Python {about['python']}, {about['date']}",
        "",
        f"| contender | ms a step, median | quartiles | / {BASELINE} | MB sent a step a host |",
        "|---|---|---|---|---|",
    ]
    seconds = result["seconds"]
    for name, values in seconds.items():
        low, median, high = (1e3 * value for value in statistics.quantiles(values, n=4))
        ratio = statistics.median(a / b for a, b in zip(values, seconds[BASELINE]))
        megabytes = statistics.median(result["bytes_sent"][name]) / 1e6
        lines.append(f"| {name} | {median:.0f} | {low:.0f} .. {high:.0f} | {ratio:.2f} | {megabytes:.2f} |")
    lines += ["", "Ratios are medians over the rounds. MB count frames, with headers and acknowledgements."]
    lines += [f"- {name}: {remark}" for name, remark in result["remarks"].items() if remark]
    return "\n".join(lines) + "\n"


def launch(args: argparse.Namespace) -> None:
    if os.geteuid() != 0:
        raise Unusable("network namespaces need root: run benchmarks.slow_network as root")
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise Unusable(f"{' and '.join(missing)} not found: install iproute2")
    stop = StopRequest()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, stop)
    runs = []
    for rate in args.rates:
        for dtype in args.dtypes:
            with two_hosts(rate) as hosts:
                result = run_workers(hosts, dtype, args, stop)
            about = setting(rate, dtype, args, result)
            print(table(about, result), flush=True)
            runs.append(about | result)
            if args.output:
                # After each result, so that a later failure costs only its own.
                atomic_write_json(Path(args.output), {"runs": runs})


def parse_arguments() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [name.strip() for name in text.split(",")]

    parser = argparse.ArgumentParser(prog="benchmarks.slow_network", description=__doc__.splitlines()[0])
    parser.add_argument("--rates", type=names, default=["1gbit", "200mbit"], help="rates of the link, as in tc")
    parser.add_argument("--dtypes", type=names, default=["float32", "bfloat16"], help="dtypes of the weights")
    parser.add_argument("--ranks_per_host", type=int, default=1)
    parser.add_argument("--modes", type=names, help=f"by default all that differ, of: {', '.join(CONTENDERS)}")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps_per_round", type=int, default=3)
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--bucket_size", type=int, default=1_500_000, help="elements of our buckets")
    parser.add_argument("--output", type=a_path, help="JSON file for all raw figures")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ranks_per_host < 1:
        parser.error(f"--ranks_per_host must be at least 1, got {args.ranks_per_host}")
    if args.modes is None:
        args.modes = [name for name in CONTENDERS if args.ranks_per_host > 1 or not name.endswith(ONE_LEVEL)]
    for option, given, known in (
        ("--dtypes", args.dtypes, ["float32", "bfloat16"]),
        ("--modes", args.modes, list(CONTENDERS)),
    ):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"{option}: {', '.join(unknown)} is none of {', '.join(known)}")
    if args.rounds < 2 or args.steps_per_round < 1:
        parser.error("quartiles need --rounds of at least 2, and --steps_per_round of at least 1")
    # Always run: the ratios refer to it.
    args.modes = list(dict.fromkeys([BASELINE, *args.modes]))
    return args


def main() -> None:
    args = parse_arguments()
    if args.worker:
        work(args)
        return
    try:
        launch(args)
    except Unusable as error:
        print(f"benchmarks.slow_network: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    run_main(main)
