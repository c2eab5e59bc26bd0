"""Hooks that reduce a bucket of gradients over the ranks.

A hook runs on the comm stream. It leaves in `bucket.grad` the **sum** over all ranks (the loss was already divided by
the count of the whole global batch), at the latest when the caller has waited for the returned handle. `ddp.use_hook`
takes one of these; `ddp.register_comm_hook` takes any function `(state, bucket) -> handle or None`. The ranks are those
of `bucket.collectives`: on a mesh, buckets differ in them.

Each hook states its traffic. B is the bucket's size in elements, N the number of ranks, s the bytes of an element of
the gradient buffer; in a step, each rank sends:

    AllReduce                              2 (N - 1) / N x B s
    ReduceScatter                            (N - 1) / N x B s
    Compressed(AllReduce, bfloat16)        2 (N - 1) / N x B 2      with float16 also 2 (N - 1) / N x 4
    Compressed(ReduceScatter, bfloat16)      (N - 1) / N x B 2
    PowerSGD (powersgd.py)                 2 (N - 1) / N x (factors and uncompressed parameters)

Of M machines, each sends to the others what the same formulas say with M in place of N. (The 4 bytes of float16's
scale go round a ring of all ranks: 2 (N - 1) / N x 4.)
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from parallel.buffer import Bucket
from parallel.collectives import Collectives
from parallel.comm_stream import Handle

FP16_LARGEST_SUM = 65504.0 * (1 - 2.0**-10)
"""float16's largest value, less the rounding of the addends."""


SavedStates = Iterable[tuple[Mapping[str, Tensor], bool]]
"""`saved_state` of each rank that saved, and whether this rank is to take up its part."""


class CommHook:
    """A bucket's way from one backward pass to the next. contract.py says who calls what; the defaults are those of a
    hook that leaves the sum in the bucket and remembers nothing."""

    takes_in_place = True
    """Whether `take` returns the bucket's own gradients, and zeroing them is all that `release` does."""
    knows_norm = False
    """Whether `sum_of_squares` can be called."""
    keeps_scale = True
    """Whether the loss scale is still in the result of `take` and `sum_of_squares`."""

    def reduce(self, bucket: Bucket) -> Handle | None:
        """Sum the bucket over the ranks; under ReduceScatter only this rank's shard of it. On the comm stream."""
        raise NotImplementedError

    def settle(self, bucket: Bucket) -> None:
        """Finish the work that needs no other rank. Called by the thread that has waited for the bucket, while later
        buckets may still be on their way."""

    def sum_of_squares(self, bucket: Bucket) -> Tensor:
        """Sum of the squares of the whole bucket's sum, float64 scalar, the same on all ranks."""
        raise NotImplementedError

    def take(self, bucket: Bucket) -> Tensor:
        """The bucket's summed gradients for this step: 1-D, as long as the bucket; valid until the next call. Not
        called for a skipped step."""
        return bucket.grad

    def dtype_taken(self, bucket: Bucket) -> torch.dtype:
        """dtype of the result of `take`."""
        return bucket.grad.dtype

    def release(self, bucket: Bucket) -> None:
        """Get the bucket ready for the next backward pass, also after a skipped step. A second call changes nothing."""
        bucket.grad.zero_()

    def bytes_sent(self, bucket: Bucket, itemsize: int | None = None, by_machine: bool = False) -> float:
        """Bytes that each rank sends for this bucket in a step; 0 if unknown.

        Args:
            itemsize: bytes of an element on the wire, by default those of the bucket's.
            by_machine: count what each machine sends to other machines instead.
        """
        return 0.0

    def check_wrapped(self, dtype: torch.dtype) -> None:
        """
        Raises:
            ValueError: this hook cannot be given buckets in a 16-bit `dtype`, scaled differently each step; by default
                if it remembers anything or must be asked for its sums.
        """
        if self.remembers or not self.takes_in_place:
            raise ValueError(f"{type(self).__name__} does not go with gradients that are narrowed for the wire")

    def describe(self) -> str:
        """A few words on the hook for the line on how ranks share the work; may be empty."""
        return ""

    # Hooks that remember something between steps.

    remembers: tuple[str, ...] = ()
    """Kinds of tensors in `saved_state`, which calls them "PARAMETER/KIND". No two hooks use the same word."""
    saves_gradients = False
    """Whether the gradient buffers hold state to be saved, so that a step cannot be dropped once it has begun."""

    def begin_step(self, number: int) -> None:
        """Called before the first backward pass of step `number`, counted from 1."""

    def records(self) -> Mapping[str, dict]:
        """Records of the last step for the results' file: name -> fields."""
        return {}

    def saved_state(self) -> dict[str, Tensor] | None:
        """This rank's memory, for a checkpoint: views, by name. They may change after `begin_step`. None: no memory."""
        return None

    def take_states(self, states: SavedStates, step: int) -> list[str]:
        """Take up the memory that ranks have saved: the kinds that this hook remembers.

        Args:
            states: all ranks get the first one, for memory that was the same on all.
            step: completed steps.
        Returns:
            sentences on memory that has no place here.
        """
        return []


