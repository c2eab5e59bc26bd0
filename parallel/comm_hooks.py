"""What happens to a bucket of gradients on its way to the other ranks.

A hook runs on the comm stream. It leaves in `bucket.grad` the **sum** over all ranks (the loss was already divided by
the count of the whole global batch), at the latest when the handle that it returns was waited for. Any function
`(state, bucket) -> handle or None` may be registered; the hooks here are classes, whose `reduce` is that function:

    ddp.register_comm_hook(hook, type(hook).reduce)      # or, shorter, ddp.use_hook(hook)

Each states what it sends. B is the bucket's size in elements, N the number of ranks, s bytes an element of the gradient
buffer; a step sends, from each rank:

    AllReduce                              2 (N - 1) / N x B s
    ReduceScatter                            (N - 1) / N x B s
    Compressed(AllReduce, bfloat16)        2 (N - 1) / N x B 2      with float16 also 2 (N - 1) / N x 4
    Compressed(ReduceScatter, bfloat16)      (N - 1) / N x B 2
    PowerSGD (powersgd.py)                 2 (N - 1) / N x (factors and what is not compressed)
"""

import torch
from torch import Tensor

from parallel.buffer import Bucket
from parallel.collectives import Collectives
from parallel.comm_stream import Handle

FP16_LARGEST_SUM = 65504.0 * (1 - 2.0**-10)
"""Below float16's largest value by the rounding of the addends."""


class CommHook:
    """What a hook owes."""

    def reduce(self, bucket: Bucket) -> Handle | None:
        """Sum the bucket over the ranks; under ReduceScatter only this rank's shard of it. On the comm stream."""
        raise NotImplementedError

    def bytes_sent(self, bucket: Bucket, itemsize: int | None = None) -> float:
        """Bytes that each rank sends for this bucket in a step; `itemsize` is the wire's, by default the bucket's."""
        raise NotImplementedError

    def zero_grad(self, bucket: Bucket) -> None:
        """Get the bucket's gradients ready for the next step."""
        bucket.grad.zero_()

    def check_wrapped(self, dtype: torch.dtype) -> None:
        """Raise ValueError if this hook cannot be given buckets in a 16-bit `dtype`, scaled differently each step."""


class AllReduce(CommHook):
    """Sum in the bucket's own dtype, on every rank."""

    def __init__(self, collectives: Collectives):
        self.collectives = collectives

    def reduce(self, bucket: Bucket) -> Handle | None:
        return self.collectives.all_reduce(bucket.grad)

    def bytes_sent(self, bucket: Bucket, itemsize: int | None = None) -> float:
        return 2 * shared_fraction(self.collectives) * len(bucket.grad) * (itemsize or bucket.grad.itemsize)


class ReduceScatter(CommHook):
    """Sum in the bucket's own dtype, each rank its shard: half the bytes, for an optimizer that steps shards."""

    def __init__(self, collectives: Collectives):
        self.collectives = collectives

    def reduce(self, bucket: Bucket) -> None:
        self.collectives.reduce_scatter(bucket.grad)

    def bytes_sent(self, bucket: Bucket, itemsize: int | None = None) -> float:
        return shared_fraction(self.collectives) * len(bucket.grad) * (itemsize or bucket.grad.itemsize)


class Compressed(CommHook):
    """Another hook, given the bucket in 16 bits.

    bfloat16 has float32's range. float16 has not: each bucket is scaled by a power of two on which the ranks agree, the
    largest with which the sum of N gradients cannot overflow. Infinities stay infinities, for the loss scaler to find.
    """

    def __init__(self, inner: CommHook, dtype: torch.dtype, collectives: Collectives):
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"gradients can travel as bfloat16 or float16, not as {dtype}")
        inner.check_wrapped(dtype)
        self.inner, self.dtype, self.collectives = inner, dtype, collectives
        self._narrow: Tensor | None = None

    def reduce(self, bucket: Bucket) -> None:
        if self._narrow is None or len(self._narrow) < len(bucket.grad):
            self._narrow = torch.empty_like(bucket.grad, dtype=self.dtype)
        narrow = self._narrow[: len(bucket.grad)]
        scale = agreed_scale(bucket.grad, self.collectives) if self.dtype == torch.float16 else None
        if scale is None:
            narrow.copy_(bucket.grad)
        else:
            torch.mul(bucket.grad, scale, out=narrow)
        handle = self.inner.reduce(bucket.with_grad(narrow))
        if handle is not None:
            handle.wait()
        bucket.grad.copy_(narrow)
        if scale is not None:
            bucket.grad.div_(scale)

    def bytes_sent(self, bucket: Bucket, itemsize: int | None = None) -> float:
        sums = self.inner.bytes_sent(bucket, itemsize or self.dtype.itemsize)
        return sums + agreement_bytes(self.dtype, self.collectives)

    def zero_grad(self, bucket: Bucket) -> None:
        self.inner.zero_grad(bucket)


def agreed_scale(tensor: Tensor, collectives: Collectives) -> Tensor:
    """The power of two by which every rank multiplies its `tensor` before it becomes float16.

    2^floor(log2(65440 / (N x largest absolute value on any rank))): the sum over N ranks stays finite, and small values
    move up, away from float16's coarse low end. 1 where a rank holds infinity or NaN, or all ranks hold zeros. float32
    scalar on the device.
    """
    low, high = tensor.aminmax()
    largest = torch.maximum(low.abs(), high.abs()).float().nan_to_num(nan=torch.inf, posinf=torch.inf)
    collectives.all_reduce_max(largest)
    exponent = torch.log2(FP16_LARGEST_SUM / (collectives.world_size * largest)).floor().clamp(-100.0, 100.0)
    return torch.where(torch.isfinite(largest) & (largest > 0.0), torch.exp2(exponent), torch.ones_like(largest))


def agreement_bytes(dtype: torch.dtype, collectives: Collectives) -> float:
    """Bytes that each rank sends to agree on a scale, if `dtype` needs one."""
    return 2 * shared_fraction(collectives) * 4 if dtype == torch.float16 else 0.0


def shared_fraction(collectives: Collectives) -> float:
    """(N - 1) / N: what a rank sends of a tensor that is scattered or gathered."""
    return (collectives.world_size - 1) / collectives.world_size
