"""This process's place among the ranks, and its process groups.

Only this module and launched.py read the environment. There are two process groups, each used by one thread, so that
the order of collectives on a group is the same on all ranks:

    grad_group      NCCL or gloo; belongs to the comm stream (gradients, with ZeRO-1 also parameters), under FSDP to
                    the thread that runs the forward or the backward pass, in whose course torch sends
    control_group   gloo; belongs to the main thread (token counts, norms, validation, saves)
"""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.launched import launched_rank, launched_world_size
from parallel.listen import (
    LOOPBACK,
    bind,
    interface_of,
    is_loopback,
    own_address,
    own_address_towards,
    serve_store,
)

_PIECE_BYTES, _SECTION_BYTES = 1 << 24, 1 << 28


class Levels(NamedTuple):
    """Groups for collectives on two levels; `machine_groups` makes them. They belong to the comm stream."""

    inside: dist.ProcessGroup
    """The ranks of this rank's machine."""
    between: dist.ProcessGroup
    """The ranks with this rank's number in every machine."""


@dataclass(frozen=True)
class DistContext:
    """This process's rank, device and groups. The groups are None if it is the only process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    grad_group: dist.ProcessGroup | None = None
    control_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_sum(self, values: Tensor) -> Tensor:
        """Sum a CPU tensor over all ranks, in place. Main thread only."""
        if self.control_group is not None:
            dist.all_reduce(values, group=self.control_group)
        return values

    def gather(self, value: object) -> list:
        """Every rank's value, in rank order, on every rank. Values must fit JSON; main thread only."""
        if self.control_group is None:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(content)]), group=self.control_group)
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: len(content)] = content
        gathered = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(gathered, padded, group=self.control_group)
        return [json.loads(g[: int(size)].numpy().tobytes()) for g, size in zip(gathered, sizes)]

    def gather_from(self, work: Callable[[], object]) -> list:
        """Do the work on every rank; every rank returns all results, or raises the first rank's ValueError."""
        answer = {}
        try:
            answer = {"result": work()}
        except ValueError as error:
            answer = {"problem": str(error)}
        answers = self.gather(answer)
        for answer in answers:
            if "problem" in answer:
                raise ValueError(answer["problem"])
        return [answer["result"] for answer in answers]

    def decide_on_main(self, decide: Callable[[], object]) -> object:
        """Run `decide` on rank 0 alone; every rank returns its result, or raises its ValueError."""
        return self.gather_from(lambda: decide() if self.is_main else None)[0]

    def require_same(self, value: object, message: str) -> None:
        """Raise ValueError(message) on every rank unless all ranks hold the same value."""
        if any(other != value for other in self.gather(value)):
            raise ValueError(message)

    def send_file(self, path: Path, source: int, target: int, between: Callable[[], object] | None = None) -> None:
        """Copy a file from one rank to another. Collective; main thread only. The other ranks wait, but only for one
        section at a time, as the whole file can take longer than the groups' timeout on a slow network.

        Args:
            path: the file on the source, and its copy on the target.
            between: called after each section of 256 MiB.
        """
        is_source, is_target = self.rank == source, self.rank == target
        with open(path, "rb" if is_source else "wb") if is_source or is_target else nullcontext() as file:
            size = self.gather(os.fstat(file.fileno()).st_size if is_source and file else 0)[source]
            for begin in range(0, size, _SECTION_BYTES):
                end = min(begin + _SECTION_BYTES, size)
                for at in range(begin, end, _PIECE_BYTES):
                    length = min(_PIECE_BYTES, end - at)
                    if file is None:
                        continue
                    if is_source:
                        piece = torch.frombuffer(bytearray(file.read(length)), dtype=torch.uint8)
                        dist.send(piece, target, group=self.control_group)
                    else:
                        piece = torch.empty(length, dtype=torch.uint8)
                        dist.recv(piece, source, group=self.control_group)
                        file.write(piece.numpy().data)
                self.barrier()
                if between is not None:
                    between()

    def barrier(self) -> None:
        if self.control_group is not None:
            dist.barrier(group=self.control_group)


def has_lost_peer(error: BaseException) -> bool:
    """Whether an error of a collective says that another rank has gone, or the network failed."""
    # Gloo's and NCCL's errors are RuntimeErrors; that of a closed console is not.
    lost = ("closed by peer", "reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in lost)
    )


def asked_interface() -> str | None:
    """Network interface that the environment names for gloo; the first, if it names several."""
    return os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0] or None