def take_saved_states(hook: CommHook, states: SavedStates, step: int, name: str) -> list[str]:
    """Let a hook take up its memory in a checkpoint.

    Args:
        name: the checkpoint's, for people.
    Returns:
        sentences on memory that has no place in this run, also that of another hook.
    """
    foreign: set[str] = set()

    def own() -> Iterator[tuple[Mapping[str, Tensor], bool]]:
        for saved, is_mine in states:
            # Names alone: reading another hook's memory would take as long as reading the weights.
            foreign.update({key.rpartition("/")[2] for key in saved} - set(hook.remembers))
            yield saved, is_mine

    known = own()
    sentences = hook.take_states(known, step)
    # A hook that remembers nothing has not looked.
    deque(known, maxlen=0)
    if foreign:
        kinds = ", ".join(sorted(foreign))
        sentences.append(f"the memory of the comm hook in {name} ({kinds}) is dropped: the run no longer uses it")
    return sentences


def ranks_of(bucket: Bucket, collectives: Collectives) -> Collectives:
    """Collectives of the ranks that add a bucket's gradients.

    Args:
        collectives: those for buckets that say nothing.
    """
    return bucket.collectives or collectives


class FunctionHook(CommHook):
    """A plain function `(state, bucket) -> handle or None`; its traffic is unknown."""

    def __init__(self, state: object, function: Callable[[object, Bucket], Handle | None]):
        self.state, self.function = state, function

    def reduce(self, bucket: Bucket) -> Handle | None:
        return self.function(self.state, bucket)


class AllReduce(CommHook):
    """Sum the whole bucket on every rank, in its own dtype."""

    def __init__(self, collectives: Collectives):
        self.collectives = collectives

    def reduce(self, bucket: Bucket) -> Handle | None:
        return ranks_of(bucket, self.collectives).all_reduce(bucket.grad)

    def bytes_sent(self, bucket: Bucket, itemsize: int | None = None, by_machine: bool = False) -> float:
        share = shared_fraction(ranks_of(bucket, self.collectives), by_machine)
        return 2 * share * len(bucket.grad) * (itemsize or bucket.grad.itemsize)


class ReduceScatter(CommHook):
    """Sum this rank's shard of the bucket, in its own dtype: half the bytes, for an optimizer that steps shards."""

    def __init__(self, collectives: Collectives):
        self.collectives = collectives

    def reduce(self, bucket: Bucket) -> None:
        ranks_of(bucket, self.collectives).reduce_scatter(bucket.grad)

    def bytes_sent(self, bucket: Bucket, itemsize: int | None = None, by_machine: bool = False) -> float:
        share = shared_fraction(ranks_of(bucket, self.collectives), by_machine)
        return share * len(bucket.grad) * (itemsize or bucket.grad.itemsize)


