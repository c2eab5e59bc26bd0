"""Buckets and gradients without a model, for tests of hooks: every rank can compute the values of every other rank."""

import zlib
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel import DistContext, destroy_context, init_context
from parallel.buffer import Bucket, FlatBuffers
from parallel.collectives import Collectives
from parallel.comm_hooks import CommHook
from parallel.config import PowerSGDConfig
from parallel.powersgd import Eager, PowerSGD

SHAPES = {
    "embed.weight": (40, 12), "up.weight": (24, 12), "up.bias": (24,), "conv.weight": (10, 3, 2, 2),
    "thin.weight": (2, 9), "down.weight": (12, 24), "norm.weight": (12,), "head.weight": (40, 12),
}  # fmt: skip


class Chain(nn.Module):
    """`depth` linear layers of 8 features."""

    def __init__(self, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def in_groups(world_sizes: Iterable[int], work: Callable[[DistContext], dict]) -> dict[str, dict]:
    """Results by n of calling `work` in a group of the first n ranks, for each n. Runs on the ranks of a large
    group."""
    context, results = init_context("cpu"), {}
    for size in world_sizes:
        groups = [dist.new_group(range(size)) for _ in range(2)]
        if context.rank < size:
            results[str(size)] = work(DistContext(context.rank, size, context.rank, size, context.device, *groups))
    destroy_context(context)
    return results


def new_buckets(
    world_size: int,
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    bucket_size: int = 400,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
) -> list[Bucket]:
    parameters = [(name, nn.Parameter(draw(f"weight {name}", shape).to(dtype))) for name, shape in shapes.items()]
    buffers = FlatBuffers(parameters, bucket_size, world_size, grad_dtype or dtype)
    return [Bucket.of(layout, buffers) for layout in buffers.layout.buckets]


def draw(key: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 numbers, as a function of the key."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))


def gradients_of(
    rank: int, step: int, dtype: torch.dtype = torch.float32, shapes: dict[str, tuple[int, ...]] = SHAPES
) -> dict[str, Tensor]:
    """A rank's gradients of a step: a part common to all ranks and steps, and noise."""
    return {
        name: (draw(name, shape) + draw(f"{rank} {step} {name}", shape)).to(dtype) for name, shape in shapes.items()
    }


def put(buckets: list[Bucket], gradients: dict[str, Tensor]) -> None:
    """Add gradients to the buckets, as the backward pass does."""
    for bucket in buckets:
        for name, view in bucket.views():
            view.add_(gradients[name])


def new_powersgd(buckets: list[Bucket], collectives: Collectives, lazy: bool = True, **options: object):
    """The hook with PowerSGDConfig's options and PowerSGD's own arguments; not `lazy`: with its sums in the buckets."""
    own = {name: options.pop(name) for name in ("wire_dtype", "seed", "loss_scale", "iteration") if name in options}
    hook = PowerSGD(buckets, collectives, PowerSGDConfig(**options), **own)
    return hook if lazy else Eager(hook)


def inner(hook: PowerSGD | Eager) -> PowerSGD:
    return hook.hook if isinstance(hook, Eager) else hook


def reduce_all(hook: CommHook, buckets: list[Bucket]) -> None:
    for bucket in buckets:
        handle = hook.reduce(bucket)
        if handle is not None:
            handle.wait()
        hook.settle(bucket)


def take(hook: CommHook, buckets: list[Bucket]) -> dict[str, Tensor]:
    """Copies of the sums, as the optimizer finds them."""
    sums = {}
    for bucket in reversed(buckets):
        taken = hook.take(bucket)
        for slot in bucket.slots:
            sums[slot.parameter.name] = bucket.piece(taken, slot).view(slot.parameter.shape).clone()
    return sums


def one_step(hook: CommHook, buckets: list[Bucket], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    for bucket in buckets:
        hook.release(bucket)
    put(buckets, gradients)
    reduce_all(hook, buckets)
    return take(hook, buckets)


def error(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of b (or 1 if that is zero); infinite if anything is not finite."""
    a, b = a.double(), b.double()
    found = ((a - b).norm() / (b.norm() if b.norm() > 0 else 1.0)).item()
    return found if found == found else float("inf")


def fingerprint(tensors: list[Tensor]) -> int:
    """Digest of the tensors' bits."""
    crc = 0
    for tensor in tensors:
        crc = zlib.crc32(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes(), crc)
    return crc