def prefer_interface(name: str | None) -> None:
    """Make gloo and NCCL use a network interface, here and in child processes, unless the environment names one."""
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        # Without "=", NCCL takes all interfaces whose names begin with this one.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def _interface(host: str, all_here: bool) -> str | None:
    """Network interface for the ranks to listen on. None: unknown; gloo then takes the one of the host's own name."""
    if all_here or host in ("localhost", LOOPBACK):
        return interface_of(LOOPBACK)
    address = own_address_towards(host)
    # A host may resolve its own name to loopback, which other hosts cannot reach.
    return interface_of(address) if address is not None and not is_loopback(address) else None


def _store(rank: int, timeout_s: float) -> dist.Store | None:
    """Rank 0's store, on one address, through which the ranks meet. None: the launcher has one, or torch makes its own.

    Raises:
        ValueError: MASTER_ADDR is not an address of rank 0's machine.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or not host or not port.isdecimal():
        return None
    if rank == 0:
        return serve_store(bind(own_address(host, interface=asked_interface()), int(port)), timeout_s)
    return dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout_s))


def init_context(device: str = "auto", backend: str = "auto", timeout_s: float = 600.0) -> DistContext:
    """Read this process's rank from torchrun's variables, choose its device and create the groups.

    Args:
        device: "auto" (CUDA if available), "cpu" or "cuda".
        backend: "auto" (NCCL on CUDA, otherwise gloo), "nccl" or "gloo", for gradients. Control always uses gloo.
        timeout_s: a collective that takes longer is an error.
    Raises:
        ValueError: CUDA was requested but is missing, or there are more local processes than GPUs under NCCL.
    """
    rank, world_size = launched_rank(), launched_world_size()
    local_rank, local_world_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda, but this machine or this torch has no CUDA: use --device=cpu")
    if backend == "auto":
        backend = "nccl" if device == "cuda" else "gloo"
    if backend == "nccl" and device == "cpu":
        raise ValueError("--ddp_backend=nccl needs --device=cuda: use gloo on a CPU")
    if device == "cuda":
        gpus = torch.cuda.device_count()
        if backend == "nccl" and local_world_size > gpus:
            raise ValueError(f"{local_world_size} processes for {gpus} GPUs: use --nproc_per_node={gpus}")
        chosen = torch.device("cuda", local_rank % gpus)
        torch.cuda.set_device(chosen)
    else:
        chosen = torch.device("cpu")
    if world_size == 1:
        return DistContext(rank, world_size, local_rank, local_world_size, chosen)
    timeout = timedelta(seconds=timeout_s)
    prefer_interface(_interface(os.environ.get("MASTER_ADDR", ""), all_here=local_world_size == world_size))
    store = _store(rank, timeout_s)
    dist.init_process_group(
        backend, timeout=timeout, store=store, rank=rank if store else -1, world_size=world_size if store else -1,
        device_id=chosen if backend == "nccl" else None,
    )  # fmt: skip
    control_group = dist.new_group(backend="gloo", timeout=timeout)
    return DistContext(rank, world_size, local_rank, local_world_size, chosen, dist.group.WORLD, control_group)


def new_group(context: DistContext, sets: Sequence[Sequence[int]], timeout_s: float) -> dist.ProcessGroup:
    """A group like `grad_group` for each set of ranks; returns that of this rank. Collective: every rank makes all
    groups in one order, as torch demands.

    Args:
        sets: the ranks of each group; every rank is in one of them.
        timeout_s: as in `init_context`.
    """
    assert context.grad_group is not None
    backend, own = dist.get_backend(context.grad_group), None
    for ranks in sets:
        group = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_s), backend=backend)
        own = group if context.rank in ranks else own
    assert own is not None, "a rank is in no set"
    return own


def group_of_one(context: DistContext) -> dist.ProcessGroup:
    """A group for the only process of a run, which has none: for what works by a group alone."""
    assert context.world_size == 1
    if not dist.is_initialized():
        prefer_interface(interface_of(LOOPBACK))
        dist.init_process_group(
            "nccl" if context.device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1,
            device_id=context.device if context.device.type == "cuda" else None,
        )  # fmt: skip
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def machine_groups(context: DistContext, machine_size: int, timeout_s: float) -> Levels:
    """Make the groups of two levels. Collective.

    Args:
        machine_size: consecutive ranks on each machine.
        timeout_s: as in `init_context`.
    """
    ranks = range(context.world_size)
    inside = new_group(context, [ranks[first : first + machine_size] for first in ranks[::machine_size]], timeout_s)
    between = new_group(context, [ranks[number::machine_size] for number in range(machine_size)], timeout_s)
    return Levels(inside, between)


def enable_determinism() -> None:
    """Make torch compute the same bits in every run on CUDA. Call it before the first use of CUDA."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def destroy_context(context: DistContext) -> None:
    """Leave the process groups. Call it once, after closing the comm stream."""
    if dist.is_initialized():
        dist.destroy_process_group()