class Compressed(CommHook):
    """Narrows buckets to 16 bits for another hook.

    bfloat16 has float32's range. float16 does not: each bucket is scaled by a power of two on which the ranks agree,
    the largest with which the sum of N gradients cannot overflow. Infinities stay infinities, for the loss scaler to
    find. A bucket that already has this dtype is sent unchanged: float16 has no room for the scale, and the sum must
    fit the bucket anyway.
    """

    def __init__(self, inner: CommHook, dtype: torch.dtype, collectives: Collectives):
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"gradients can travel as bfloat16 or float16, not as {dtype}")
        inner.check_wrapped(dtype)
        self.inner, self.dtype, self.collectives = inner, dtype, collectives
        self._narrow: Tensor | None = None

    def reduce(self, bucket: Bucket) -> Handle | None:
        if bucket.grad.dtype == self.dtype:
            return self.inner.reduce(bucket)
        if self._narrow is None or len(self._narrow) < len(bucket.grad):
            self._narrow = torch.empty_like(bucket.grad, dtype=self.dtype)
        on_wire = self._narrow[: len(bucket.grad)]
        scale = narrow(bucket.grad, on_wire, ranks_of(bucket, self.collectives))
        handle = self.inner.reduce(bucket.with_grad(on_wire))
        if handle is not None:
            handle.wait()
        widen(on_wire, scale, bucket.grad)
        return None

    def describe(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} on the wire"

    def bytes_sent(self, bucket: Bucket, itemsize: int | None = None, by_machine: bool = False) -> float:
        sums = self.inner.bytes_sent(bucket, itemsize or self.dtype.itemsize, by_machine)
        if bucket.grad.dtype == self.dtype:
            return sums
        return sums + agreement_bytes(self.dtype, ranks_of(bucket, self.collectives))


def sum_hook(collectives: Collectives, wire_dtype: torch.dtype | None = None, sharded: bool = False) -> CommHook:
    """A hook that sums whole buckets or, if `sharded`, on each rank its shard; in `wire_dtype` if given."""
    hook = (ReduceScatter if sharded else AllReduce)(collectives)
    return hook if wire_dtype is None else Compressed(hook, wire_dtype, collectives)


def narrow(tensor: Tensor, out: Tensor, collectives: Collectives) -> Tensor | None:
    """Copy `tensor` into `out`, which is as long and has a 16-bit dtype; with float16, multiply by `agreed_scale`.

    Returns:
        the scale, for `widen`; None if `out` is not float16.
    """
    if out.dtype != torch.float16:
        out.copy_(tensor)
        return None
    scale = agreed_scale(tensor, collectives)
    torch.mul(tensor, scale, out=out)
    return scale


def widen(tensor: Tensor, scale: Tensor | None, out: Tensor) -> None:
    """Undo `narrow`: copy a sum of narrowed tensors into `out`, in the original units."""
    out.copy_(tensor)
    if scale is not None:
        out.div_(scale)


def agreed_scale(tensor: Tensor, collectives: Collectives) -> Tensor:
    """The power of two by which every rank multiplies its `tensor` before narrowing it to float16.

    2^floor(log2(65440 / (N x largest absolute value on any rank))): the sum over N ranks stays finite, and small values
    move up, away from float16's coarse low end. 1 if any rank holds infinity or NaN, or all ranks hold zeros. float32
    scalar on the device.
    """
    low, high = tensor.aminmax()
    largest = torch.maximum(low.abs(), high.abs()).float().nan_to_num(nan=torch.inf, posinf=torch.inf)
    collectives.all_reduce_max(largest)
    exponent = torch.log2(FP16_LARGEST_SUM / (collectives.world_size * largest)).floor().clamp(-100.0, 100.0)
    return torch.where(torch.isfinite(largest) & (largest > 0.0), torch.exp2(exponent), torch.ones_like(largest))


def agreement_bytes(dtype: torch.dtype, collectives: Collectives) -> float:
    """Bytes that each rank sends to agree on a scale, if `dtype` needs one; a machine sends as many to others."""
    return 2 * shared_fraction(collectives) * 4 if dtype == torch.float16 else 0.0


def shared_fraction(collectives: Collectives, by_machine: bool = False) -> float:
    """(N - 1) / N: the share of a scattered or gathered tensor that a rank sends; `by_machine`: that each of N machines
    sends to the others."""
    senders = collectives.machines if by_machine else collectives.world_size
    return (senders - 1) / senders
